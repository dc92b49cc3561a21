r"""Hydra (Kim et al. 2023, arXiv 2309.06922; official code extremebird/Hydra).

    y = f(x) + s (P(x) + S(f(x)))     on attention output and second MLP layer, f the frozen Linear

P and S are low-rank maps Up dropout(Down x + b_down) + b_up without non-linearity, one beside f, one behind it. Down
(rank, in) is drawn, Up (out, rank) and the biases are zero: identity at the start. Merges exactly,

    W' = W + s (P + S W),   b' = b + s (b_P + S b + b_S),   b_P = Up b_down + b_up, and b_S likewise,

in attention and MLP alike (the official code takes the MLP's weights for both); refused where there is no bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionpeft import lowrank
from visionpeft.adapter import Adapter, Forgiving, Method, factory
from visionpeft.methods.roles import there
from visionpeft.sites import Backbone, Site


@dataclass(frozen=True)
class Hydra(Method):
    """
    Attributes:
        rank: of both branches.
        scale: s, searched among 0.1 to 4.5 for each task in the paper.
        dropout: probability, between Down and Up; 0 to 0.2 in the paper.
    """

    key: ClassVar[str] = "hydra"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    rank: int = 2
    scale: float = 1.0
    dropout: float = 0.0

    def default_targets(self, backbone: Backbone) -> str:
        return there(self, backbone, "attn_out mlp_out")

    def build(self, site: Site, module: nn.Module) -> Adapter:
        return HydraAdapter(self, *site.shape, **factory(module))


class HydraAdapter(Adapter):
    """parallel: the map of x, sequential: that of f(x)."""

    def __init__(self, method: Hydra, out: int, width: int, **kw: Any) -> None:
        super().__init__()
        self.scale, self.dropout = method.scale, method.dropout
        self.parallel = Pair(method.rank, width, out, **kw)
        self.sequential = Pair(method.rank, out, out, **kw)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        p = 0.0 if not self.training else self.dropout
        return y + self.scale * (self.parallel(x, p, self.route) + self.sequential(y, p, self.route)).to(y.dtype)

    def weight(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        p, s = self.parallel, self.sequential
        wide = w.to(torch.promote_types(w.dtype, s.up_weight.dtype))
        shift = p.shift() + s.shift()
        if b is not None:
            shift = shift + s.up_weight @ (s.down_weight @ b.to(s.down_weight.dtype))
        w = wide + self.scale * (p.up_weight @ p.down_weight + s.up_weight @ (s.down_weight @ wide))
        return w, self.scale * shift if b is None else b + self.scale * shift


class Pair(Forgiving):
    """down_weight (rank, in), down_bias (rank), up_weight (out, rank), up_bias (out)."""

    def __init__(self, rank: int, width: int, out: int, **kw: Any) -> None:
        super().__init__()
        self.down_weight = nn.Parameter(torch.empty(rank, width, **kw))
        self.down_bias = nn.Parameter(torch.zeros(rank, **kw))
        self.up_weight = nn.Parameter(torch.zeros(out, rank, **kw))
        self.up_bias = nn.Parameter(torch.zeros(out, **kw))
        nn.init.xavier_uniform_(self.down_weight)

    def shift(self) -> Tensor:
        """What it gives for zero."""
        return self.up_weight @ self.down_bias + self.up_bias

    def forward(self, x: Tensor, dropout: float, route: str) -> Tensor:
        h = lowrank.linear(x, self.down_weight.to(x.dtype), self.down_bias.to(x.dtype), [], route=route)
        h = F.dropout(h, dropout)
        return F.linear(h, self.up_weight.to(h.dtype), self.up_bias.to(h.dtype))
