"""The nano text-to-image pipeline: its words, its text encoder, its file; the pictures it is trained on."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("open_clip")

from safetensors.torch import save_file  # noqa: E402

from visionpeft.clip import nano as nano_clip  # noqa: E402
from visionpeft.clip.text import encode_tokens  # noqa: E402
from visionpeft.data import scenes  # noqa: E402
from visionpeft.diffusion.words import check_token, rare_token  # noqa: E402
from visionpeft.errors import VisionPEFTError  # noqa: E402
from visionpeft.models import nano_diffusion  # noqa: E402


@pytest.fixture(scope="module")
def pipe() -> Any:
    """Random weights but for the text encoder, which is nano CLIP's."""
    torch.manual_seed(0)
    found = nano_diffusion.create(pretrained=False)
    clip = nano_clip.create().model
    tower = {k: v for k, v in clip.state_dict().items() if not k.startswith("visual.")}
    found.text_encoder.load_state_dict(nano_diffusion.from_open_clip(tower, len(found.tokenizer)))
    return found


def test_words_are_those_of_nano_clip(pipe: Any) -> None:
    theirs = nano_clip.tokenizer(32)
    for text in ("a red mushroom in front of a brick wall", "An Airplane, it's 12!", *scenes.captions()[::400]):
        wanted = [int(i) for i in theirs(text)[0] if i]
        found = pipe.tokenizer(text).input_ids
        assert found[1:-1] == wanted[1:-1] and found[0] == wanted[0] + 10 and found[-1] == wanted[-1] + 10


def test_rare_words_are_whole(pipe: Any) -> None:
    assert rare_token(pipe.tokenizer) == nano_diffusion.RARE[-1]
    for word in nano_diffusion.RARE:
        check_token(pipe.tokenizer, word)


@torch.no_grad()
def test_text_encoder_is_nano_clips(pipe: Any) -> None:
    clip, texts = nano_clip.create(), ["a photo of a red ball", "a toy in the snow"]
    ids = pipe.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    found = pipe.text_encoder(ids).pooler_output @ clip.model.text_projection
    wanted = encode_tokens(clip.model, clip.tokenizer(texts, context_length=32))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_file(pipe: Any, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    pipe.vae.register_to_config(scaling_factor=0.75)
    save_file(nano_diffusion.pack(pipe), path)
    again = nano_diffusion.create(path)
    assert again.vae.config.scaling_factor == 0.75
    for name in ("vae", "text_encoder", "unet"):
        for key, value in getattr(pipe, name).state_dict().items():
            assert torch.equal(getattr(again, name).state_dict()[key], value.half().float())
    assert path.stat().st_size < 16 * 2**20
    (image,) = again("a toy", num_inference_steps=1).images
    assert image.size == (32, 32)
    tensors = nano_diffusion.pack(pipe)
    del tensors["unet.conv_in.weight"]
    save_file(tensors, path)
    with pytest.raises(VisionPEFTError, match="does not fit nano_diffusion"):
        nano_diffusion.create(path)
    with pytest.raises(VisionPEFTError, match="build_diffusion_assets"):
        nano_diffusion.create(tmp_path / "none.safetensors")


def test_bundled_weights_draw_finite_pictures() -> None:
    if not (files("visionpeft.assets") / "nano_diffusion.safetensors").is_file():
        pytest.skip("assets/nano_diffusion.safetensors is not there: scripts/build_diffusion_assets.py makes it")
    (image,) = nano_diffusion.create()("a photo of a toy in the snow", num_inference_steps=8).images
    assert np.asarray(image).std() > 20


def test_scenes() -> None:
    known = set(scenes.captions())
    first, second = np.random.default_rng(3), np.random.default_rng(3)
    for _ in range(30):
        (image, caption), (again, words) = scenes.scene(first), scenes.scene(second)
        assert image.tobytes() == again.tobytes() and image.size == (32, 32) and caption == words and caption in known
    taken = {frozenset((toy.colour, toy.second)) for toy in scenes.SUBJECTS.values()}
    toys = [scenes.random_toy(first) for _ in range(300)]
    assert not any(frozenset((toy.colour, toy.second)) in taken for toy in toys)
    with pytest.raises(VisionPEFTError, match="no background is called 'on mars'"):
        scenes.background("on mars", first, 32)
