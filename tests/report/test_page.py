"""Pages hold what they are given, escaped, and fetch nothing."""

from __future__ import annotations

import re

import numpy as np
import pytest

from visionpeft.report import page, plots

pytest.importorskip("matplotlib")


def test_names_are_escaped() -> None:
    html = page.page("<b>", [page.table(["<i>"], [["a & b"]]), page.figure("<svg/>", "<u>"), page.heading("<h>")])
    assert all(raw not in html for raw in ("<b>", "<i>", "<u>", "<h>", "a & b"))
    assert "<svg/>" in html and "a &amp; b" in html


@pytest.mark.parametrize("classes", [2, 12, 60])
def test_confusions_of_any_size(classes: int) -> None:
    svg = plots.confusion(np.eye(classes, dtype=int), [f"c{i}" for i in range(classes)])
    assert svg.startswith("<svg") and ("c1<" in svg) == (classes <= 40)


def test_figures_are_the_same_each_time() -> None:
    drawn = [plots.curves({"a": {1: 1.0, 2: 2.0}, "b": {1: 2.0, 2: 1.0}}, "loss") for _ in range(2)]
    assert drawn[0] == drawn[1] and "loss" in drawn[0]


def test_names_are_no_formulas() -> None:
    names = ["$5_$", "a$b"]
    drawn = [plots.confusion(np.eye(2, dtype=int), names), plots.bars(names, [1, 2], [0, 0], "test"),
             plots.curves({name: {1: 1.0} for name in names}, "loss"),
             plots.lines([1, 2], {name: [1.0, 2.0] for name in names}, "x", "y")]
    assert all(">$5_$<" in svg and ">a$b<" in svg for svg in drawn)


def test_curves_stand_at_their_epochs() -> None:
    """Two scores at epochs 3 and 6 of six end where the six end."""
    svg = plots.curves({"train": dict.fromkeys(range(1, 7), 0.0), "test": {3: 1.0, 6: 1.0}}, "accuracy")
    ends = [re.findall(r"[\d.]+ [\d.]+", path)[-1].split()[0] for path in re.findall(r'<path d="(M [^"]+)" clip', svg)]
    assert len(ends) >= 2 and len(set(ends[-2:])) == 1
