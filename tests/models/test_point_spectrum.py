"""The spectra of clouds: what must hold for any of them, and what the released code does otherwise."""

from __future__ import annotations

import copy
import gc
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionpeft.models import point_spectrum
from visionpeft.models.point_ops import PointError, take
from visionpeft.models.point_spectrum import Spectra, spectrum

some = settings(max_examples=20, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)
sizes = st.integers(2, 40)


def cloud(seed: int, batch: int, count: int) -> torch.Tensor:
    return torch.randn(batch, count, 3, generator=torch.Generator().manual_seed(seed))


def loop_laplacian(points: np.ndarray) -> np.ndarray:
    """From the definition, in float64, over pairs of distinct points."""
    n = len(points)
    distance = np.array([[np.sqrt(((a - b) ** 2).sum()) for b in points] for a in points])
    least = min((distance[i, j] for i in range(n) for j in range(n) if i != j), default=1.0)
    w = np.array([[1.0 if i == j else least / distance[i, j] for j in range(n)] for i in range(n)])
    d = w.sum(1)
    return np.array([[(i == j) - w[i, j] / np.sqrt(d[i] * d[j]) for j in range(n)] for i in range(n)])


@some
@given(seeds, sizes)
def test_laplacian_and_eigenvalues_by_definition(seed, count):
    points = cloud(seed, 2, count).double()
    found = point_spectrum.laplacian(points)
    values, vectors = point_spectrum.canonical_basis(points)
    for b in range(2):
        expected = loop_laplacian(points[b].numpy())
        np.testing.assert_allclose(found[b].numpy(), expected, atol=1e-12)
        np.testing.assert_allclose(values[b].numpy(), np.linalg.eigvalsh(expected), atol=2e-8)
        np.testing.assert_allclose(expected @ vectors[b].numpy(), vectors[b].numpy() * values[b].numpy(), atol=2e-8)
    assert values[:, 0].abs().max() < 1e-7 and values.max() < 2
    eye = torch.eye(count, dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(vectors.mT @ vectors, eye, atol=1e-12, rtol=0)


@some
@given(seeds, sizes)
def test_a_cloud_has_its_spectrum_whatever_the_batch(seed, count):
    points = cloud(seed, 4, count) * torch.tensor([1, 10, 0.1, 3])[:, None, None]
    whole = spectrum(points, local=count)
    for b in range(4):
        for found, alone in zip(whole, spectrum(points[b : b + 1], local=count), strict=True):
            torch.testing.assert_close(found[b], alone[0], atol=1e-6, rtol=0)


def rows_of(s: point_spectrum.Spectrum) -> torch.Tensor:
    """The local vectors of each centre, in the order of the centres (B, G, k)."""
    return take(s.parts.flatten(1, 2), s.back)


@some
@given(seeds, st.sampled_from([(8, 4), (24, 8), (32, 32)]), st.integers(0, 99))
def test_tokens_in_another_order_have_the_same_vectors(seed, size, shuffle):
    count, local = size
    points = cloud(seed, 2, count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(shuffle))
    one, two = spectrum(points, local), spectrum(points[:, order], local)
    torch.testing.assert_close(two.whole, one.whole[:, order], atol=1e-5, rtol=0)
    torch.testing.assert_close(rows_of(two), rows_of(one)[:, order], atol=1e-5, rtol=0)


@some
@given(seeds, sizes, st.integers(0, 99))
def test_the_sign_that_eigh_happens_to_give_has_no_part(seed, count, draw):
    points = cloud(seed, 2, count).double()
    flips = torch.where(torch.rand(2, 1, count, generator=torch.Generator().manual_seed(draw)) < 0.5, -1.0, 1.0)
    before = point_spectrum.canonical_basis(points)[1]
    real = torch.linalg.eigh
    try:
        torch.linalg.eigh = lambda m: (real(m)[0], real(m)[1] * flips)
        after = point_spectrum.canonical_basis(points)[1]
    finally:
        torch.linalg.eigh = real
    assert torch.equal(before, after)


CORNERS = torch.tensor([[x, y, z] for x in (-1.0, 1) for y in (-1.0, 1) for z in (-1.0, 1)])[None]


def test_equal_eigenvalues_have_vectors_of_their_own():
    """A cube's eigenvalues come in threes: any rotation among them would do, and rounding would choose one."""
    values, vectors = point_spectrum.canonical_basis(CORNERS.double())
    assert (values.diff() < 1e-7).sum() == 4
    real = torch.linalg.eigh
    generator = torch.Generator().manual_seed(0)
    try:
        torch.linalg.eigh = lambda m: real(m + 1e-16 * torch.randn(m.shape, generator=generator, dtype=m.dtype))
        again = point_spectrum.canonical_basis(CORNERS.double())[1]
    finally:
        torch.linalg.eigh = real
    torch.testing.assert_close(again, vectors, atol=1e-5, rtol=0)
    order = torch.tensor([3, 1, 7, 0, 6, 2, 5, 4])
    shuffled = point_spectrum.canonical_basis(CORNERS[:, order].double())[1]
    torch.testing.assert_close(shuffled, vectors[:, order], atol=1e-5, rtol=0)


@pytest.mark.parametrize("points", [
    torch.zeros(1, 8, 3), CORNERS[:, [0, 0, 1, 1, 2, 2, 3, 3]], CORNERS + 1e-9 * cloud(0, 1, 8), CORNERS * 1e6,
    torch.cat([CORNERS[:, :7], CORNERS[:, :1] + 1e-7], 1),
], ids=["all-equal", "pairs", "grid", "large", "almost-a-pair"])  # fmt: skip
def test_centres_upon_one_another_are_safe(points):
    s = spectrum(points, local=4)
    eye = torch.eye(8).expand(1, -1, -1)
    torch.testing.assert_close(s.whole.mT @ s.whole, eye, atol=1e-5, rtol=0)
    assert s.values.isfinite().all() and s.values.abs().min() < 1e-6 and s.parts.isfinite().all()


@some
@given(seeds, sizes, st.integers(1, 40), st.sampled_from([0.0, 1e-12, 1e-7, 1e-4]))
def test_any_number_of_centres_may_share_their_places(seed, count, places, apart):
    """The basis stays one, and belongs to the Laplacian of its cloud."""
    points = cloud(seed, 2, count)[:, torch.arange(count) % min(places, count)] + apart * cloud(seed + 1, 2, count)
    s, wide = spectrum(points, local=count), points.double()
    eye = torch.eye(count).expand(2, -1, -1)
    torch.testing.assert_close(s.whole.mT @ s.whole, eye, atol=1e-5, rtol=0)
    whole = s.whole.double() @ torch.diag_embed(s.values.double()) @ s.whole.mT.double()
    torch.testing.assert_close(whole, point_spectrum.laplacian(wide), atol=1e-5, rtol=0)
    assert s.values[:, 0].abs().max() < 1e-6


def loop_morton(steps: np.ndarray) -> list[int]:
    codes = []
    for x, y, z in steps.tolist():
        bits = "".join(f"{y >> b & 1}{x >> b & 1}{z >> b & 1}" for b in reversed(range(20)))
        codes.append(int(bits, 2))
    return codes


@some
@given(seeds, sizes)
def test_morton_order_by_interleaved_bits(seed, count):
    points = cloud(seed, 1, count).double()
    coarse = np.floor((points[0] - points[0].amin(0)).numpy() * 100).astype(int)
    order = point_spectrum.morton_code(points).argsort(1)[0]
    codes = [loop_morton(coarse)[i] for i in order]
    assert codes == sorted(codes)  # finer steps settle ties and change nothing else
    s = spectrum(points, local=count)
    assert torch.equal(s.order.gather(1, s.back), torch.arange(count)[None])


def test_legacy_codes_wrap_and_depend_on_the_origin():
    points = torch.tensor([[[-0.01, 0.0, 0.0], [0.02, 0.0, 0.0], [0.0, 0.05, 0.0]]])
    assert point_spectrum.legacy_code(points).argsort(1).tolist() == [[1, 2, 0]]
    assert point_spectrum.morton_code(points).argsort(1).tolist() == [[0, 1, 2]]


def test_the_released_basis_is_reproduced_with_its_defects():
    points = cloud(0, 3, 64)
    distances = torch.cdist(points, points)
    assert distances.diagonal(dim1=1, dim2=2).max() > 0  # the noise that becomes the smallest distance
    least = distances[distances > 0].min()
    w = 1 / (distances / least + torch.eye(64))
    d = w.sum(-1) + 1e-6
    laplacian = torch.eye(64) - w / (d[:, :, None] * d[:, None, :]).sqrt()
    s = spectrum(points, local=32, legacy=True)
    torch.testing.assert_close(s.values, torch.linalg.eigvalsh(laplacian), atol=1e-5, rtol=0)
    # The spectrum has collapsed, and a smaller cloud in the batch changes that of the others.
    assert s.values.max() < 0.5 < spectrum(points).values.max()
    smaller = torch.cat([points[:1], points[1:] * 0.01])
    assert not torch.allclose(spectrum(smaller, legacy=True).values[0], s.values[0], atol=1e-4)


def test_spectra_are_computed_once_for_a_tensor(monkeypatch):
    calls = []
    real = point_spectrum.spectrum
    monkeypatch.setattr(point_spectrum, "spectrum", lambda *a: calls.append(1) or real(*a))
    spectra, one, two = Spectra(4, False), cloud(0, 1, 8), cloud(1, 1, 8)
    first = spectra(one)
    assert spectra(one) is first and len(calls) == 1
    assert not torch.equal(spectra(two).whole, first.whole) and len(calls) == 2
    assert torch.equal(spectra(one).whole, first.whole) and len(calls) == 3
    for other in (copy.deepcopy(spectra), pickle.loads(pickle.dumps(spectra))):
        assert (other.local, other.legacy, other._value) == (4, False, None)
    del one
    gc.collect()
    assert spectra._value is None


def test_groups_that_do_not_come_out_even_are_refused():
    with pytest.raises(PointError, match="48 centres do not divide into groups of 32"):
        spectrum(cloud(0, 1, 48))
