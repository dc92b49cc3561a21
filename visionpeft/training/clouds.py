"""Batches of clouds: sampled once, augmented anew, every draw a function of seed, epoch and cloud."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visionpeft.errors import VisionPEFTError
from visionpeft.models.point_ops import farthest_points, take
from visionpeft.training.order import mix

AUGMENTATIONS = ("scale_translate", "rotate", "none", "fixed")


class AugmentError(VisionPEFTError):
    """No such augmentation of clouds."""


def check_augmentation(name: str | None) -> None:
    """Refuse a misspelt augmentation."""
    if name is not None and name not in AUGMENTATIONS:
        raise AugmentError(f"no augmentation of clouds is called {name!r}: one of {', '.join(AUGMENTATIONS)}")


def drawn_from(points: int) -> int:
    """From how many points a training sample of `points` is drawn at random: 1,200 for 1,024, 2,400 for 2,048."""
    return {1024: 1200, 2048: 2400, 4096: 4800}.get(points, points * 6 // 5)


def ordered(clouds: Any, count: int, batch: int = 64) -> Tensor:
    """Clouds (a `visionpeft.data.ImageSet` of arrays) as float32 (N, count, C), each in farthest-point order.

    The first n of it are what farthest-point sampling to n gives. Clouds of fewer points begin again. Columns behind
    x y z go with their points.
    """
    parts: list[Tensor] = []
    waiting: list[np.ndarray] = []
    for index in range(len(clouds)):
        cloud = np.asarray(clouds[index][0], dtype=np.float32)
        if waiting and (len(waiting) == batch or len(cloud) != len(waiting[0])):
            parts.append(_sampled(waiting, count))
            waiting = []
        waiting.append(cloud)
    return torch.cat([*parts, _sampled(waiting, count)])


def _sampled(clouds: Sequence[np.ndarray], count: int) -> Tensor:
    points = torch.from_numpy(np.stack(clouds))
    own = min(count, points.shape[1])
    return take(points, farthest_points(points[..., :3], own)[:, torch.arange(count) % own])


class CloudFeed:
    """Clouds in memory, a `visionpeft.training.Feed`.

    Args:
        clouds: what `ordered` gives; training draws `points` of all, evaluation takes the first.
        targets: int64 [N].
        augment: "scale_translate" (each axis by 2/3 to 3/2, then by -0.2 to 0.2), "rotate" (about y), "none", which
            still draws points; "fixed" and None, evaluation, give the same points each time.
        names: what to call a cloud in a message.
    """

    def __init__(self, clouds: Tensor, targets: Tensor, points: int, augment: str | None = None,
                 names: Any = None) -> None:
        check_augmentation(augment)
        self.clouds, self.targets, self.points, self.augment, self.names = clouds, targets, points, augment, names

    def __len__(self) -> int:
        return len(self.clouds)

    def name(self, index: int) -> str:
        return str(index if self.names is None else self.names.path(index))

    def batches(self, pieces: Sequence[list[int]], seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for piece in pieces:
            index = torch.tensor(piece, dtype=torch.long)
            yield self._batch(piece, index, seed, epoch), self.targets[index]

    def _batch(self, piece: list[int], index: Tensor, seed: int, epoch: int) -> Tensor:
        if self.augment in (None, "fixed"):
            return self.clouds[index, : self.points]
        return torch.stack([augmented(self.clouds[i], self.points, self.augment, mix(seed, epoch, i)) for i in piece])


class PartFeed(CloudFeed):
    """Clouds (N, M, 4) whose fourth column is the part of a point; `targets` int64 [N] are the categories.

    Gives points (B, P, 4) with the category in the fourth column, and parts int64 (B, P).
    """

    def batches(self, pieces: Sequence[list[int]], seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for points, categories in super().batches(pieces, seed, epoch):
            column = categories.to(points.dtype)[:, None, None].expand(-1, points.shape[1], 1)
            yield torch.cat([points[..., :3], column], -1), points[..., 3].long()


def augmented(cloud: Tensor, points: int, kind: str, seed: int) -> Tensor:
    """`points` drawn of a cloud (M, C), x y z changed at random; everything from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    cloud = cloud[torch.randperm(len(cloud), generator=generator)[:points]]
    return torch.cat([_moved(cloud[:, :3], kind, generator), cloud[:, 3:]], 1)


def _moved(cloud: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    if kind == "scale_translate":
        scale = torch.empty(3).uniform_(2 / 3, 3 / 2, generator=generator)
        return cloud * scale + torch.empty(3).uniform_(-0.2, 0.2, generator=generator)
    if kind == "rotate":
        angle = float(torch.empty(1).uniform_(0, 2 * math.pi, generator=generator))
        cos, sin = math.cos(angle), math.sin(angle)
        return cloud @ torch.tensor([[cos, 0.0, sin], [0.0, 1.0, 0.0], [-sin, 0.0, cos]])
    return cloud
