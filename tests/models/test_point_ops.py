"""Sampling and neighbours against loops over single points."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionpeft.models import point_ops
from visionpeft.models.point_ops import PointError

few = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)


def cloud(seed: int, batch: int, count: int, doubled: bool = False) -> torch.Tensor:
    """On a grid, so that squared distances are exact and ties occur; with some points twice."""
    points = torch.randint(-8, 9, (batch, count, 3), generator=torch.Generator().manual_seed(seed)) / 8
    if doubled:
        points[:, count // 2 :] = points[:, : count - count // 2]
    return points


def loop_farthest(points: np.ndarray, count: int) -> list[int]:
    chosen = [0]
    while len(chosen) < count:
        nearest = [min(float(((p - points[c]) ** 2).sum()) for c in chosen) for p in points]
        chosen.append(nearest.index(max(nearest)))
    return chosen


@few
@given(seeds, st.integers(1, 40), st.integers(1, 20), st.booleans())
def test_farthest_points_are_those_of_the_loop(seed, count, wanted, doubled):
    points = cloud(seed, 2, count, doubled)
    found = point_ops.farthest_points(points, wanted)
    assert found.tolist() == [loop_farthest(p.double().numpy(), wanted) for p in points]


def test_too_few_points_repeat_the_first():
    found = point_ops.farthest_points(torch.tensor([[[0.0, 0, 0], [1, 0, 0], [3, 0, 0]]]), 6)
    assert found.tolist() == [[0, 2, 1, 0, 0, 0]]


@few
@given(seeds, st.integers(1, 30), st.integers(1, 12))
def test_nearest_points_are_the_nearest(seed, count, k):
    points, centres = cloud(seed, 2, count), cloud(seed + 1, 2, 5)
    found = point_ops.nearest_points(centres, points, k)
    assert found.shape == (2, 5, k)
    for b in range(2):
        for m in range(5):
            distances = ((points[b] - centres[b, m]) ** 2).sum(-1).double().numpy()
            own = min(k, count)
            assert distances[found[b, m, :own].numpy()].tolist() == sorted(distances)[:own]
            assert len(set(found[b, m, :own].tolist())) == own
            assert found[b, m].tolist() == [found[b, m, i % own].item() for i in range(k)]


def test_groups_are_relative_to_their_centres():
    points = cloud(3, 2, 50)
    around, centres = point_ops.group(points, 4, 6)
    index = point_ops.farthest_points(points, 4)
    near = point_ops.nearest_points(centres, points, 6)
    for b in range(2):
        assert torch.equal(centres[b], points[b][index[b]])
        assert torch.equal(around[b], points[b][near[b]] - points[b][index[b]][:, None])


def test_interpolation_and_chamfer_by_their_formulas():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, n, 3, generator=g, dtype=torch.float64) for n in (7, 5))
    features = torch.randn(2, 5, 4, generator=g, dtype=torch.float64)
    distances = torch.stack([torch.stack([((p - q) ** 2).sum() for p in a[i] for q in b[i]]) for i in range(2)])
    distances = distances.view(2, 7, 5)
    expected = distances.min(2).values.mean(1) + distances.min(1).values.mean(1)
    torch.testing.assert_close(point_ops.chamfer(a, b), expected, rtol=1e-12, atol=0)
    out = point_ops.interpolate(a, b, features)
    for i in range(2):
        for n in range(7):
            near = sorted(range(5), key=lambda m: distances[i, n, m])[:3]  # noqa: B023
            weights = np.array([1 / (distances[i, n, m].item() + 1e-8) for m in near])
            value = sum(w * features[i, m].numpy() for w, m in zip(weights / weights.sum(), near, strict=True))
            np.testing.assert_allclose(out[i, n].numpy(), value, rtol=1e-12)


def test_order_of_distances_survives_large_coordinates():
    """`torch.cdist` loses it beyond 25 points: here neighbours a thousandth apart at a distance of a thousand."""
    line = torch.zeros(1, 64, 3)
    line[0, :, 0] = 1000 + torch.arange(64) / 1024
    assert point_ops.nearest_points(line, line, 1)[0, :, 0].tolist() == list(range(64))


@pytest.mark.parametrize(("points", "words"), [
    (torch.zeros(2, 5, 6), "columns x y z"),
    (torch.zeros(5, 3), "batch, points, 3"),
    (torch.zeros(2, 0, 3), "no points"),
    (torch.tensor([[[0.0, 0, 0]], [[0, torch.nan, 0]]]), "cloud 1"),
    (torch.tensor([[[torch.inf, 0, 0]]]), "cloud 0"),
])  # fmt: skip
def test_clouds_that_cannot_be_used_are_refused(points, words):
    with pytest.raises(PointError, match=words):
        point_ops.check_cloud(points)


def test_torch_fps_is_asked_on_a_gpu_where_it_is_installed(monkeypatch):
    asked = []

    def sample(points, mask, k, *, start_idx, validate, assume_finite):
        asked.append((tuple(points.shape), k, start_idx.tolist(), validate, assume_finite))
        assert mask.dtype == torch.bool and mask.shape == points.shape[:2] and mask.all()
        return torch.full((len(points), k), 7)

    points = torch.randn(2, 9, 3)
    own = point_ops.farthest_points(points, 4)
    monkeypatch.setitem(sys.modules, "torch_fps", types.SimpleNamespace(farthest_point_sampling=sample))
    point_ops._torch_fps.cache_clear()
    assert torch.equal(point_ops.farthest_points(points, 4), own) and not asked  # a CPU would have to compile it
    monkeypatch.setattr(point_ops, "_on_gpu", lambda points: True)
    assert point_ops.farthest_points(points, 4).tolist() == [[7] * 4] * 2
    assert asked == [((2, 9, 3), 4, [0, 0], False, True)]
    monkeypatch.setitem(sys.modules, "torch_fps", None)
    point_ops._torch_fps.cache_clear()
    assert torch.equal(point_ops.farthest_points(points, 4), own)
    point_ops._torch_fps.cache_clear()
