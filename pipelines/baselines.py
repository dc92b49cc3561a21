"""What the data give away without any network: logistic regression on raw pixels, and a table of colours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visionpeft import data
from visionpeft.errors import DataError, require

SIDE = 32
STRENGTHS = (1e-3, 1e-2, 1e-1)
"""Inverse regularisations C that are tried on the validation split."""


def raw_pixels(splits: data.Splits) -> tuple[Tensor, list[dict[str, Any]]]:
    """Logits [N, C] of the test images, and the validation accuracy of each C that was tried.

    Images are shrunk to at most 32 x 32 pixels and standardised. The best C is fitted again on train and validation.
    """
    if splits.multi_label:
        raise DataError("the raw row is for single-label data")
    # A tighter tolerance changes no prediction that matters, and takes minutes on a thousand classes.
    return regression(lambda part: _pixels(getattr(splits, part)), splits, STRENGTHS, tol=1e-3, max_iter=300)


def regression(features: Callable[[str], np.ndarray], splits: data.Splits, strengths: Sequence[float], *, tol: float,
               max_iter: int) -> tuple[Tensor, list[dict[str, Any]]]:
    """Logits [N, C] of the test set, and the validation accuracy of each inverse regularisation C that was tried.

    Args:
        features: [N, F] of a part of the data, "train", "val", "train_val" or "test"; they are standardised here.
    """
    def fit(strength: float, x: np.ndarray, labels: np.ndarray) -> Any:
        model = linear_model.LogisticRegression(C=strength, max_iter=max_iter, tol=tol)
        return pipeline.make_pipeline(preprocessing.StandardScaler(), model).fit(x, labels)

    linear_model, pipeline, preprocessing = (
        require(f"sklearn.{name}", extra="train") for name in ("linear_model", "pipeline", "preprocessing"))
    train, val = features("train"), features("val")
    tried = []
    for strength in strengths:
        correct = fit(strength, train, splits.train.labels).predict(val) == splits.val.labels
        tried.append({"C": strength, "val_accuracy": float(correct.mean())})
    best = max(tried, key=lambda row: row["val_accuracy"])["C"]
    model = fit(best, features("train_val"), splits.train_val.labels)
    return _logits(model, features("test"), len(splits.classes)), tried


def _logits(model: Any, features: np.ndarray, classes: int) -> Tensor:
    """Scores [N, C]; classes that never occur in training get a very small one."""
    scores = torch.from_numpy(model.decision_function(features)).float()
    if scores.ndim == 1:  # two classes: the score of the second
        scores = torch.stack([torch.zeros_like(scores), scores], dim=1)
    logits = torch.full((len(features), classes), -1e9)
    logits[:, torch.from_numpy(model.classes_)] = scores
    return logits


def colour_table(images: data.ImageSet, classes: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function from pixels uint8 [H, W, 3] to the class [H, W] that their colour mostly had in `images`.

    No threshold on colours does better on training pixels, but for rounding to 32 levels a channel; a colour never seen
    gets the most frequent class.
    """
    counts = np.zeros((32**3, 256), np.int64)
    for image, mask in (images[i] for i in range(len(images))):
        np.add.at(counts, (_colour(np.asarray(image)), mask), 1)
    counts = counts[:, :classes]
    table = np.where(counts.any(1), counts.argmax(1), counts.sum(0).argmax())
    return lambda pixels: table[_colour(pixels)]


def _colour(pixels: np.ndarray) -> np.ndarray:
    """Number of the colour of each pixel, 0 to 32 ** 3 - 1."""
    red, green, blue = np.moveaxis(pixels.astype(np.int64) // 8, -1, 0)
    return (red * 32 + green) * 32 + blue


def _pixels(images: data.ImageSet) -> np.ndarray:
    """Pixels in [0, 1], float32 [N, 3 * H * W]; a grey image counts its channel once."""
    image_type = require("PIL.Image", extra="train")
    first = images[0][0]
    size = (min(first.width, SIDE), min(first.height, SIDE))
    stack = [np.asarray(images[i][0].resize(size, image_type.Resampling.BILINEAR)) for i in range(len(images))]
    pixels = np.stack(stack).astype(np.float32) / 255
    if (pixels[..., :1] == pixels).all():
        pixels = pixels[..., :1]
    return pixels.reshape(len(pixels), -1)
