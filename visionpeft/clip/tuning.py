"""Few-shot training of a CLIP model on the images of named classes: what a batch is, and what its loss is taken of."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from visionpeft.clip.features import encode_images, image_features, may_cache
from visionpeft.clip.model import Clip
from visionpeft.clip.stepping import Loop, Steps
from visionpeft.data.sets import ImageSet

__all__ = ["Steps", "descend", "encoder", "pixels", "views"]


def descend(loop: Loop, images: int, objective: Callable[[Tensor], Tensor]) -> list[float]:
    """Train on batches of `images` images; returns the loss of every update.

    Args:
        objective: rows of a batch -> its loss.
    """
    rows = list(itertools.islice(_batches(images, loop.steps.batch, loop.seed), loop.steps.count))

    def update(step: int) -> Tensor:
        with loop.accelerator.autocast():
            loss = objective(rows[step])
        loop.accelerator.backward(loss)
        return loss

    return loop.run(update)


def _batches(total: int, size: int, seed: int) -> Iterator[Tensor]:
    """Rows of one update after another: every image once an epoch, the last batch of an epoch may be short."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(total, generator=generator).split(size)


def pixels(clip: Clip, train: ImageSet, augment: str | None, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Rows -> images (n, 3, H, W), augmented anew each time."""
    pictures = train.with_transform(clip.preprocessing.transform(augment))
    return lambda rows: torch.stack([pictures[int(i)][0] for i in rows]).to(device)


def encoder(clip: Clip, train: ImageSet, augment: str | None, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Rows -> unit-length features; computed once where every step would give the same."""
    if may_cache(clip.model, "image", augment is not None):
        kept = image_features(clip.model, train, clip.preprocessing).to(device)
        return lambda rows: kept[rows]
    images = pixels(clip, train, augment, device)
    return lambda rows: F.normalize(clip.model.encode_image(images(rows)), dim=-1)


def views(clip: Clip, train: ImageSet, count: int, seed: int) -> Tensor:
    """Features (V, N, d) of `count` randomly augmented passes over the images; the images themselves for 0."""
    if count == 0:
        return image_features(clip.model, train, clip.preprocessing)[None]
    torch.manual_seed(seed)
    pictures = train.with_transform(clip.preprocessing.transform("resized_crop"))
    return torch.stack([encode_images(clip.model, pictures, 64, clip.model.encode_image) for _ in range(count)])
