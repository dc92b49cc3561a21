"""Clouds from several sides, coloured by a value a point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from visionpeft.errors import require
from visionpeft.report.plots import _svg

VIEWS = ((20, -60), (20, 30), (89, -90))
"""Elevation and azimuth, in degrees."""


def views(points: np.ndarray, values: np.ndarray | None = None, side: float = 1.4) -> str:
    """A cloud [N, 3] (y is up) from three sides, as SVG; coloured by values [N], or by height."""
    require("mpl_toolkits.mplot3d", extra="train")
    figure: Any = require("matplotlib.figure", extra="train").Figure(figsize=(side * len(VIEWS), side))
    values = points[:, 1] if values is None else values
    for number, (up, around) in enumerate(VIEWS, start=1):
        axes = figure.add_subplot(1, len(VIEWS), number, projection="3d")
        axes.scatter(points[:, 0], points[:, 2], points[:, 1], c=values, s=1.0, cmap="viridis", rasterized=True)
        axes.view_init(up, around)
        axes.set_axis_off()
        axes.set_box_aspect((1, 1, 1), zoom=1.4)
    figure.subplots_adjust(0, 0, 1, 1, 0, 0)
    return _svg(figure)


def predictions(result: Any, predicted: np.ndarray, splits: Any, clouds: np.ndarray,
                energy: np.ndarray | None = None, samples: int = 8) -> list[str]:
    """Confusion matrix and test clouds [N, P, 3] with their predictions.

    Args:
        energy: values [N, P] that colour the points (spectral energy), None for height.
    """
    from visionpeft.report import page, plots

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
