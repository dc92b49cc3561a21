"""The nano CLIP: its image tower is nano_vit, its merges are byte-pair encoding, its training runs on a few images."""

from __future__ import annotations

import importlib
import io
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from visionpeft.clip import ClipError, build, nano, zero_shot_weights
from visionpeft.clip.losses import clip_loss
from visionpeft.models import nano as nano_vit

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def script() -> Any:
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("build_clip_assets")
    sys.path.remove(str(SCRIPTS))


def test_image_tower_is_nano_vit():
    vit = nano_vit.create().eval()
    clip = nano.create(pretrained=False)
    missing, unexpected = clip.model.load_state_dict(nano.image_tower(), strict=False)
    assert not unexpected and not [k for k in missing if k.startswith("visual.") and k != "visual.proj"]
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        pooled, _ = clip.model.visual._pool(clip.model.visual.transformer(clip.model.visual._embeds(x)))
        expected = vit.forward_head(vit.forward_features(x), pre_logits=True)
    torch.testing.assert_close(pooled, expected, rtol=1e-4, atol=1e-4)


def test_config_tokenizer_and_preprocessing_go_together():
    clip = nano.create(pretrained=False)
    assert clip.tokenizer.vocab_size == clip.model.vocab_size == 2014
    assert clip.preprocessing.size == (32, 32) and clip.preprocessing.mean == nano.MEAN
    ids = clip.tokenizer(["a photo of a dog", "zyx"])
    assert ids.shape == (2, 32) and int(ids.max()) == 2013
    assert clip.tokenizer.decode(ids[0, 1:6].tolist()) == "a photo of a dog "
    assert zero_shot_weights(clip.model, clip.tokenizer, ["dog", "cat"], ["{}"]).shape == (128, 2)
    own = nano.own_tensors(clip.model)
    assert sum(p.numel() for p in clip.model.parameters()) < 4_000_000  # 8 MB in half precision
    assert all(t.dtype == torch.float16 for t in own.values())


def test_merges_are_the_most_frequent_pairs(script, tmp_path):
    counts = Counter({("a", "b", "c</w>"): 3, ("a", "b", "d</w>"): 2, ("x", "c</w>"): 4})
    assert script.learn_merges(counts, 3) == [("a", "b"), ("x", "c</w>"), ("ab", "c</w>")]
    assert len(script.learn_merges(counts, 99)) == 4
    assert script.join(("a", "a", "a", "b"), ("a", "a")) == ("aa", "a", "b")
    script.write_merges(tmp_path / "m.txt.gz", script.learn_merges(script.words(["low lower lowest low"]), 6))
    tokenizer = nano.tokenizer(8, tmp_path / "m.txt.gz")
    assert tokenizer.vocab_size == 512 + 6 + 2
    assert len(tokenizer.encode("low")) == 1 and len(tokenizer.encode("lowx")) > 1


def test_shared_texts_loss_is_the_clip_loss_where_each_image_has_its_own(script):
    images, texts = torch.randn(5, 4), torch.randn(5, 4)
    unit = [torch.nn.functional.normalize(t, dim=1) for t in (images, texts)]
    found = script.loss(images, texts, torch.eye(5, dtype=torch.bool), torch.tensor(7.0))
    torch.testing.assert_close(found, clip_loss(*unit, 7.0))

    # Two images share the first text, and the third text is nobody's: its column counts in the rows alone.
    matches = torch.tensor([[1, 0, 0], [1, 0, 0], [0, 1, 0]]).bool()
    logits = 2 * unit[0][[0, 0, 1]] @ unit[1][:3].t()
    rows, columns = logits.log_softmax(1), logits.log_softmax(0)
    up = -(rows[0, 0] + rows[1, 0] + rows[2, 1]) / 3
    down = -((columns[0, 0] + columns[1, 0]) / 2 + columns[2, 1]) / 2
    found = script.loss(images[[0, 0, 1]], texts[:3], matches, torch.tensor(2.0))
    torch.testing.assert_close(found, (up + down) / 2)


@pytest.fixture
def little(tmp_path) -> Path:
    """Forty squares as CIFAR-10's file has them, and twelve photos with two captions each."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 40), ("test", 20)):
        encoded = []
        for _ in range(count):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "JPEG")
            encoded.append(np.frombuffer(file.getvalue(), np.uint8))
        arrays |= {f"{split}_bytes": np.concatenate(encoded), f"{split}_y": np.arange(count) % 10,
                   f"{split}_off": np.cumsum([0, *map(len, encoded)])}  # fmt: skip
    np.savez(tmp_path / "cifar.npz", **arrays)
    (tmp_path / "images").mkdir()
    lines = ["image,caption"]
    for i in range(22):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{i}.jpg")
        lines += [f"{i}.jpg,a dog number {i}", f'{i}.jpg,"running, {i}"']
    (tmp_path / "captions.txt").write_text("\n".join(lines))
    return tmp_path


def test_training_runs_and_its_file_is_the_model(script, little, capsys):
    script.main(["train", "--cifar10", str(little / "cifar.npz"), "--flickr8k", str(little), "--steps", "4", "--batch",
                 "16", "--photos", "6", "--views", "2", "--held-out", "10", "--work", str(little / "work"), "--out",
                 str(little)])  # fmt: skip
    figures = json.loads(capsys.readouterr().out)
    assert {"cifar10_prompted_accuracy", "text_to_image_r@1", "image_to_text_r@10", "parameters"} <= set(figures)
    file = little / nano.WEIGHTS
    assert 1_000_000 < file.stat().st_size < 2_500_000
    clip = build("nano_clip", str(file))
    start = nano.image_tower()
    state = clip.model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in start.items())
    again = build("nano_clip", str(file))
    assert torch.equal(again.model.text_projection, clip.model.text_projection)


def test_missing_weights_are_named(tmp_path, monkeypatch):
    with pytest.raises(ClipError, match="none.safetensors: no such file of weights"):
        build("nano_clip", str(tmp_path / "none.safetensors"))
    (tmp_path / "damaged.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ClipError, match="damaged.safetensors does not fit nano_clip"):
        build("nano_clip", str(tmp_path / "damaged.safetensors"))
    monkeypatch.setattr(nano, "WEIGHTS", "absent.safetensors")
    with pytest.raises(ClipError, match="absent.safetensors is not in this installation"):
        build("nano_clip")
