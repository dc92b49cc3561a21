"""Scores of zero-shot classification and of retrieval, all as fractions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from visionpeft.clip.errors import ClipError
from visionpeft.errors import DataError, require

BINS = 15
METRICS = ("top1", "top5", "mean_per_class", "ece")


def classification_scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """top1, top5 (NaN below five classes), mean_per_class over the classes that occur, and ece.

    ece is the expected calibration error of the softmax over 15 equal bins of confidence, so `logits` (N, C) must have
    the model's own scale; labels int64 (N).

    Raises:
        DataError: no image, labels outside the classes, or logits that are not finite.
    """
    metrics = require("torchmetrics.functional.classification", extra="train")
    classes = logits.shape[1]
    if not len(labels) or len(labels) != len(logits):
        raise DataError(f"{len(logits)} rows of logits for {len(labels)} labels")
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        span = f"from {int(labels.min())} to {int(labels.max())}"
        raise DataError(f"labels reach {span}, but there are {classes} classes")
    if not torch.isfinite(logits).all():
        raise DataError("logits hold NaN or infinity")
    right = logits.argmax(1) == labels
    total = torch.bincount(labels, minlength=classes)
    each = torch.bincount(labels[right], minlength=classes)[total > 0] / total[total > 0]
    top5 = (logits.topk(5).indices == labels[:, None]).any(1).float().mean() if classes >= 5 else torch.nan
    ece = metrics.multiclass_calibration_error(logits.double().softmax(1), labels, classes, n_bins=BINS, norm="l1")
    return {
        "top1": float(right.float().mean()),
        "top5": float(top5),
        "mean_per_class": float(each.mean()),
        "ece": float(ece),
    }


def retrieval_scores(images: Tensor, texts: Tensor, owner: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Recall at K both ways: `text_to_image_r@K`, `image_to_text_r@K` (any of an image's captions counts).

    Args:
        images: unit-length features (N, d).
        texts: unit-length features (M, d).
        owner: int64 (M), which image each text describes.

    Raises:
        ClipError: K above the number of images or texts, where recall would be 1 whatever the model does.
        DataError: features that are not finite.
    """
    if max(ks) > min(len(images), len(texts)):
        raise ClipError(f"recall at {max(ks)} needs as many images and texts; there are {len(images)} and {len(texts)}")
    similarity = images.double() @ texts.double().t()
    if not torch.isfinite(similarity).all():
        raise DataError("features hold NaN or infinity")
    wanted = owner[None, :] == torch.arange(len(images), device=owner.device)[:, None]
    if not bool(wanted.any(1).all()):
        raise ClipError(f"image {int((~wanted.any(1)).nonzero()[0])} has no caption: leave it out of retrieval")
    best = similarity.topk(max(ks), dim=1).indices
    found = wanted.gather(1, best).cummax(1).values  # (N, K): whether one of the first k texts is the image's
    hits = (similarity.t().topk(max(ks), dim=1).indices == owner[:, None]).cummax(1).values
    scores = {f"text_to_image_r@{k}": float(hits[:, k - 1].double().mean()) for k in ks}
    return scores | {f"image_to_text_r@{k}": float(found[:, k - 1].double().mean()) for k in ks}
