r"""FacT, factor-tuning (Jie and Deng 2023, arXiv 2212.03145; official code JieShibo/PETL-ViT).

The deltas of all weights of a network are one tensor, kept as factors. A weight is cut into tiles D x D (one for query,
key, value and attention output, four for each layer of an MLP of ratio 4); the delta of a tile is

    dW = s V S U,   U (r, D) and V (D, r) one pair for the whole network

    FacTTT   S (r, r) of every tile learnt by itself: tensor train, 2 D r + 12 L r^2 numbers for L blocks
    FacTTK   S_j = sum_k C[:, :, k] P[k, j], core C (r, r, r) shared too, P (r, tiles): Tucker, 2 D r + r^3 + 12 L r;
             transposed on the second layer of an MLP

U is drawn, V is zero: identity at the start. Where widths differ (Swin, ConvNeXt, two towers) all weights of one width
share their factors. Every side must be a multiple of the other: gated MLPs of other ratios are refused by name. The
official Tucker code permutes the tiles of the first MLP layer; here they stay in order. Merges exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionpeft import lowrank
from visionpeft.adapter import Adapter, Method, Shared, factory
from visionpeft.methods.roles import there
from visionpeft.sites import Backbone, Site


@dataclass(frozen=True)
class FacT(Method):
    """What the two have in common.

    Attributes:
        rank: r, at most the width.
        scale: s, searched among 0.01 to 100 for each task in the paper.
        dropout: probability, between S and V.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    rank: int = 16
    scale: float = 1.0
    dropout: float = 0.1

    def default_targets(self, backbone: Backbone) -> str:
        """Query, key, value, attention output and both MLP layers, those of them that there are."""
        return there(self, backbone, "query key value attn_out mlp_in mlp_out")

    def refuses(self, site: Site, module: nn.Module) -> str | None:
        if (reason := super().refuses(site, module)) is not None:
            return reason
        if max(site.shape) % min(site.shape):
            return "it is not made of square tiles: leave it out of targets"
        return f"rank {self.rank} is above the width {min(site.shape)}" if self.rank > min(site.shape) else None

    def adapters(self, sites: Sequence[Site], backbone: Backbone) -> dict[Site, Adapter]:
        groups: dict[tuple[str, int], list[Site]] = {}
        for site in sites:
            groups.setdefault((backbone.split(site.path)[0], min(site.shape)), []).append(site)
        found: dict[Site, Adapter] = {}
        for (component, width), members in groups.items():
            kw = factory(backbone.module(members[0].path))
            tiles = [max(site.shape) // width for site in members]  # of each weight
            factors = self.factors(width, **kw)
            found[Shared.site(f"factors{width}", component)] = factors
            for site in members:
                found[site] = self.tiles(site, sum(tiles), **kw)
                factors.refer(found[site])
        return found

    def factors(self, width: int, **kw: Any) -> Factors:
        return Factors(self.rank, width, **kw)

    def tiles(self, site: Site, total: int, **kw: Any) -> Tiles:
        """The adapter of one weight; `total` is the number of tiles that share the factors."""
        raise NotImplementedError


@dataclass(frozen=True)
class FacTTT(FacT):
    key: ClassVar[str] = "fact_tt"

    def tiles(self, site: Site, total: int, **kw: Any) -> Tiles:
        return TrainTiles(self, site.shape, **kw)


@dataclass(frozen=True)
class FacTTK(FacT):
    key: ClassVar[str] = "fact_tk"

    def factors(self, width: int, **kw: Any) -> Factors:
        return TuckerFactors(self.rank, width, **kw)

    def tiles(self, site: Site, total: int, **kw: Any) -> Tiles:
        return TuckerTiles(self, site.shape, total, **kw)


class Factors(Shared):
    """u (r, D), v (D, r)."""

    def __init__(self, rank: int, width: int, **kw: Any) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.empty(rank, width, **kw))
        self.v = nn.Parameter(torch.empty(width, rank, **kw))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.u, a=math.sqrt(5))
        nn.init.zeros_(self.v)


class TuckerFactors(Factors):
    """Besides, core (r, r, r)."""

    def __init__(self, rank: int, width: int, **kw: Any) -> None:
        super().__init__(rank, width, **kw)
        self.core = nn.Parameter(torch.empty(rank, rank, rank, **kw))
        nn.init.xavier_uniform_(self.core)


class Tiles(Adapter):
    """The adapter of a weight of m x n tiles, of which m or n is 1."""

    shared: Any

    def __init__(self, method: FacT, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.scale, self.dropout, self.rank = method.scale, method.dropout, method.rank
        self.tall, self.wide = shape[0] // min(shape), shape[1] // min(shape)

    def s(self) -> Tensor:
        """S of all tiles, (m r, n r)."""
        raise NotImplementedError

    def low_rank(self) -> tuple[Tensor, Tensor, float] | None:
        if self.training and self.dropout:
            return None  # the paper drops entries behind S, not of the input
        return self._pair()

    def _pair(self) -> tuple[Tensor, Tensor, float]:
        u, v, s = self.shared.u, self.shared.v, self.s()
        if self.wide == 1:
            return u, (v @ s.unflatten(0, (self.tall, self.rank))).flatten(0, 1), self.scale
        a = (s.unflatten(1, (self.wide, self.rank)).transpose(0, 1) @ u).transpose(0, 1).flatten(1)
        return a, v, self.scale

    def weight(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        a, up, scale = self._pair()
        return w + scale * (up @ a), b

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        pieces = x if self.wide == 1 else x.unflatten(-1, (self.wide, -1))
        h = lowrank.linear(pieces, self.shared.u.to(x.dtype), None, [], route=self.route)
        h = h if self.wide == 1 else h.flatten(-2)
        h = F.dropout(F.linear(h, self.s().to(h.dtype)), self.dropout, self.training)
        delta = F.linear(h.unflatten(-1, (self.tall, -1)), self.shared.v.to(h.dtype)).flatten(-2)
        return y + self.scale * delta.to(y.dtype)


class TrainTiles(Tiles):
    """core (m r, n r)."""

    def __init__(self, method: FacT, shape: tuple[int, ...], **kw: Any) -> None:
        super().__init__(method, shape)
        self.core = nn.Parameter(torch.empty(self.tall * self.rank, self.wide * self.rank, **kw))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.core, a=math.sqrt(5))

    def s(self) -> Tensor:
        return self.core


class TuckerTiles(Tiles):
    """p (r, m n): its columns of P."""

    def __init__(self, method: FacT, shape: tuple[int, ...], total: int, **kw: Any) -> None:
        super().__init__(method, shape)
        self.bound = math.sqrt(6 / (self.rank + total))  # Xavier for the whole P
        self.p = nn.Parameter(torch.empty(self.rank, self.tall * self.wide, **kw))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.p, -self.bound, self.bound)

    def s(self) -> Tensor:
        tiles = torch.einsum("abk,kj->jab", self.shared.core, self.p)
        return tiles.flatten(0, 1) if self.wide == 1 else tiles.flatten(0, 1).t()
