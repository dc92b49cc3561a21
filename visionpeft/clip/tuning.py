"""Few-shot training of a CLIP model on the images of named classes: cross-entropy of 100 cos(image, class text)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from visionpeft.clip.errors import ClipError
from visionpeft.clip.features import image_features, may_cache
from visionpeft.clip.heads import FACTOR
from visionpeft.clip.model import Clip
from visionpeft.data.sets import ImageSet


@dataclass(frozen=True)
class Steps:
    """Optimiser and schedule. The defaults are CLIP-LoRA's (Zanella and Ben Ayed, arXiv 2405.18541).

    Attributes:
        count: updates; the learning rate falls by a cosine from lr to min_lr over them.
        warmup: first updates, at `warmup_lr`.
        augment: of visionpeft.data; None trains on the images as they are evaluated.
    """

    count: int
    batch: int = 32
    lr: float = 2e-4
    weight_decay: float = 1e-2
    optimizer: str = "adamw"
    min_lr: float = 1e-6
    warmup: int = 0
    warmup_lr: float = 1e-5
    augment: str | None = "resized_crop"

    def __post_init__(self) -> None:
        if self.count < 1 or self.batch < 1 or self.optimizer not in ("adamw", "sgd"):
            raise ClipError(f"{self}: expected at least one update of one image, by adamw or sgd")

    def rate(self, step: int) -> float:
        """Learning rate of an update, counted from 0."""
        if step < self.warmup:
            return self.warmup_lr
        return self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * step / self.count)) / 2

    def optimiser(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=self.lr, momentum=0.9, weight_decay=self.weight_decay)
        return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)


def descend(clip: Clip, parameters: Any, train: ImageSet, weights: Callable[[], Tensor], steps: Steps, seed: int,
            accelerator: Any, watch: Callable[[int, int, float], None] | None = None) -> list[float]:  # fmt: skip
    """Train `parameters`; returns the loss of every update.

    Args:
        weights: gives the classifier W (d, C) as it is now, with gradients where it learns.
        watch: called with (updates done, all updates, loss).

    Raises:
        ClipError: the loss is no number any more.
    """
    torch.manual_seed(seed)
    parameters = list(parameters)
    optimiser, losses = steps.optimiser(parameters), []
    labels = torch.from_numpy(train.labels).to(accelerator.device)
    images = _images(clip, train, steps.augment, accelerator)
    for step, rows in zip(range(steps.count), _batches(len(train), steps.batch, seed), strict=False):
        for group in optimiser.param_groups:
            group["lr"] = steps.rate(step)
        with accelerator.autocast():
            loss = F.cross_entropy(FACTOR * images(rows) @ weights(), labels[rows])
        if not torch.isfinite(loss):
            raise ClipError(f"the loss is {float(loss.detach())} at update {step}: lower the learning rate")
        optimiser.zero_grad()
        accelerator.backward(loss)
        optimiser.step()
        losses.append(float(loss.detach()))
        if watch is not None:
            watch(step + 1, steps.count, losses[-1])
    return losses


def _batches(total: int, size: int, seed: int) -> Iterator[Tensor]:
    """Rows of one update after another: every image once an epoch, the last batch of an epoch may be short."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(total, generator=generator).split(size)


def _images(clip: Clip, train: ImageSet, augment: str | None, accelerator: Any) -> Callable[[Tensor], Tensor]:
    """Rows -> unit-length features; computed once where every step would give the same."""
    if may_cache(clip.model, "image", augment is not None):
        kept = image_features(clip.model, train, clip.preprocessing).to(accelerator.device)
        return lambda rows: kept[rows]
    pictures = train.with_transform(clip.preprocessing.transform(augment))

    def encode(rows: Tensor) -> Tensor:
        pixels = torch.stack([pictures[int(i)][0] for i in rows]).to(accelerator.device)
        return F.normalize(clip.model.encode_image(pixels), dim=-1)

    return encode


def views(clip: Clip, train: ImageSet, count: int, seed: int) -> Tensor:
    """Features (V, N, d) of `count` randomly augmented passes over the images; the images themselves for 0."""
    if count == 0:
        return image_features(clip.model, train, clip.preprocessing)[None]
    torch.manual_seed(seed)
    pictures = train.with_transform(clip.preprocessing.transform("resized_crop"))
    found = []
    with torch.no_grad():
        for _ in range(count):
            parts = [torch.stack([pictures[int(i)][0] for i in rows]) for rows in np.array_split(
                np.arange(len(pictures)), math.ceil(len(pictures) / 64))]  # fmt: skip
            found.append(torch.cat([F.normalize(clip.model.encode_image(p).float(), dim=-1) for p in parts]))
    return torch.stack(found)
