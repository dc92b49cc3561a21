"""Where batches come from: tensors held in memory, or a DataLoader where images are many or augmented."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from visionpeft.errors import DataError
from visionpeft.training.order import seed_all

MEMORY_LIMIT = 1 * 2**30
"""Bytes of decoded images that one feed may hold."""


class Feed(Protocol):
    """Gives batches of given indices."""

    def __len__(self) -> int: ...

    def batches(self, pieces: Sequence[list[int]], seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (inputs [B, ...], targets [B], [B, C] or [B, H, W]) for each list of indices, in order."""
        ...

    def name(self, index: int) -> str:
        """What to call an item in an error message."""
        ...


class TensorFeed:
    """Inputs [N, ...] and targets [N, ...] in memory."""

    def __init__(self, inputs: Tensor, targets: Tensor, images: Any = None) -> None:
        self.inputs, self.targets, self._images = inputs, targets, images

    def __len__(self) -> int:
        return len(self.inputs)

    def batches(self, pieces: Sequence[list[int]], seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for piece in pieces:
            index = torch.tensor(piece, dtype=torch.long)
            yield self.inputs[index], self.targets[index]

    def name(self, index: int) -> str:
        return str(index if self._images is None else self._images.path(index))


class _Seeded(Dataset):
    """An image set whose random augmentation of item i is a function of (seed, epoch, i)."""

    def __init__(self, images: Any, seed: int, epoch: int) -> None:
        self.images, self.seed, self.epoch = images, seed, epoch

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        seed_all(self.seed, self.epoch, index)
        return self.images[index]


def default_workers(workers: int | None) -> int:
    """DataLoader processes where None was asked for."""
    return min(4, os.cpu_count() or 1) if workers is None else workers


class LoaderFeed:
    """Images decoded and transformed by DataLoader workers each time they are used."""

    def __init__(self, images: Any, workers: int | None = None) -> None:
        self.images = images
        self.workers = default_workers(workers)

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, pieces: Sequence[list[int]], seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        loader: DataLoader = DataLoader(
            _Seeded(self.images, seed, epoch), batch_sampler=list(pieces), num_workers=self.workers)
        try:
            yield from loader
        except DataError as error:
            raise DataError(own_words(str(error))) from error

    def name(self, index: int) -> str:
        return str(self.images.path(index))


def own_words(message: str) -> str:
    """The message of an error in a worker process, without the traceback that DataLoader puts before it."""
    if not message.startswith("Caught "):
        return message
    return message.rpartition("DataError: ")[2].strip()


def make_feed(images: Any, random: bool, workers: int | None = None, limit: int = MEMORY_LIMIT) -> Feed:
    """The quickest feed that gives these images: decoded once into memory if nothing is random and they fit.

    Args:
        images: a visionpeft.data.ImageSet whose transform gives tensors.
        random: whether its transform draws random numbers.
        workers: DataLoader processes; None chooses.
        limit: bytes that may be held in memory.
    """
    loader = LoaderFeed(images, workers)
    if random or not len(images):
        return loader
    if sum(_bytes(part) for part in images[0]) * len(images) > limit:
        return loader
    return TensorFeed(*decode(loader), images)


def _bytes(part: Any) -> int:
    """Of an image or mask; a label has next to none."""
    return part.nbytes if isinstance(part, Tensor) else 0


def decode(loader: LoaderFeed, batch: int = 64) -> tuple[Tensor, Tensor]:
    """All images of `loader` as one tensor [N, C, H, W], all targets as another."""
    pieces = [list(range(i, min(i + batch, len(loader)))) for i in range(0, len(loader), batch)]
    # Starting worker processes costs more than decoding a few hundred small images.
    source = loader if len(loader) > 512 else LoaderFeed(loader.images, workers=0)
    inputs, targets = zip(*source.batches(pieces, 0, 0), strict=True)
    return torch.cat(inputs), torch.cat(targets)
