"""What point networks need besides layers: farthest points, nearest neighbours, groups, Chamfer distance.

Plain torch, vectorised over the batch, the same numbers on every machine up to ties; nothing to compile. Squared
distances are sums of squared differences: `torch.cdist` switches to a matrix product beyond 25 points, whose rounding
is larger than the distances between close points.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from visionpeft.errors import VisionPEFTError


class PointError(VisionPEFTError, ValueError):
    """A point cloud cannot be used as it is."""


def check_cloud(points: Tensor) -> None:
    """Refuse what is no batch of clouds (B, N, 3) of finite numbers.

    Raises:
        PointError: another shape, no points, or NaN or infinity, with the first cloud that has them.
    """
    if points.dim() != 3 or points.shape[-1] != 3:
        raise PointError(f"expected points (batch, points, 3), got {tuple(points.shape)}: keep the columns x y z")
    if points.shape[1] == 0:
        raise PointError("the clouds have no points")
    if points.is_meta or torch.compiler.is_compiling():
        return
    finite = points.isfinite().flatten(1).all(1)
    if not finite.all():
        worst = int((~finite).nonzero()[0])
        raise PointError(f"cloud {worst} of the batch has coordinates that are no finite numbers: drop these points")


def _single(points: Tensor) -> Tensor:
    """In single precision at least: half has no room for squares of small distances."""
    return points.float() if points.dtype in (torch.float16, torch.bfloat16) else points


def square_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared Euclidean distances of a (B, M, 3) and b (B, N, 3): (B, M, N)."""
    parts = [(a[..., i].unsqueeze(-1) - b[..., i].unsqueeze(-2)).square() for i in range(3)]
    return parts[0] + parts[1] + parts[2]


def _on_gpu(points: Tensor) -> bool:
    return points.is_cuda and points.dtype != torch.float64


@lru_cache(maxsize=1)
def _torch_fps() -> Callable[..., Tensor] | None:
    """The sampling of torch-fps, None where it is not installed."""
    try:
        from torch_fps import farthest_point_sampling
    except ModuleNotFoundError:
        return None
    return farthest_point_sampling


@torch.no_grad()
def farthest_points(points: Tensor, count: int) -> Tensor:
    """Farthest point sampling: indices (B, count) into points (B, N, 3), the first being 0.

    Each next point is the farthest from all before it, the first of equals. Where there are fewer distinct points than
    asked for, index 0 repeats at the end.

    On a GPU torch-fps samples where it is installed (in single precision; which of equally far points, and of points
    upon one another, is then its choice). On a CPU it is not asked: it would first have to compile.
    """
    if _on_gpu(points) and not torch.compiler.is_compiling() and (sample := _torch_fps()) is not None:
        start = torch.zeros(len(points), dtype=torch.long, device=points.device)
        known = torch.ones(points.shape[:2], dtype=torch.bool, device=points.device)
        return sample(points, known, count, start_idx=start, validate=False, assume_finite=True)
    x, y, z = _single(points).unbind(-1)
    nearest = torch.full_like(x, torch.inf)
    last = torch.zeros(len(points), 1, dtype=torch.long, device=points.device)
    chosen = [last]
    for _ in range(count - 1):
        parts = [(axis - axis.gather(1, last)).square() for axis in (x, y, z)]
        nearest = torch.minimum(nearest, parts[0] + parts[1] + parts[2])
        last = nearest.argmax(1, keepdim=True)
        chosen.append(last)
    return torch.cat(chosen, 1)


@torch.no_grad()
def nearest_points(centres: Tensor, points: Tensor, k: int) -> Tensor:
    """Indices (B, M, k) of the k nearest of points (B, N, 3) to centres (B, M, 3), nearest first.

    Clouds of fewer than k points are gone through again and again. Which of equally far points comes first is torch's
    choice.
    """
    own = min(k, points.shape[1])
    index = square_distances(centres, points).topk(own, dim=-1, largest=False).indices
    return index if own == k else index[..., torch.arange(k, device=index.device) % own]


def take(values: Tensor, index: Tensor) -> Tensor:
    """Rows of values (B, N, C) at index (B, ...): (B, ..., C)."""
    flat = index.flatten(1).unsqueeze(-1).expand(-1, -1, values.shape[-1])
    return values.gather(1, flat).view(*index.shape, values.shape[-1])


def group(points: Tensor, groups: int, size: int) -> tuple[Tensor, Tensor]:
    """Neighbourhoods (B, groups, size, 3) about farthest-point centres (B, groups, 3), relative to these."""
    centres = take(points, farthest_points(points, groups))
    around = take(points, nearest_points(centres, points, size))
    return around - centres.unsqueeze(2), centres


def interpolate(targets: Tensor, centres: Tensor, features: Tensor, k: int = 3) -> Tensor:
    """Features (B, M, C) of centres (B, M, 3) at targets (B, N, 3): (B, N, C).

    The k nearest centres count, by inverse squared distance.
    """
    distances = square_distances(_single(targets), _single(centres))
    near = distances.topk(min(k, centres.shape[1]), dim=-1, largest=False)
    weights = 1 / (near.values + 1e-8)
    weights = weights / weights.sum(-1, keepdim=True)
    return (take(features, near.indices) * weights.unsqueeze(-1).to(features.dtype)).sum(2)


def chamfer(a: Tensor, b: Tensor) -> Tensor:
    """Chamfer-L2 of a (B, M, 3) and b (B, N, 3) for each cloud (B): mean squared distance to the nearest, both ways."""
    distances = square_distances(a, b)
    return distances.amin(2).mean(1) + distances.amin(1).mean(1)
