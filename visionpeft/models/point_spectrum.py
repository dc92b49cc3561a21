r"""Graph spectra of token centres, as PointGST uses them (Liang et al. 2024, arXiv 2410.08114).

Complete graph with W_ij = d_min / d_ij and self-loops of 1, normalised Laplacian L = I - D^-1/2 W D^-1/2, eigenvectors
in ascending order of the eigenvalues: once for all centres, and once for each of the groups of `local` centres that
follow one another along a Morton curve.

The released code differs in ways that change numbers, not ideas; `legacy=True` does as it does:

    distances    torch.cdist, whose diagonal is rounding noise beyond 25 points; that noise becomes d_min
    d_min        over the whole batch, so that a cloud's result depends on the others
    signs        as eigh happens to give them, on each machine others; LayerNorm and SiLU are not odd
    Morton code  negative coordinates wrap
    transform    U x forwards and U^T x back (in the adapter), for eigenvectors in columns the wrong way round

Here: exact distances in double precision, d_min of each graph by itself, a sign for each eigenvector and a tie-break
between equal eigenvalues from the geometry, codes counted from the lowest corner. So the basis belongs to the cloud:
other clouds, the order of the tokens and the machine have no part in it, to rounding. Only centres that lie exactly
upon one another cannot be told apart but by their order.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visionpeft.models.point_ops import PointError, take

TIE = 1e-8
"""How much the geometry adds to the diagonal, so that equal eigenvalues have eigenvectors of their own."""


class Spectrum(NamedTuple):
    """Bases of centres (B, G, 3): `whole` (B, G, G), `parts` (B, G / k, k, k), eigenvectors in columns.

    `order` (B, G) lists the centres along the curve, group after group; `back` is its inverse. `values` (B, G) are the
    eigenvalues of `whole`.
    """

    whole: Tensor
    parts: Tensor
    order: Tensor
    back: Tensor
    values: Tensor


@torch.no_grad()
def spectrum(centres: Tensor, local: int = 32, legacy: bool = False) -> Spectrum:
    """Spectrum of centres (B, G, 3), in their dtype; fewer than `local` centres are one group.

    Raises:
        PointError: the groups do not come out even.
    """
    batch, count, _ = centres.shape
    local = min(local, count)
    if count % local:
        raise PointError(f"{count} centres do not divide into groups of {local}: choose local= among its divisors")
    dtype = centres.dtype if centres.dtype in (torch.float32, torch.float64) else torch.float32
    points = centres.float() if legacy else centres.double()
    order = (legacy_code(points) if legacy else morton_code(points)).argsort(dim=1, stable=True)
    groups = take(points, order).view(-1, local, 3)
    basis = legacy_basis if legacy else canonical_basis
    values, whole = basis(points)
    _, parts = basis(groups)
    parts = parts.view(batch, count // local, local, local)
    return Spectrum(whole.to(dtype), parts.to(dtype), order, order.argsort(1), values.to(dtype))


def canonical_basis(points: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (B, G) and eigenvectors (B, G, G) of the graphs on points (B, G, 3), signs and ties settled."""
    marks = landmarks(points)
    values, vectors = torch.linalg.eigh(laplacian(points) + TIE * torch.diag_embed(marks))
    lean = (vectors * marks.unsqueeze(-1)).sum(1, keepdim=True)
    return values, vectors * torch.where(lean < 0, -1.0, 1.0)


def laplacian(points: Tensor) -> Tensor:
    """Normalised Laplacian (B, G, G) of the complete graph; eigenvalues from 0 to about 1.

    Points upon one another, or as good as, count as neighbours at the smallest distance.
    """
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    apart = distances > 1e-6 * distances.amax((1, 2), keepdim=True)
    least = distances.masked_fill(~apart, torch.inf).amin((1, 2), keepdim=True)
    least = torch.where(least.isinf(), 1.0, least)
    weights = least / torch.maximum(distances, least)
    eye = torch.eye(points.shape[1], dtype=points.dtype, device=points.device)
    roots = weights.sum(-1).rsqrt()
    return eye - roots.unsqueeze(-1) * weights * roots.unsqueeze(-2)


def landmarks(points: Tensor) -> Tensor:
    """A number between -1 and 1 for each point (B, G), a function of its place in its cloud without any symmetry."""
    centred = points - points.mean(1, keepdim=True)
    size = centred.square().sum(-1).mean(-1).sqrt().clamp_min(1e-12)
    waves = centred / size[:, None, None] * points.new_tensor([1.0, 2.3, 3.7])
    return (waves.sum(-1) + 0.5).sin()


def _spread(x: Tensor, bits: int) -> Tensor:
    """Every bit of x moved to three times its place."""
    code = torch.zeros_like(x)
    for bit in range(bits):
        code = code | ((x >> bit & 1) << 3 * bit)
    return code


def _interleave(steps: Tensor, bits: int) -> Tensor:
    """Codes (B, G) of integer coordinates (B, G, 3); y counts most, then x, then z, as in the released code."""
    x, y, z = (_spread(axis, bits) for axis in steps.unbind(-1))
    return y << 2 | x << 1 | z


def morton_code(points: Tensor) -> Tensor:
    """Morton codes (B, G) of 100 * points, counted from the lowest corner and as fine as 20 bits an axis allow.

    Finer than whole steps by a power of two, which keeps their order and settles it within a step.
    """
    lowest = points.amin(1, keepdim=True)
    extent = (points - lowest).amax((1, 2), keepdim=True).clamp_min(1e-12)
    scale = 100 * torch.exp2(torch.floor(torch.log2((2**20 - 1) / (100 * extent))))
    return _interleave(((points - lowest) * scale).long(), 20)


def legacy_code(points: Tensor) -> Tensor:
    """Codes of 100 * points cut to integers, 16 bits of their two's complement an axis."""
    return _interleave((100 * points).long() & 0xFFFF, 16)


def legacy_basis(points: Tensor) -> tuple[Tensor, Tensor]:
    """The released basis: distances with their noise, the smallest of the whole batch, signs as they come."""
    distances = torch.cdist(points, points)
    least = torch.where(distances == 0, 10.0, distances).min()
    eye = torch.eye(points.shape[1], dtype=points.dtype, device=points.device)
    weights = 1 / (distances / least + eye)
    roots = (weights.sum(-1) + 1e-6).rsqrt()
    values, vectors = torch.linalg.eigh(eye - roots.unsqueeze(-1) * weights * roots.unsqueeze(-2))
    return values, vectors


class Spectra:
    """Spectra, computed once for the centres of a forward and shared by all blocks that are given the same tensor.

    It goes by the tensor itself, so that a recomputed block (checkpointing) gets the spectrum of its own forward. With
    `keep` it also keeps the spectra of so many clouds, the last that were used, by the bits of their centres: a cloud
    that comes again is not decomposed again, and gets the same bits. Not in legacy, where they depend on the batch.
    """

    def __init__(self, local: int, legacy: bool, keep: int = 0) -> None:
        self.local, self.legacy, self.keep = local, legacy, keep
        self._source: Any = None
        self._value: Spectrum | None = None
        self._kept: dict[bytes, tuple[Tensor, ...]] = {}

    def __reduce__(self) -> Any:
        return Spectra, (self.local, self.legacy, self.keep)

    def __call__(self, centres: Tensor) -> Spectrum:
        if torch.compiler.is_compiling():  # the compiler merges equal parts by itself
            return spectrum(centres, self.local, self.legacy)
        if self._value is None or self._source() is not centres:
            self._value = self._remembered(centres) if self.keep else spectrum(centres, self.local, self.legacy)
            self._source = weakref.ref(centres, self._forget)
        return self._value

    def _remembered(self, centres: Tensor) -> Spectrum:
        keys = [row.numpy().tobytes() for row in centres.detach().cpu().contiguous().view(torch.uint8)]
        new = {key: i for i, key in enumerate(keys) if key not in self._kept}
        if new:
            found = spectrum(centres[list(new.values())], self.local, self.legacy)
            self._kept |= {key: tuple(part[i].clone() for part in found) for i, key in enumerate(new)}
        rows = [self._kept[key] for key in keys]
        self._kept |= {key: self._kept.pop(key) for key in keys if key in self._kept}  # the last used at the end
        for key in list(self._kept)[: -self.keep]:
            del self._kept[key]
        return Spectrum(*(torch.stack(parts) for parts in zip(*rows, strict=True)))

    def _forget(self, source: Any) -> None:
        if self._source is source:
            self._value = None
