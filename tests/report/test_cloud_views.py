"""Pictures of clouds: every view shows the nearest point in its colour."""

from __future__ import annotations

import base64
import io
import re
from types import SimpleNamespace

import numpy as np
from PIL import Image

from visionpeft.report import clouds
from visionpeft.report.clouds import SIDE, VIEWS, _view, graded, palette, views

POINTS = np.random.default_rng(0).normal(size=(50, 3))


def pixels(markup: str) -> np.ndarray:
    found = re.search(r"base64,([^\"]+)", markup)
    assert found is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(found[1]))).convert("RGB"))


def hues(image: np.ndarray) -> set[tuple[int, ...]]:
    return set(map(tuple, image.reshape(-1, 3).tolist())) - {(255, 255, 255)}


def test_the_nearest_point_is_in_front():
    points = np.array([[0, 0, -1], [0, 0, 1], [0.5, 0.5, 0]], float)
    colours = np.array([[1, 1, 1], [2, 2, 2], [3, 3, 3]], np.uint8)
    seen = _view(points, colours, 0, 0)
    assert set(np.unique(seen)) == {2, 3, 255} and (seen == 2).sum() == 4 * 3
    assert set(np.unique(_view(points, colours, 0, 180))) == {1, 3, 255}
    row = np.argwhere(seen[..., 0] == 3)[0][0]
    assert row < np.argwhere(seen[..., 0] == 2)[0][0]  # higher up


def test_views_side_by_side_and_a_row_for_each_colouring():
    two = np.where(POINTS[:, :1] > 0, [[10, 20, 30]], [[40, 50, 60]]).astype(np.uint8)
    image = pixels(views(POINTS, graded(np.zeros(50)), two))
    assert image.shape == (2 * SIDE, SIDE * len(VIEWS), 3)
    assert len(hues(image[:SIDE])) == 1 and hues(image[SIDE:]) == {(10, 20, 30), (40, 50, 60)}
    for k in range(3):
        np.testing.assert_array_equal(image[SIDE:, k * SIDE : (k + 1) * SIDE], _view(POINTS, two, *VIEWS[k]))


def test_values_go_from_dark_to_yellow_and_classes_are_told_apart():
    dark, *_, yellow = graded(np.array([0.0, 0.5, 2.0])).tolist()
    assert sum(dark) < 200 and min(yellow[:2]) > 200 > yellow[2]
    assert len(set(map(tuple, palette(20).tolist()))) == 20 and palette(21)[20].tolist() == palette(1)[0].tolist()


def test_samples_are_in_the_colour_of_what_is_predicted():
    splits = SimpleNamespace(classes=["a", "b<", "c"], test=SimpleNamespace(labels=np.array([0, 1])))
    sections = clouds.predictions(SimpleNamespace(confusion=None), np.array([1, 1]), splits, np.stack([POINTS] * 2))
    figures = [s for s in sections if "<img" in s]
    assert "b&lt;, not a" in figures[0] and "not" not in figures[1] and "b&lt;" in sections[-3]
    assert all(hues(pixels(f)) == {tuple(palette(3)[1].tolist())} for f in figures)
    energy = np.arange(100.0).reshape(2, 50)
    sections = clouds.predictions(SimpleNamespace(confusion=None), np.array([1, 1]), splits, np.stack([POINTS] * 2),
                                  energy)  # fmt: skip
    image = pixels([s for s in sections if "<img" in s][1])
    assert hues(image[SIDE:]) <= set(map(tuple, graded(energy[1]).tolist())) and len(hues(image[SIDE:])) > 20
    assert any("spectral energy" in s for s in sections)


def test_parts_are_coloured_above_as_predicted_and_below_as_they_are():
    whole = np.concatenate([POINTS, np.full((50, 1), 7.0)], 1)[None]
    splits = SimpleNamespace(classes=["mug"], parts=[str(i) for i in range(9)], owned=((5, 7),),
                             test=SimpleNamespace(labels=np.array([0])))  # fmt: skip
    predicted = np.where(np.arange(50) < 30, 5, 7)[None]
    *_, shown = clouds.parts_shown(predicted, splits, whole)
    image, (first, second) = pixels(shown), map(tuple, palette(2).tolist())
    assert hues(image[:SIDE]) == {first, second} and hues(image[SIDE:]) == {second}
    assert "mug: 40.0 % of the points right" in shown
