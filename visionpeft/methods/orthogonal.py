r"""Orthogonal Adaptation (Po et al. 2023, arXiv 2312.02432): concepts trained apart that add up without a fight.

    W' = W + A B^T,   A (out, rank), B (in, rank)

B holds `rank` columns of one orthogonal matrix O (in, in) that everybody can draw from the same public seed; it is
frozen, and A starts at zero. Two adapters with other columns of O have B_i^T B_j = 0: each leaves what the other
learnt from alone, so that merging is adding. O is the same at all sites of a width. Merges.

Here the columns are `seed * rank` to `(seed + 1) * rank` of O's columns in a public random order, the count going
round: with one rank, in // rank seeds in a row have no column in common. The paper draws columns at random.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visionpeft.adapter import Adapter, Method, factory
from visionpeft.errors import MethodError
from visionpeft.sites import Backbone, Site


@dataclass(frozen=True)
class OrthogonalAdaptation(Method):
    """
    Attributes:
        rank: number of columns of O; at most the width of the input.
        seed: number of the concept, which says what columns it has. Adapters that are to be added need other numbers.
        public: seed of O, the same for all who want to add their adapters.
    """

    key: ClassVar[str] = "orthogonal"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    rank: int = 20
    seed: int = 0
    public: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seed < 0:
            raise MethodError(f"seed={self.seed}: expected the number of the concept, 0 or more")

    def default_targets(self, backbone: Backbone) -> str:
        return "linear"

    def refuses(self, site: Site, module: nn.Module) -> str | None:
        if (reason := super().refuses(site, module)) is not None:
            return reason
        if self.rank > site.shape[1]:
            return f"there are {site.shape[1]} columns to take and not rank {self.rank}"
        return None

    def build(self, site: Site, module: nn.Module) -> Adapter:
        return OrthogonalAdapter(self, site.shape, **factory(module))


class OrthogonalAdapter(Adapter):
    """a (out, rank) learns; b (in, rank), a buffer, is a choice of orthonormal columns."""

    b: Tensor

    def __init__(self, method: OrthogonalAdaptation, shape: tuple[int, ...], **kw: Any) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(shape[0], method.rank, **kw))
        b = torch.empty(shape[1], method.rank, **kw)
        if not b.is_meta:
            b.copy_(columns(shape[1], method.rank, method.seed, method.public))
        self.register_buffer("b", b)

    def low_rank(self) -> tuple[Tensor, Tensor, float]:
        return self.b.t(), self.a, 1.0

    def weight(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return w + self.a @ self.b.t(), b


def columns(width: int, rank: int, seed: int, public: int = 0) -> Tensor:
    """The columns (width, rank) of concept number `seed`, float64."""
    o, order = _orthogonal(width, public)
    return o[:, order[torch.arange(seed * rank, (seed + 1) * rank) % width]]


@functools.lru_cache(maxsize=8)
def _orthogonal(width: int, public: int) -> tuple[Tensor, Tensor]:
    """O (width, width) and the order in which its columns are given out."""
    generator = torch.Generator().manual_seed(public)
    q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign(), torch.randperm(width, generator=generator)
