"""Classification scores, accumulated over batches and processes by torchmetrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from visionpeft.errors import DataError, require

if TYPE_CHECKING:
    from torchmetrics import classification
else:
    classification = require("torchmetrics.classification", extra="train")

dim_zero_cat = require("torchmetrics.utilities.data", extra="train").dim_zero_cat


class Accuracy(classification.MulticlassConfusionMatrix):
    """Top-1 accuracy for one label per image: `update(logits [B, C], labels int64 [B])`.

    `compute()` gives fractions `top1` and `mean_per_class` (over the classes that occur), and `confusion`, int64
    [C, C] with the true class in rows.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes=num_classes)

    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        _check_finite(logits)
        super().update(logits, labels)

    def compute(self) -> dict[str, Any]:  # type: ignore[override]
        confusion = super().compute()
        correct, total = confusion.diagonal().double(), confusion.sum(1).double()
        if not total.sum():
            raise DataError("accuracy of no image: update() was never called")
        occurs = total > 0
        return {
            "top1": (correct.sum() / total.sum()).item(),
            "mean_per_class": (correct[occurs] / total[occurs]).mean().item(),
            "confusion": confusion,
        }


class MeanAveragePrecision(classification.MultilabelAveragePrecision):
    """mAP for several labels per image: `update(logits [B, C], labels {0, 1} [B, C])`.

    `compute()` gives `map`, the mean over the classes with a positive, and `per_class`, float [C], NaN for the others.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_labels=num_classes, average="none")

    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        _check_finite(logits)
        # torchmetrics would apply a sigmoid to those batches only that leave [0, 1], where large logits then tie. AP
        # depends on order alone: softsign, moved into [0, 1], keeps it.
        super().update((nn.functional.softsign(logits.double()) + 1) / 2, labels.long())

    def compute(self) -> dict[str, Any]:  # type: ignore[override]
        if not len(self.target):
            raise DataError("mAP of no image: update() was never called")
        positives = dim_zero_cat(self.target).sum(0)
        per_class = torch.where(positives > 0, super().compute(), torch.nan)
        return {"map": per_class.nanmean().item(), "per_class": per_class}


def metric_for(num_classes: int, multi_label: bool = False) -> Accuracy | MeanAveragePrecision:
    """The score that fits the labels."""
    return MeanAveragePrecision(num_classes) if multi_label else Accuracy(num_classes)


def _check_finite(logits: torch.Tensor) -> None:
    if not torch.isfinite(logits).all():
        raise DataError("logits hold NaN or infinity: their argmax would count as a class")
