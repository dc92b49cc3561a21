"""Caches know everything that they depend on, and lose nothing when the disk is full."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
Image = pytest.importorskip("PIL.Image")

import tiny_pipelines  # noqa: E402

from visionpeft.data.subjects import Crop, Picture, pixels, read_subject  # noqa: E402
from visionpeft.diffusion import DiffusionError, family_of, load_pipeline  # noqa: E402
from visionpeft.diffusion.caching import Latents, Texts  # noqa: E402
from visionpeft.diffusion.prior import class_images  # noqa: E402
from visionpeft.errors import DataError  # noqa: E402
from visionpeft.training.runs import RunError  # noqa: E402


@pytest.fixture
def picture(tmp_path: Path) -> Picture:
    (tmp_path / "own").mkdir()
    values = np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "own" / "x.png")
    return read_subject(tmp_path / "own")[0]


@pytest.fixture
def pipe() -> Any:
    return tiny_pipelines.sd()


def test_latents_are_the_autoencoders(pipe: Any, picture: Picture, tmp_path: Path) -> None:
    found = Latents(pipe, tmp_path).get(picture, (16, 16), Crop(right=0.0, flip=True))
    x, corner = pixels(picture, (16, 16), Crop(right=0.0, flip=True))
    with torch.no_grad():
        wanted = pipe.vae.encode(x[None]).latent_dist
    assert torch.equal(found["mean"], wanted.mean[0] * pipe.vae.config.scaling_factor)
    assert torch.equal(found["std"], wanted.std[0] * pipe.vae.config.scaling_factor)
    assert tuple(found["corner"].tolist()) == corner


def test_shift_of_flow_models(picture: Picture) -> None:
    pipe = tiny_pipelines.sd3()
    found = Latents(pipe).get(picture, (16, 16), Crop())
    with torch.no_grad():
        wanted = pipe.vae.encode(pixels(picture, (16, 16), Crop())[0][None]).latent_dist
    torch.testing.assert_close(found["mean"], (wanted.mean[0] - 0.1) * 1.5)
    torch.testing.assert_close(found["std"], wanted.std[0] * 1.5)


def test_what_a_latent_depends_on(pipe: Any, picture: Picture, tmp_path: Path) -> None:
    first = Latents(pipe, tmp_path)
    first.get(picture, (16, 16), Crop())
    again = Latents(pipe, tmp_path)
    assert torch.equal(again.get(picture, (16, 16), Crop())["mean"], first.get(picture, (16, 16), Crop())["mean"])
    assert (first.made, again.made) == (1, 0)
    other = replace(picture, data=picture.data + b" ")
    for made, asked in enumerate([(other, (16, 16), Crop()), (picture, (16, 20), Crop()),
                                  (picture, (16, 16), Crop(flip=True)), (picture, (16, 16), Crop(right=0.1))], 1):
        again.get(*asked)
        assert again.made == made
    with torch.no_grad():
        next(pipe.vae.parameters()).flatten()[0].add_(1e-3)
    changed = Latents(pipe, tmp_path)
    changed.get(picture, (16, 16), Crop())
    assert changed.made == 1


def test_what_a_text_depends_on(pipe: Any, tmp_path: Path) -> None:
    family = family_of(pipe)
    first = Texts(family, tmp_path)
    a = first.get(["a zqx", "b", "a zqx"])["text"]
    assert first.made == 2 and torch.equal(a[0], a[2])
    with torch.no_grad():
        assert torch.equal(a[:2], torch.cat([family.text([p])["text"] for p in ("a zqx", "b")]))
    again = Texts(family, tmp_path)
    assert torch.equal(again.get(["b"])["text"], a[1:2]) and again.made == 0
    pipe.tokenizer.add_tokens(["<new>"])
    assert Texts(family, tmp_path).digest != first.digest
    with pytest.raises(DiffusionError, match="tokens and the text encoder reads 24"):
        again.get(["a " * 30])


def test_the_same_weights_with_another_config_are_another_cache(pipe: Any, picture: Picture, tmp_path: Path) -> None:
    first = Latents(pipe, tmp_path).get(picture, (16, 16), Crop())["mean"]
    factor = pipe.vae.config.scaling_factor
    pipe.vae.register_to_config(scaling_factor=2 * factor)
    torch.testing.assert_close(Latents(pipe, tmp_path).get(picture, (16, 16), Crop())["mean"], 2 * first)
    before = Texts(family_of(pipe)).digest
    pipe.text_encoder.config.hidden_act = "gelu"
    assert Texts(family_of(pipe)).digest != before
    pipe.save_pretrained(tmp_path / "pipe")
    again = load_pipeline(str(tmp_path / "pipe"))
    assert Latents(again).digest == Latents(pipe).digest, "loading it makes another one of it"
    assert Texts(family_of(again)).digest == Texts(family_of(pipe)).digest


def test_features_are_made_without_dropout(tmp_path: Path) -> None:
    """T5 of Flux and SD3 has some, and training puts the pipeline's parts into train mode."""
    family = family_of(tiny_pipelines.flux())
    family.train(False)
    with torch.no_grad():
        wanted = family.text(["a c"])["text"]
    family.train()
    assert torch.equal(Texts(family).get(["a c"])["text"], wanted)


def test_a_latent_that_is_not_finite_names_its_image(pipe: Any, picture: Picture, tmp_path: Path) -> None:
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight.fill_(float("nan"))
    with pytest.raises(DataError, match=r"x\.png: its latents are not finite"):
        Latents(pipe, tmp_path).get(picture, (16, 16), Crop())
    assert not list(tmp_path.glob("latents/*"))


def test_a_full_disk_loses_nothing(pipe: Any, picture: Picture, tmp_path: Path, monkeypatch: Any) -> None:
    latents = Latents(pipe, tmp_path)
    latents.get(picture, (16, 16), Crop())
    kept = {p: p.read_bytes() for p in tmp_path.glob("latents/*")}
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        write(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RunError, match="No space left on device"):
        latents.get(picture, (16, 20), Crop())
    monkeypatch.undo()
    assert {p: p.read_bytes() for p in tmp_path.glob("latents/*")} == kept
    assert latents.get(picture, (16, 20), Crop())["mean"].isfinite().all()


def test_a_damaged_file_is_named(pipe: Any, picture: Picture, tmp_path: Path) -> None:
    Latents(pipe, tmp_path).get(picture, (16, 16), Crop())
    (path,) = tmp_path.glob("latents/*")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(DataError, match=rf"{path.name} is no readable cache"):
        Latents(pipe, tmp_path).get(picture, (16, 16), Crop())


def test_class_images_are_drawn_once(pipe: Any, tmp_path: Path, monkeypatch: Any) -> None:
    family = family_of(pipe)
    how: Any = dict(steps=2, guidance=2.0, seed=3, side=16)
    found = class_images(family, "a c", 2, tmp_path, **how)
    with torch.no_grad():
        wanted = [pipe("a c", num_inference_steps=2, guidance_scale=2.0,
                       generator=torch.Generator().manual_seed(3 + i)).images[0] for i in range(2)]  # fmt: skip
    assert [p.open().tobytes() for p in found] == [image.tobytes() for image in wanted]
    monkeypatch.setattr(family, "draw", None)  # nothing is drawn again
    assert class_images(family, "a c", 2, tmp_path, **how) == found
    with pytest.raises(TypeError):
        class_images(family, "a b", 2, tmp_path, **how)
