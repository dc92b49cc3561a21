"""The order of the data is a function of seed and epoch, whatever the number of processes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from visionpeft.training import Recipe
from visionpeft.training.order import seed_all, updates


def batches(recipe: Recipe, world: int, epoch: int = 0, seed: int = 0) -> list[list[int]]:
    """The images of each update, over all processes, sorted."""
    shares = [updates(103, recipe, seed, epoch, rank, world) for rank in range(world)]
    steps = zip(*shares, strict=True)
    return [sorted(i for update in step for piece in update.pieces for i in piece) for step in steps]


@pytest.mark.parametrize("world, accumulation", list(itertools.product((2, 3, 5), (1, 2))))
def test_processes_share_the_batches_of_one(world: int, accumulation: int) -> None:
    alone = batches(Recipe(batch_size=10), 1)
    assert batches(Recipe(batch_size=10, accumulation=accumulation), world) == alone


def test_an_epoch_has_every_image_once() -> None:
    assert sorted(itertools.chain(*batches(Recipe(batch_size=10), 2))) == list(range(103))


def test_drop_last_leaves_out_the_short_batch() -> None:
    assert [len(batch) for batch in batches(Recipe(batch_size=10, drop_last=True), 1)] == [10] * 10


def test_fewer_images_than_a_batch_still_make_an_update() -> None:
    assert Recipe(batch_size=64, drop_last=True).updates_per_epoch(37) == 1


def test_order_changes_with_seed_and_epoch_only() -> None:
    recipe = Recipe(batch_size=10)
    assert batches(recipe, 1) == batches(recipe, 1)
    assert batches(recipe, 1, epoch=1) != batches(recipe, 1)
    assert batches(recipe, 1, seed=1) != batches(recipe, 1)


def test_a_process_without_images_knows_it() -> None:
    last = [updates(11, Recipe(batch_size=10), 0, 0, rank, 4)[-1] for rank in range(4)]
    assert [update.share for update in last] == [1, 0, 0, 0]
    assert {update.size for update in last} == {1}


def test_seed_all_reaches_torch_and_numpy() -> None:
    seed_all(1, 2)
    first = torch.rand(3), np.random.rand(3)
    seed_all(1, 2)
    assert torch.equal(first[0], torch.rand(3)) and (first[1] == np.random.rand(3)).all()
    seed_all(12)
    assert not torch.equal(first[0], torch.rand(3))
