"""Which images make up which update: a function of seed and epoch alone, for any number of processes.

Every process computes the same permutation and the same global batches, and takes its own share of each. A run on two
processes therefore averages the very gradients that a run on one computes.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

import numpy as np
import torch

from visionpeft.training.recipe import Recipe


def mix(*numbers: int) -> int:
    """One well-spread 63-bit seed from several small numbers."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_all(*numbers: int) -> None:
    """Seed torch (all devices), numpy and random from `numbers`."""
    seed = mix(*numbers)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@dataclass(frozen=True)
class Update:
    """One optimiser step: `size` images over all processes, `pieces` of dataset indices on this one."""

    size: int
    pieces: list[list[int]]

    @property
    def share(self) -> int:
        """Images of this process; 0 when the batch has fewer images than there are processes."""
        return sum(len(piece) for piece in self.pieces)


def updates(images: int, recipe: Recipe, seed: int, epoch: int, rank: int = 0, world: int = 1) -> list[Update]:
    """All updates of an epoch, as process `rank` of `world` sees them."""
    generator = torch.Generator().manual_seed(mix(seed, epoch))
    order = torch.randperm(images, generator=generator)
    count = recipe.updates_per_epoch(images)
    batches = [order[i * recipe.batch_size:(i + 1) * recipe.batch_size] for i in range(count)]
    return [_share(batch, recipe.accumulation, rank, world) for batch in batches]


def _share(batch: torch.Tensor, accumulation: int, rank: int, world: int) -> Update:
    pieces = batch[rank::world].tensor_split(accumulation)
    return Update(len(batch), [piece.tolist() for piece in pieces if len(piece)])
