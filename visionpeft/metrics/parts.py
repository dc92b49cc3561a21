"""Scores of part segmentation, as the field computes them on ShapeNetPart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from visionpeft.errors import DataError


def shape_ious(predicted: Tensor, parts: Tensor, categories: Tensor, owned: Sequence[Sequence[int]]) -> Tensor:
    """IoU of each shape, float64 [N]: the mean over the parts of its category.

    A part that neither the shape nor the prediction has counts 1.

    Args:
        predicted, parts: int64 [N, P].
        categories: int64 [N].
        owned: the parts of each category.
    """
    found = torch.empty(len(parts), dtype=torch.float64)
    for category in categories.unique().tolist():
        mine = categories == category
        own = torch.tensor(owned[category])
        said, true = (x[mine].unsqueeze(-1) == own for x in (predicted, parts))
        both, either = (said & true).sum(1).double(), (said | true).sum(1).double()
        found[mine] = torch.where(either > 0, both / either.clamp(min=1), 1.0).mean(1)
    return found


def part_scores(ious: Tensor, categories: Tensor, names: Sequence[str]) -> tuple[dict[str, float], dict[str, float]]:
    """`instance_mIoU`, the mean over shapes, and `class_mIoU`, the mean over categories; and that of each category.

    Raises:
        DataError: there is no shape.
    """
    if not len(ious):
        raise DataError("mIoU of no shape")
    each = {name: ious[categories == i].mean().item() for i, name in enumerate(names) if (categories == i).any()}
    return {"instance_mIoU": ious.mean().item(), "class_mIoU": sum(each.values()) / len(each)}, each
