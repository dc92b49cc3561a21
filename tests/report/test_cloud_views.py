"""Pictures of clouds: every view shows the nearest point in its colour."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
from PIL import Image

from visionpeft.report.clouds import SIDE, VIEWS, _view, views


def test_the_nearest_point_is_in_front():
    points = np.array([[0, 0, -1], [0, 0, 1], [0.5, 0.5, 0]], float)
    colours = np.array([[1, 1, 1], [2, 2, 2], [3, 3, 3]], np.uint8)
    pixels = _view(points, colours, 0, 0)
    assert set(np.unique(pixels)) == {2, 3, 255} and (pixels == 2).sum() == 4 * 3
    assert set(np.unique(_view(points, colours, 0, 180))) == {1, 3, 255}
    row = np.argwhere(pixels[..., 0] == 3)[0][0]
    assert row < np.argwhere(pixels[..., 0] == 2)[0][0]  # higher up


def test_views_side_by_side_in_the_colours_of_the_values():
    points = np.random.default_rng(0).normal(size=(50, 3))
    found = re.search(r"base64,([^\"]+)", views(points, np.zeros(50)))
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(found[1]))).convert("RGB"))
    assert image.shape == (SIDE, SIDE * len(VIEWS), 3)
    assert len(np.unique(image.reshape(-1, 3), axis=0)) == 2  # one value, one colour, on white
    assert views(points) != views(points, -points[:, 1])
