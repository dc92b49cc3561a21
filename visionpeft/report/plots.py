"""Figures as text for a page: SVG of matplotlib, PNG of images."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from visionpeft.errors import require


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure and its axes, without touching matplotlib's global state."""
    figure = require("matplotlib.figure", extra="train").Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Any) -> str:
    text = io.StringIO()
    matplotlib = require("matplotlib", extra="train")
    with matplotlib.rc_context({"svg.hashsalt": "visionpeft", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return text.getvalue()[text.getvalue().index("<svg"):]


def _plain(text: str) -> str:
    """Text in which matplotlib sees no formula."""
    return text.replace("$", r"\$")


def curves(series: Mapping[str, Mapping[float, float]], label: str) -> str:
    """One line per series {epoch: value}, as SVG."""
    figure, axes = _figure(5.2, 3.0)
    for name, values in series.items():
        axes.plot(list(values), list(values.values()), label=_plain(name), marker="." if len(values) < 40 else "")
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend()
    return _svg(figure)


def lines(x: Sequence[float], series: Mapping[str, Sequence[float]], across: str, label: str) -> str:
    """One line per series over x, as SVG."""
    figure, axes = _figure(6.4, 3.6)
    for name, values in series.items():
        axes.plot(x, values, label=_plain(name), marker=".")
    axes.set_xlabel(across)
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend()
    return _svg(figure)


def bars(names: Sequence[str], values: Sequence[float], errors: Sequence[float], label: str) -> str:
    """Horizontal bars with deviations, as SVG; values in per cent."""
    figure, axes = _figure(6.4, 0.7 + 0.36 * len(names))
    axes.barh([_plain(name) for name in names], values, xerr=errors, color="#4477aa", ecolor="#222222")
    axes.invert_yaxis()
    axes.set_xlabel(label)
    for index, value in enumerate(values):
        axes.text(value / 2, index, f"{value:.1f}", color="white", va="center", ha="center")
    return _svg(figure)


def confusion(matrix: np.ndarray, classes: Sequence[str]) -> str:
    """Confusion matrix [C, C] (rows true) as SVG, each row scaled to its sum; names up to 40 classes.

    Up to 15 classes also numbers: counts, or per cent of the row where these are long.
    """
    figure, axes = _figure(*(2 * [min(8.0, 3.0 + 0.25 * len(classes))]))
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, shrink=0.7)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(classes) <= 40:
        names = [_plain(name) for name in classes]
        axes.set_xticks(range(len(classes)), names, rotation=90)
        axes.set_yticks(range(len(classes)), names)
    if len(classes) <= 15:
        for (row, column), value in np.ndenumerate(matrix):
            text = int(value) if matrix.max() < 10_000 else f"{100 * share[row, column]:.0f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=7,
                      color="white" if share[row, column] > 0.5 else "black")
    return _svg(figure)


def picture(image: Any, side: int = 96) -> str:
    """A PIL image as an inline PNG tag `side` pixels wide at most."""
    image = image.copy()
    image.thumbnail((side, side))
    data = io.BytesIO()
    image.save(data, format="PNG")
    encoded = base64.b64encode(data.getvalue()).decode()
    return f'<img width="{side}" alt="" src="data:image/png;base64,{encoded}">'
