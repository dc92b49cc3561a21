"""Pages hold what they are given, escaped, and fetch nothing."""

from __future__ import annotations

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
    drawn = [plots.curves({"a": [1.0, 2.0], "b": [2.0, 1.0]}, "loss") for _ in range(2)]
    assert drawn[0] == drawn[1] and "loss" in drawn[0]
