"""What each family asks of its pipeline, against the pipeline's own calls; a training step of each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

import tiny_pipelines

import visionpeft as vp
from visionpeft.diffusion import DiffusionError, family_of
from visionpeft.pipelines.generation import draw
from visionpeft.pipelines.personalisation import Config, run

X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
T = torch.tensor([3, 700])


def config(tmp_path: Path, **fields: Any) -> Config:
    """Two images and few updates."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(2):
        tiny_image(i).save(folder / f"{i}.png")
    given: dict[str, Any] = dict(
        images=str(folder), out=str(tmp_path / "run"), cache=str(tmp_path / "cache"), steps=2, inference_steps=2,
        method="lora:rank=2", checkpoint_seconds=0.0, prompt="a {}", previews=("a {}",),
    )  # fmt: skip
    return Config(**given | fields)


@pytest.mark.parametrize("kind", tiny_pipelines.PIPELINES)
def test_a_run(tmp_path: Path, kind: str) -> None:
    pipe = tiny_pipelines.PIPELINES[kind]()
    family = family_of(pipe)
    before = {k: v.clone() for k, v in family.denoiser.state_dict().items()}
    result = run(config(tmp_path, class_name="3" if kind == "dit" else "toy"), pipe=pipe)
    assert result.steps == 2 and 0 < result.loss < 100
    for name in ("adapter.safetensors", "metrics.jsonl", "report.html", "config.json", "previews/000002_0.png"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    after = family.denoiser.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


@torch.no_grad()
def test_sdxl() -> None:
    pipe: Any = tiny_pipelines.sdxl()
    family = family_of(pipe)
    given = family.text(["a cat", "b"]) | {"time_ids": torch.tensor([[512.0, 300, 0, 7, 64, 48]] * 2)}
    assert torch.equal(family.sized((512, 300), (0, 7), (64, 48))["time_ids"], given["time_ids"][:1])
    hidden, pooled = [], None
    for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
        ids = tokenizer(["a cat", "b"], padding="max_length", return_tensors="pt").input_ids
        out = encoder(ids, output_hidden_states=True)
        hidden.append(out.hidden_states[-2])
        pooled = out[0]
    assert torch.equal(given["text"], torch.cat(hidden, -1)) and torch.equal(given["pooled"], pooled)
    added = {"text_embeds": pooled, "time_ids": given["time_ids"]}
    wanted = pipe.unet(X, T, torch.cat(hidden, -1), added_cond_kwargs=added).sample
    assert torch.equal(family.predict(X, T, given), wanted)


@torch.no_grad()
def test_flux_packs_as_its_pipeline() -> None:
    pipe: Any = tiny_pipelines.flux()
    family = family_of(pipe)
    given = family.text(["a cat", "b"])
    ids = pipe._prepare_latent_image_ids(2, 4, 4, X.device, X.dtype)
    packed = pipe._pack_latents(X, 2, 4, 8, 8)
    out = pipe.transformer(
        hidden_states=packed, encoder_hidden_states=given["text"], pooled_projections=given["pooled"],
        timestep=T / 1000, guidance=torch.ones(2), txt_ids=torch.zeros(given["text"].shape[1], 3), img_ids=ids,
    ).sample  # fmt: skip
    wanted = pipe._unpack_latents(out, 16, 16, family.factor)
    assert torch.equal(family.predict(X, T, given), wanted)


@torch.no_grad()
def test_dit() -> None:
    pipe: Any = tiny_pipelines.dit()
    family: Any = family_of(pipe)
    assert [family.label(p) for p in ("7", "cat", "tench")] == [7, 1, 0]
    given = family.text(["7", ""])
    assert given["label"].tolist() == [7, 10]
    wanted = pipe.transformer(X, T, torch.tensor([7, 10])).sample[:, :4]
    assert torch.equal(family.predict(X, T, given), wanted)
    (mine,), (theirs,) = family.draw(["7"], [5], 3, 1.0), pipe([7], 1.0, torch.Generator().manual_seed(5), 3).images
    assert mine.tobytes() == theirs.tobytes()
    for bad in ("10", "dog"):
        with pytest.raises(DiffusionError, match="is no class"):
            family.label(bad)


def test_kinds_and_sides() -> None:
    from diffusers import EDMEulerScheduler

    found = {name: family_of(make()) for name, make in tiny_pipelines.PIPELINES.items()}
    assert {n: f.kind for n, f in found.items()} == {
        "sd": "epsilon", "sdxl": "epsilon", "dit": "epsilon", "sd3": "flow", "flux": "flow"
    }  # fmt: skip
    assert {n: (f.factor, f.multiple, f.resolution) for n, f in found.items() if n != "flux"} == {
        "sd": (2, 4, 16), "sdxl": (2, 4, 16), "dit": (2, 4, 16), "sd3": (2, 4, 16)
    }  # fmt: skip
    assert family_of(tiny_pipelines.sd("v_prediction")).kind == "v_prediction"
    with pytest.raises(DiffusionError, match="'sample' cannot be trained"):
        family_of(tiny_pipelines.sd("sample"))
    with pytest.raises(DiffusionError, match="dict cannot be personalised"):
        family_of({})
    pipe = tiny_pipelines.sd()
    pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(DiffusionError, match="EDMEulerScheduler has no alphas_cumprod"):
        family_of(pipe)


def test_a_dit_learns_new_classes_at_twice_the_resolution(tmp_path: Path) -> None:
    """DiffFit trains one table for all blocks; the grid of positions is spread, not extended."""
    import json

    from safetensors.torch import load_file

    from visionpeft.diffusion.classes import renew_classes

    pipe: Any = tiny_pipelines.dit()
    null = pipe.transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight[-1].clone()
    one = config(tmp_path, method="difffit:placement=thuml", new_classes=3, class_name="1", resolution=32,
                 caption_dropout=0.5, steps=3, weight_decay=0.0)  # fmt: skip
    (Path(one.images) / "captions.json").write_text(json.dumps({"0.png": "0", "1.png": "2"}))
    run(one, pipe=pipe)
    tables = [b.norm1.emb.class_embedder.embedding_table.weight for b in pipe.transformer.transformer_blocks]
    assert all(t.shape == (4, 16) and torch.equal(t, tables[0]) for t in tables) and torch.equal(tables[0][3], null)
    learnt = {k: v for k, v in load_file(one.folder / "adapter.safetensors").items() if "embedding_table" in k}
    (table,) = learnt.values()  # written once
    assert table.shape == (4, 16) and not torch.equal(table, tables[0])
    assert torch.equal(table[1], tables[0][1]), "a class without images has learnt"
    embed = pipe.transformer.pos_embed
    with torch.no_grad():
        embed.proj.weight.zero_(), embed.proj.bias.zero_()
        fine, coarse = embed(torch.zeros(1, 4, 16, 16)), embed(torch.zeros(1, 4, 8, 8))
    torch.testing.assert_close(fine.view(8, 8, 16)[::2, ::2], coarse.view(4, 4, 16), rtol=1e-5, atol=1e-5)
    with pytest.raises(DiffusionError, match="UNet2DConditionModel with 3"):
        renew_classes(tiny_pipelines.sd().unet, 3)


def test_a_dit_takes_classes_from_the_first_check_to_the_drawing(tmp_path: Path) -> None:
    pipe: Any = tiny_pipelines.dit()
    one = config(tmp_path, class_name="3")
    (Path(one.images) / "captions.json").write_text('{"0.png": "3", "1.png": "4"}')
    told: list[str] = []
    run(one, told.append, pipe=pipe)
    assert not [line for line in told if "NOTE: 1 captions" in line], "a class was taken for a missing word"
    pipe.save_pretrained(tmp_path / "dit")
    path = str(one.folder / "adapter.safetensors")
    ((prompt, image),) = draw(str(tmp_path / "dit"), {path: 1.0}, ["{}"], steps=2, guidance=1.0, seed=5)
    tuner = vp.load(pipe, path)
    (wanted,) = pipe([3], 1.0, torch.Generator().manual_seed(5), 2).images
    tuner.detach()
    assert prompt == "3" and image.tobytes() == wanted.tobytes()
    for wrong, message in ((replace(one, class_name="12", out=f"{one.out}2"), "'12' is no class"),
                           (replace(one, score_images=1, out=f"{one.out}3"), "a DiT takes classes")):  # fmt: skip
        with pytest.raises(DiffusionError, match=message):
            run(wrong, pipe=pipe)
        assert not wrong.folder.exists()


def test_dit_drops_a_label_in_all_blocks_at_once() -> None:
    pipe: Any = tiny_pipelines.dit()
    family = family_of(pipe)
    family.train()
    given = {"label": torch.tensor([2, 7])}
    first = family.predict(X, T, given)
    assert all(torch.equal(family.predict(X, T, given), first) for _ in range(20))


def tiny_image(seed: int) -> Any:
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8))
