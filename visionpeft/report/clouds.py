"""Clouds from several sides, in the colours of classes, of parts, or of a number a point."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from visionpeft.errors import require
from visionpeft.report import page, plots
from visionpeft.report.plots import picture

VIEWS = ((20, 30), (20, 120), (85, 30))
"""Elevation and turn about the upright axis, in degrees."""
SIDE = 96
"""Pixels of one view."""
SAMPLES = 8
"""Test clouds in a report."""


def graded(values: np.ndarray) -> np.ndarray:
    """Colours uint8 [N, 3] of values [N], dark for the least and yellow for the greatest."""
    span = max(float(np.ptp(values)), 1e-12)
    viridis = require("matplotlib", extra="train").colormaps["viridis"]
    return (255 * viridis((values - values.min()) / span)[:, :3]).astype(np.uint8)


def palette(count: int) -> np.ndarray:
    """Colours uint8 [count, 3] to tell classes or parts apart; from the 21st on they come again."""
    tab = require("matplotlib", extra="train").colormaps["tab20"]
    order = [*range(0, 20, 2), *range(1, 20, 2)]  # strong colours first
    return np.array([[round(255 * c) for c in tab(order[i % 20])[:3]] for i in range(count)], dtype=np.uint8)


def views(points: np.ndarray, *colours: np.ndarray) -> str:
    """A cloud [N, 3] (y is up) from three sides, as an inline picture: a row for each colouring uint8 [N, 3]."""
    rows = [np.concatenate([_view(points, each, *view) for view in VIEWS], 1) for each in colours]
    pixels = np.concatenate(rows)
    image = require("PIL.Image", extra="train").fromarray(pixels)
    return picture(image, max(pixels.shape))


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


def key(names: Sequence[str], colours: np.ndarray) -> str:
    """Markup: the colour of each name."""
    return "".join(f'<span style="background:rgb({r},{g},{b})">&emsp;</span> {escape(name)} &ensp;'
                   for name, (r, g, b) in zip(names, colours.tolist(), strict=True))


def chosen(count: int) -> list[int]:
    """Which of so many clouds a report shows."""
    return np.linspace(0, count - 1, min(SAMPLES, count)).astype(int).tolist()


def predictions(result: Any, predicted: np.ndarray, splits: Any, clouds: np.ndarray,
                energy: np.ndarray | None = None) -> list[str]:
    """Confusion matrix and test clouds [N, P, 3] in the colour of the predicted class.

    Args:
        energy: values [N, P] for one more row of views (spectral energy), None without.
    """
    labels, classes = splits.test.labels, splits.classes
    drawn = [] if result.confusion is None else [page.figure(plots.confusion(np.array(result.confusion), classes))]
    colours, shown, seen = palette(len(classes)), [], set()
    for i in chosen(len(labels)):
        own, right = predicted[i], labels[i] == predicted[i]
        seen |= {int(own)}
        caption = classes[own] if right else f"{classes[own]}, not {classes[labels[i]]}"
        rows = [np.tile(colours[own], (clouds.shape[1], 1))] + ([] if energy is None else [graded(energy[i])])
        shown.append(page.figure(views(clouds[i], *rows), caption, wrong=not right))
    met = sorted(seen)
    said = [] if energy is None else ["Below each: spectral energy, how much the spectral part of the last adapter "
                                      "changes the tokens there, from dark (least of the cloud) to yellow (most)."]
    return [page.heading("Test set"), *drawn,
            page.heading("Samples of the test set from three sides, coloured by prediction"),
            page.paragraphs(said), f"<p>{key([classes[i] for i in met], colours[met])}</p>", *shown]


def parts_shown(predicted: np.ndarray, splits: Any, clouds: np.ndarray) -> list[str]:
    """Test clouds [N, P, 4] in the colours of predicted parts [N, P], and below in those of the true ones."""
    labels, shown = splits.test.labels, []
    for i in chosen(len(labels)):
        own = np.array(splits.owned[labels[i]])
        colours = palette(len(own))
        rows = [colours[np.searchsorted(own, parts)] for parts in (predicted[i], clouds[i, :, 3].astype(int))]
        names = key([splits.parts[j] for j in own], colours)
        right = float((predicted[i] == clouds[i, :, 3]).mean())
        caption = f"{splits.classes[labels[i]]}: {100 * right:.1f} % of the points right"
        shown.append(f"<figure>{views(clouds[i, :, :3], *rows)}<figcaption>{escape(caption)}<br>{names}</figcaption>"
                     "</figure>")
    title = "Samples of the test set from three sides, coloured by predicted part (above) and true part (below)"
    return [page.heading(title), *shown]
