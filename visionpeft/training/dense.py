"""Training and evaluating models that give a class to every pixel."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from visionpeft.data.masks import IGNORE
from visionpeft.errors import DataError, require
from visionpeft.training.feed import default_workers, own_words


@dataclass(frozen=True)
class DenseLoss:
    """Cross-entropy plus `dice` times the Dice loss, for each image by itself.

        CE = mean over pixels of w_y (-log p_y)
        Dice = sum_c w_c (1 - 2 sum p_c g_c / (sum p_c + sum g_c)) / sum_c w_c

    with p the softmax, g the mask as 0 and 1, y the true class, sums over the pixels that are not ignored and over the
    classes in the mask; an image without such pixels costs nothing. By image, not by batch, so that batches can be cut
    up among processes and accumulation steps.
    """

    dice: float = 0.0
    weights: Tensor | None = None
    """float [C] of classes, None for ones."""
    smoothing: float = 0.0

    def __call__(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Loss [B] of logits [B, C, H, W] and masks int64 [B, H, W]."""
        logits = logits.float()
        weights = None if self.weights is None else self.weights.to(logits.device)
        losses = F.cross_entropy(logits, masks, weights, ignore_index=IGNORE, reduction="none",
                                 label_smoothing=self.smoothing)
        known = masks != IGNORE
        loss = losses.flatten(1).sum(1) / known.flatten(1).sum(1).clamp(min=1)
        return loss + self.dice * self._dice(logits, masks, known, weights) if self.dice else loss

    @staticmethod
    def _dice(logits: Tensor, masks: Tensor, known: Tensor, weights: Tensor | None) -> Tensor:
        probable = logits.softmax(1) * known[:, None]
        true = F.one_hot(masks.where(known, 0), logits.shape[1]).movedim(-1, 1) * known[:, None]
        both, true = (probable * true).flatten(2).sum(2), true.flatten(2).sum(2)
        share = (true > 0) * (1.0 if weights is None else weights)
        missed = 1 - 2 * both / (probable.flatten(2).sum(2) + true).clamp(min=1)
        return (share * missed).sum(1) / share.sum(1).clamp(min=torch.finfo(share.dtype).tiny)


@dataclass(frozen=True)
class Windows:
    """How a model sees images: whole, or by square windows that overlap, whose logits are averaged."""

    side: int | None = None
    """Of a window in pixels; None takes images whole."""
    overlap: float = 0.5
    """Least share of a window that the next one covers too."""
    batch: int = 16
    """Windows, or whole images, at a time."""

    def __post_init__(self) -> None:
        if self.side is not None and self.side < 1:
            raise DataError(f"windows of {self.side} pixels: give a side of 1 or more, or 0 for whole images")
        if not 0 <= self.overlap < 1:
            raise DataError(f"overlap={self.overlap}: windows overlap by 0 to less than 1 of their side")

    def corners(self, height: int, width: int) -> list[tuple[int, int]]:
        """Upper left corners; the last window of a row or column ends at the border."""
        assert self.side is not None
        return list(itertools.product(self._starts(height, self.side), self._starts(width, self.side)))

    def _starts(self, length: int, side: int) -> list[int]:
        step = max(int(side * (1 - self.overlap)), 1)
        return [*range(0, length - side, step), max(length - side, 0)]

    def images(self, height: int, width: int) -> int:
        """How many images of a size make up a batch, one at least."""
        return self.batch if self.side is None else max(self.batch // len(self.corners(height, width)), 1)

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """float32 [B, C, H, W] of images [B, 3, H, W] of one size, no more than `images` says."""
        if self.side is None:
            return model(images).float()
        side, (height, width) = self.side, images.shape[-2:]
        total, times = images.new_zeros(()), images.new_zeros(height, width)
        for corners in _cut(self.corners(height, width), self.batch):
            given = model(torch.cat([images[..., top:top + side, left:left + side] for top, left in corners])).float()
            if not total.dim():
                total = given.new_zeros(len(images), given.shape[1], height, width)
            for (top, left), logits in zip(corners, given.split(len(images)), strict=True):
                total[..., top:top + side, left:left + side] += logits
                times[top:top + side, left:left + side] += 1
        return total / times


def _cut(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[i:i + size] for i in range(0, len(items), size))


@torch.no_grad()
def segment(model: nn.Module, images: Any, accelerator: Any, windows: Windows,
            workers: int | None = None) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Index, predicted classes uint8 [H, W] and mask int64 [H, W] of every image, in eval mode.

    Each of several processes gets its own images. Consecutive images of one size are taken together.

    Args:
        images: a MaskedSet whose transform gives tensors.
        workers: DataLoader processes; None chooses.
    """
    was_training = model.training
    model.eval()
    try:
        mine = range(accelerator.process_index, len(images), accelerator.num_processes)
        loader: DataLoader = DataLoader(Subset(images, mine), windows.batch, collate_fn=list,
                                        num_workers=default_workers(workers))
        numbers = iter(mine)
        for batch in _read(loader):
            for shape, group in itertools.groupby(batch, key=lambda pair: pair[0].shape):
                for part in _cut(list(group), windows.images(*shape[-2:])):
                    inputs, masks = zip(*part, strict=True)
                    with accelerator.autocast():
                        logits = windows.logits(model, torch.stack(inputs).to(accelerator.device))
                    for predicted, mask in zip(logits.argmax(1).to(torch.uint8).cpu(), masks, strict=True):
                        yield next(numbers), predicted, mask
    finally:
        model.train(was_training)


def _read(loader: DataLoader) -> Iterator[list[tuple[Tensor, Tensor]]]:
    try:
        yield from loader
    except DataError as error:
        raise DataError(own_words(str(error))) from error


def score_masks(model: nn.Module, images: Any, num_classes: int, accelerator: Any, windows: Windows,
                workers: int | None = None, keep: Sequence[int] = ()) -> tuple[dict[str, Any], dict[int, Tensor]]:
    """Scores of visionpeft.metrics.MeanIoU over a set, the same on every process, and some of the predicted masks.

    Args:
        keep: which images' masks are given back, as far as this process does them.
    """
    kept: dict[int, Tensor] = {}
    metric = require("visionpeft.metrics", extra="train").MeanIoU(num_classes).to(accelerator.device)
    for index, predicted, mask in segment(model, images, accelerator, windows, workers):
        metric.update(predicted.long()[None].to(accelerator.device), mask[None].to(accelerator.device))
        if index in keep:
            kept[index] = predicted
    return metric.compute(), kept
