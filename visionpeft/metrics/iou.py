"""Segmentation scores from one confusion matrix over a whole data set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from visionpeft.data.masks import IGNORE
from visionpeft.errors import DataError, require

if TYPE_CHECKING:
    from torchmetrics import classification
else:
    classification = require("torchmetrics.classification", extra="train")


class MeanIoU(classification.MulticlassConfusionMatrix):
    """Mean intersection over union: `update(predicted int64 [B, H, W], masks int64 [B, H, W])`.

    Pixels count alike whichever image they are in: torchmetrics adds up the confusion matrix of all pixels and all
    processes, those of the mask 255 apart. `compute()` gives

        mIoU        mean of TP / (TP + FP + FN) over the classes that occur in a mask or in a prediction
        pixels      share of right pixels
        per_class   float64 [C], NaN for a class that occurs in neither
        confusion   int64 [C, C], rows the true class
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes=num_classes, ignore_index=IGNORE, validate_args=False)

    def compute(self) -> dict[str, Any]:  # type: ignore[override]
        return scores_of(super().compute())


def scores_of(confusion: torch.Tensor) -> dict[str, Any]:
    """The scores of a confusion matrix int64 [C, C], rows the true class.

    Raises:
        DataError: it counts no pixel.
    """
    right, total = confusion.diagonal().double(), confusion.sum().double()
    if not total:
        raise DataError("mIoU of no pixel: every mask is ignored as a whole")
    union = (confusion.sum(0) + confusion.sum(1)).double() - right
    per_class = torch.where(union > 0, right / union, torch.nan)
    return {"mIoU": per_class.nanmean().item(), "pixels": (right.sum() / total).item(), "per_class": per_class,
            "confusion": confusion}
