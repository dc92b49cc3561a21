"""Feeds give the same batches however they are made, and random augmentation is a function of seed, epoch, image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from visionpeft import data
from visionpeft.data.preprocessing import AUGMENTATIONS
from visionpeft.data.sets import ArraySource, FileSource
from visionpeft.errors import DataError
from visionpeft.training import LoaderFeed, TensorFeed, make_feed

SPEC = data.Preprocessing((0.5,) * 3, (0.25,) * 3, (8, 8))
PIECES = [[3, 1], [0], [5, 4, 2]]


@pytest.fixture
def images() -> data.ImageSet:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 10, 10, 3), dtype=np.uint8)
    return data.ImageSet(ArraySource(pixels, "noise"), np.arange(6), SPEC.transform())


def collect(feed: object, seed: int = 0, epoch: int = 0) -> list[torch.Tensor]:
    return [inputs for inputs, _ in feed.batches(PIECES, seed, epoch)]  # type: ignore[attr-defined]


def test_memory_and_loader_give_the_same(images: data.ImageSet) -> None:
    held, loaded = make_feed(images, random=False), LoaderFeed(images, workers=0)
    assert isinstance(held, TensorFeed)
    for (a, s), (b, t) in zip(held.batches(PIECES, 0, 0), loaded.batches(PIECES, 0, 0), strict=True):
        assert torch.equal(a, b) and torch.equal(s, t)


def test_targets_follow_the_indices(images: data.ImageSet) -> None:
    targets = [t.tolist() for _, t in make_feed(images, random=False).batches(PIECES, 0, 0)]
    assert targets == PIECES


def test_too_much_for_memory_is_loaded_each_time(images: data.ImageSet) -> None:
    assert isinstance(make_feed(images, random=False, limit=6 * 3 * 8 * 8 * 4 - 1), LoaderFeed)
    assert isinstance(make_feed(images, random=False, limit=6 * 3 * 8 * 8 * 4), TensorFeed)


@pytest.mark.parametrize("augment", AUGMENTATIONS)
@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_depends_on_seed_epoch_and_image(images: data.ImageSet, augment: str, workers: int) -> None:
    feed = make_feed(images.with_transform(SPEC.transform(augment)), random=True, workers=workers)
    first = collect(feed)
    torch.rand(7)
    assert all(torch.equal(a, b) for a, b in zip(first, collect(feed), strict=True))
    alone = [inputs for inputs, _ in feed.batches(PIECES[2:], 0, 0)]
    assert torch.equal(alone[0], first[2]), "images depend on the batches before them"
    assert any(not torch.equal(a, b) for a, b in zip(first, collect(feed, epoch=1), strict=True))


def test_names_are_the_sources(images: data.ImageSet) -> None:
    assert make_feed(images, random=False).name(3) == "noise[3]"


def test_a_broken_image_is_named_also_from_a_worker(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG but no more")
    images = data.ImageSet(FileSource([str(tmp_path / "broken.png")]), np.zeros(1, np.int64), SPEC.transform())
    with pytest.raises(DataError, match="^.*broken.png[^\n]*$"):
        list(LoaderFeed(images, workers=1).batches([[0]], 0, 0))
