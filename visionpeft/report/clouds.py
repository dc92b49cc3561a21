"""Clouds from several sides, coloured by a value a point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from visionpeft.errors import require
from visionpeft.report import page, plots
from visionpeft.report.plots import picture

VIEWS = ((20, 30), (20, 120), (85, 30))
"""Elevation and turn about the upright axis, in degrees."""
SIDE = 72
"""Pixels of one view."""


def views(points: np.ndarray, values: np.ndarray | None = None) -> str:
    """A cloud [N, 3] (y is up) from three sides, as an inline picture; coloured by values [N], or by height."""
    values = points[:, 1] if values is None else values
    span = max(float(np.ptp(values)), 1e-12)
    viridis = require("matplotlib", extra="train").colormaps["viridis"]
    colours = (255 * viridis((values - values.min()) / span)[:, :3]).astype(np.uint8)
    pixels = np.concatenate([_view(points, colours, *view) for view in VIEWS], 1)
    image = require("PIL.Image", extra="train").fromarray(pixels)
    return picture(image, pixels.shape[1])


def _view(points: np.ndarray, colours: np.ndarray, up: float, around: float) -> np.ndarray:
    """Pixels [SIDE, SIDE, 3]; points are squares of two pixels, the nearest in front."""
    a, e = np.radians([around, up])
    turn = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
    tilt = np.array([[1, 0, 0], [0, np.cos(e), -np.sin(e)], [0, np.sin(e), np.cos(e)]])
    seen = (points - points.mean(0)) @ turn.T @ tilt.T
    seen = seen[order := seen[:, 2].argsort()] / max(float(np.abs(seen).max()), 1e-12)
    column = ((seen[:, 0] + 1) / 2 * (SIDE - 3)).astype(int)
    row = ((1 - seen[:, 1]) / 2 * (SIDE - 3)).astype(int)
    pixels = np.full((SIDE, SIDE, 3), 255, np.uint8)
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        pixels[row + down, column + right] = colours[order]
    return pixels


def predictions(result: Any, predicted: np.ndarray, splits: Any, clouds: np.ndarray,
                energy: np.ndarray | None = None, samples: int = 8) -> list[str]:
    """Confusion matrix and test clouds [N, P, 3] with their predictions.

    Args:
        energy: values [N, P] that colour the points (spectral energy), None for height.
    """
    labels, classes = splits.test.labels, splits.classes
    chosen: Sequence[int] = np.linspace(0, len(labels) - 1, min(samples, len(labels))).astype(int).tolist()
    drawn = [] if result.confusion is None else [page.figure(plots.confusion(np.array(result.confusion), classes))]
    shown = []
    for i in chosen:
        right = labels[i] == predicted[i]
        caption = classes[predicted[i]] if right else f"{classes[predicted[i]]}, not {classes[labels[i]]}"
        shown.append(page.figure(views(clouds[i], None if energy is None else energy[i]), caption, wrong=not right))
    colour = "height" if energy is None else "spectral energy of the last adapter"
    return [page.heading("Test set"), *drawn, page.heading(f"Samples of the test set, coloured by {colour}"), *shown]
