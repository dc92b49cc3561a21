r"""Rein (Wei et al. 2024, arXiv 2312.04265; official code w1oves/Rein).

Behind every block, on the patch tokens f (B, N, D) or the places of a map; class token and registers are left alone:

    T = A B,  A (tokens, rank), B (rank, D)       att = softmax(f T^T / sqrt(D))
    f + s * M_d(att[:, 1:] M_T(T[1:]) + f)        M_T and M_d are Linears D -> D

A and B are each block's own; M_T, M_d and the scale s, which starts at 0.001, are one for all blocks of a width: of a
ViT's, or of a stage's of a hierarchy. Blocks of plain ViTs and of timm's EVA, BEiT, SAM, ConvNeXt, Swin, SwinV2 and
Hiera are known (the official code has DINOv2, CLIP, EVA, ConvNeXt and ResNet); others are refused by name. Near the
identity at the start. The official code has besides a link from the tokens to the queries of a Mask2Former decoder
(459,264 of its 2,990,081 numbers on ViT-L); without such a decoder it would be dead, and is not here. Made for dense
prediction: a classifier that reads the class token does not see what happens behind the last block. Does not merge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionpeft import backbones
from visionpeft.adapter import Adapter, Method, Shared, factory
from visionpeft.errors import SiteError
from visionpeft.sites import Backbone, Site


@dataclass(frozen=True)
class Rein(Method):
    """
    Attributes:
        tokens: length of T.
        rank: of its factors.
    """

    key: ClassVar[str] = "rein"
    kinds: ClassVar[frozenset[str]] = frozenset({"block", "stage"})

    tokens: int = 100
    rank: int = 16

    def default_targets(self, backbone: Backbone) -> str:
        known = {site.kind for site in backbone.sites() if site.role in ("block", "map", "grid")}
        if not known:
            raise SiteError("Rein acts behind blocks that give tokens or a map: there is none here that it knows")
        return "block" if "block" in known else "stage"

    def refuses(self, site: Site, module: nn.Module) -> str | None:
        wrong = site.kind == "stage" and site.role not in ("map", "grid")
        return "it is no block" if wrong else super().refuses(site, module)

    def adapters(self, sites: Sequence[Site], backbone: Backbone) -> dict[Site, Adapter]:
        found: dict[Site, Adapter] = {}
        for site in sites:
            component = backbone.split(site.path)[0]
            front = backbones.prefix_tokens(backbone.roots[component])
            if site.kind == "stage":
                front = front or 0  # hierarchies have none
            if front is None:
                raise SiteError(f"Rein at {site}: it is not known how many tokens stand before the patches")
            width, kw = site.shape[0], factory(backbone.module(site.path))
            root = Shared.site(f"maps{width}", component)
            maps: Any = found[root] if root in found else Maps(width, **kw)
            found[root], found[site] = maps, ReinAdapter(self, width, front, site.role == "map", **kw)
            maps.refer(found[site])
        return found


class Maps(Shared):
    """token_weight, delta_weight (D, D), token_bias, delta_bias (D), scale (1)."""

    def __init__(self, width: int, **kw: Any) -> None:
        super().__init__()
        for name in ("token", "delta"):
            for key, value in nn.Linear(width, width, **kw).named_parameters():
                self.register_parameter(f"{name}_{key}", value)
        self.scale = nn.Parameter(torch.full((1,), 0.001, **kw))  # FSDP2 takes no scalars


class ReinAdapter(Adapter):
    """a (tokens, rank), b (rank, D); the first `front` tokens are left alone. A `map` has its D behind the batch."""

    shared: Any

    def __init__(self, method: Rein, width: int, front: int, map: bool, **kw: Any) -> None:
        super().__init__()
        self.front, self.map = front, map
        self.a = nn.Parameter(torch.empty(method.tokens, method.rank, **kw))
        self.b = nn.Parameter(torch.empty(method.rank, width, **kw))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for factor in (self.a, self.b):
            nn.init.xavier_uniform_(factor)

    def after(self, y: Tensor) -> Tensor:
        if self.map:
            return self.refined(y.movedim(1, -1)).movedim(-1, 1)
        return torch.cat([y[:, : self.front], self.refined(y[:, self.front :])], 1) if self.front else self.refined(y)

    def refined(self, f: Tensor) -> Tensor:
        """f (B, ..., D) -> the same."""
        m, dtype = self.shared, f.dtype
        tokens = (self.a @ self.b).to(dtype)
        attention = (f @ tokens.t() / math.sqrt(f.shape[-1])).softmax(-1)
        values = F.linear(tokens[1:], m.token_weight.to(dtype), m.token_bias.to(dtype))
        mixed = attention[..., 1:].to(values.dtype) @ values + f
        delta = F.linear(mixed, m.delta_weight.to(mixed.dtype), m.delta_bias.to(mixed.dtype))
        return f + m.scale.to(dtype) * delta.to(dtype)
