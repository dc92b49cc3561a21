"""Parameters of the methods for point clouds as their papers count them: on Point-MAE with 15 or 40 classes."""

from __future__ import annotations

import pytest
import torch

import visionpeft as vp
from visionpeft.methods import DAPT, IDPT, PPT, PointGST, PointPEFT
from visionpeft.models.point_transformer import create


def count(name: str, method: object, classes: int = 15) -> tuple[int, int]:
    """Of the method alone, and with the classifier."""
    with torch.device("meta"):
        tuner = vp.attach(create(name, classes), method, train="head")
    return tuner.num_parameters, sum(p.numel() for p in tuner.parameters())


TOKENS = 2 * 384
COLUMNS = 256 * 384  # of a classifier of three features beside that of two


@pytest.mark.parametrize(("method", "classes", "own", "whole"), [
    (PointGST(), 15, 12 * 29_544 + TOKENS, 622_831),
    (PointGST(), 40, 12 * 29_544 + TOKENS, 629_256),
    (IDPT(), 15, 1_330_176 + TOKENS + COLUMNS, 1_696_783),
    (DAPT(), 15, 1_087_771 - 267_535, 1_087_771),
    (PPT(), 15, 1_042_191 - 267_535, 1_042_191),
    (PointPEFT(), 15, 633_871 - 267_535, 633_871),
    ("linear", 15, 0, 267_535),
    ("full", 15, 22_093_327, 22_093_327),
    ("vpt", 15, 12 * 10 * 384, 12 * 10 * 384 + 267_535),
    ("lora", 15, 12 * 2 * 8 * 2 * 384, 12 * 2 * 8 * 2 * 384 + 267_535),
])  # fmt: skip
def test_on_point_mae(method, classes, own, whole):
    assert count("point_mae", method, classes) == (own, whole)


def test_on_pointgpt_l():
    own, whole = count("pointgpt_l", PointGST())
    assert (own - 2 * 1024, whole - 2 * 1024) == (1_830_336, 2_425_551)
