"""The parts of scripts/build_assets.py that can be wrong without anybody noticing."""

from __future__ import annotations

import gzip
import importlib
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

timm = pytest.importorskip("timm")
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def build() -> Iterator[Any]:
    """The script as a module, with its folder on the path while these tests run."""
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("build_assets")
    sys.path.remove(str(SCRIPTS))


def small_vit(**more: Any) -> VisionTransformer:
    """A ViT whose LayerNorms, biases and LayerScales are all away from their defaults."""
    torch.manual_seed(0)
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}
    model = VisionTransformer(**(shape | more)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.requires_grad_(False)


def test_a_slim_start_that_drops_nothing_is_the_teacher(build: Any) -> None:
    """With all blocks, heads and units, and a stream that lies in the kept directions, not a number may change.

    The stream has 24 dimensions, 23 once centred, which is what a student of width 24 keeps.
    """
    teacher, images = small_vit(init_values=0.5), torch.randn(8, 3, 16, 16)
    slim = build.Slim(teacher, depth=2, width=24, images=images)
    student = small_vit()
    slim.fill(student)
    nn.init.ones_(student.norm.weight), nn.init.zeros_(student.norm.bias)
    for block in student.blocks:
        for norm in (block.norm1, block.norm2):
            nn.init.ones_(norm.weight), nn.init.zeros_(norm.bias)
    weight, bias = slim.read("norm", torch.eye(24), None)
    got = student(images) @ weight.T + bias
    torch.testing.assert_close(got, teacher(images), atol=2e-4, rtol=0)


def test_augmentation_is_a_flip_and_a_shift_of_each_image(build: Any) -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)
    got = build.augment(images, pad=2)
    padded = nn.functional.pad(build.normalise(images), (2,) * 4, mode="reflect")
    seen = set()
    for image, full in zip(got, padded, strict=True):
        hits = [key for key, view in views(full) if torch.equal(view, image)]
        assert len(hits) == 1
        seen.add(hits[0])
    assert len(seen) > 25  # of 50 views, 64 draws


def views(full: Tensor) -> list[tuple[tuple[int, int, bool], Tensor]]:
    crops = {(i, j): full[:, i : i + 8, j : j + 8] for i in range(5) for j in range(5)}
    return [((i, j, flip), v.flip(2) if flip else v) for (i, j), v in crops.items() for flip in (False, True)]


def test_head_is_folded_back_to_raw_features(build: Any) -> None:
    torch.manual_seed(0)
    labels = torch.arange(300) % 3
    features = 5 + 10 * nn.functional.one_hot(labels, 3).float() + torch.randn(300, 3)
    head = build.fit_head(features, labels)
    assert (head(features).argmax(1) == labels).all()
    moved = build.fit_head(100 + 3 * features, labels)
    torch.testing.assert_close(moved(100 + 3 * features), head(features), atol=0.05, rtol=0)
    assert not head.weight.requires_grad


def test_an_interrupted_training_ends_with_the_same_bits(build: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = {"train_x": torch.randint(0, 256, (32, 3, 16, 16), dtype=torch.uint8), "train_y": torch.arange(32) % 4}
    targets = torch.randn(32, 4), torch.randn(32, 5)
    whole = run(build, tmp_path / "whole", data, targets, stops=(3,))
    parts = run(build, tmp_path / "parts", data, targets, stops=(1, 3))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


def run(
    build: Any, work: Path, data: dict[str, Tensor], targets: tuple[Tensor, Tensor], stops: tuple[int, ...]
) -> dict[str, Tensor]:
    import argparse

    work.mkdir()
    args = argparse.Namespace(batch=8, lr=1e-3, drop=(0.75, 0.5, 0.0), seed=0, work=work)
    for stop in stops:
        torch.manual_seed(len(stops))  # a new process would not share the first one's generator
        student = build.Student(small_vit(num_classes=4).requires_grad_(True).train(), 5)
        nn.init.zeros_(student.to_teacher.weight), nn.init.zeros_(student.to_teacher.bias)
        build.train(student, data, targets, args, stop=stop)
    return student.state_dict()


def test_idx_files_are_read_plain_and_gzipped(build: Any, tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    raw = bytes([0, 0, 8, 3]) + struct.pack(">3i", 2, 3, 4) + values.tobytes()
    (tmp_path / "a").write_bytes(raw)
    (tmp_path / "a.gz").write_bytes(gzip.compress(raw))
    assert np.array_equal(build.read_idx(tmp_path / "a"), values)
    assert np.array_equal(build.read_idx(tmp_path / "a.gz"), values)
