"""Masks as pictures: colours of classes, overlays, and what the report of a segmentation run shows of its test set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from visionpeft.data.masks import IGNORE
from visionpeft.errors import require
from visionpeft.report import page, plots

OPACITY = 0.55
SIDE = 160


@dataclass(frozen=True)
class Sample:
    """A test image (PIL), its mask and the predicted one, uint8 [H, W]."""

    image: Any
    mask: np.ndarray
    predicted: np.ndarray


def palette() -> np.ndarray:
    """uint8 [256, 3], a colour for each class: that of Pascal VOC, where bits of the number are spread over channels.

    The first is black, the last, of ignored pixels, a light grey.
    """
    numbers, colours = np.arange(256), np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((numbers >> (3 * bit + channel)) & 1).astype(np.uint8) << (7 - bit)
    return colours


def coloured(mask: np.ndarray) -> Any:
    """A mask uint8 [H, W] as a PIL palette picture: its pixels are the classes, shown in colours."""
    picture = require("PIL.Image", extra="train").fromarray(mask)
    picture.putpalette(palette().tobytes())
    return picture


def overlay(image: Any, mask: np.ndarray) -> Any:
    """A PIL image under the colours of its classes; ignored pixels stay as they are."""
    pixels, colours = np.asarray(image.convert("RGB")).astype(np.float32), palette()[mask]
    mixed = np.where((mask == IGNORE)[..., None], pixels, (1 - OPACITY) * pixels + OPACITY * colours)
    return require("PIL.Image", extra="train").fromarray(mixed.round().astype(np.uint8))


def masks_shown(result: Any, samples: Sequence[Sample]) -> list[str]:
    """IoU of each class in its colour, confusion of pixels, and images with true and predicted masks."""
    sections = [page.heading("Test set"), *(_swatch(number, name, result.per_class.get(name))
                                            for number, name in enumerate(result.classes))]
    if result.confusion is not None:
        sections.append(page.figure(plots.confusion(np.array(result.confusion), result.classes)))
    if samples:
        sections.append(page.heading("Samples of the test set: image, truth, prediction"))
    for sample in samples:
        three = (sample.image, coloured(sample.mask).convert("RGB"), overlay(sample.image, sample.predicted))
        sections.append("<div>" + "".join(page.figure(plots.picture(picture, SIDE)) for picture in three) + "</div>")
    return sections


def _swatch(number: int, name: str, iou: float | None) -> str:
    square = require("PIL.Image", extra="train").new("RGB", (1, 1), tuple(palette()[number].tolist()))
    return page.figure(plots.picture(square, 16), f"{name}: {'absent' if iou is None else f'{100 * iou:.1f}'}")
