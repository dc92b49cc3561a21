r"""RepAdapter (Luo et al. 2023, arXiv 2302.08106; official code luogen1996/RepAdapter).

    y = W z + b,   z = u + s (B dropout(A u + b_A) + b_B)     in front of qkv and of the first MLP layer

A (hidden, D) is drawn, B (D, hidden) is block-diagonal of `groups` blocks and zero: identity at the start. No
non-linearity, so that it merges exactly: W' = W + s W B A, b' = b + s W (B b_A + b_B). It acts on what the whole Linear
is given, adapters before it included; rows of one, and attention that reads its weights itself (nn.MultiheadAttention),
are refused by name. Merging is refused where the Linear has no bias. The published 0.22M leaves out the biases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionpeft import lowrank
from visionpeft.adapter import Adapter, Method, factory
from visionpeft.binding import base_class
from visionpeft.errors import MethodError
from visionpeft.methods.roles import there
from visionpeft.sites import Backbone, Site


@dataclass(frozen=True)
class RepAdapter(Method):
    """
    Attributes:
        hidden: width of the bottleneck, a multiple of groups.
        groups: blocks of B; they divide D too.
        scale: s, searched among 0.1 to 10 for each task in the paper.
        dropout: probability, between A and B.
    """

    key: ClassVar[str] = "repadapter"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    hidden: int = 8
    groups: int = 2
    scale: float = 1.0
    dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.groups < 1 or self.hidden % self.groups:
            raise MethodError(f"groups={self.groups} must divide hidden={self.hidden}")

    def default_targets(self, backbone: Backbone) -> str:
        """qkv where it is one Linear that is called, and the first MLP layer."""
        return there(self, backbone, "qkv mlp_in")

    def refuses(self, site: Site, module: nn.Module) -> str | None:
        if (reason := super().refuses(site, module)) is not None:
            return reason
        if site.part or site.host or base_class(module).forward is not nn.Linear.forward:
            return "it changes what a whole nn.Linear is given, and this is a part of one or another kind of Linear"
        return f"{self.groups} groups do not divide its width" if site.shape[1] % self.groups else None

    def build(self, site: Site, module: nn.Module) -> Adapter:
        return RepAdapterAdapter(self, site.shape[1], **factory(module))


class RepAdapterAdapter(Adapter):
    """down_weight (h, D), down_bias (h), up_weight (D, h / groups), up_bias (D)."""

    def __init__(self, method: RepAdapter, width: int, **kw: Any) -> None:
        super().__init__()
        h, self.groups, self.scale, self.dropout = method.hidden, method.groups, method.scale, method.dropout
        self.down_weight = nn.Parameter(torch.empty(h, width, **kw))
        self.down_bias = nn.Parameter(torch.empty(h, **kw))
        self.up_weight = nn.Parameter(torch.empty(width, h // self.groups, **kw))
        self.up_bias = nn.Parameter(torch.empty(width, **kw))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.down_weight)
        for zero in (self.down_bias, self.up_weight, self.up_bias):
            nn.init.zeros_(zero)

    def up(self) -> Tensor:
        """B as a whole matrix (D, h)."""
        return torch.block_diag(*self.up_weight.chunk(self.groups))

    def enter(self, x: Tensor) -> Tensor:
        h = lowrank.linear(x, self.down_weight.to(x.dtype), self.down_bias.to(x.dtype), [], route=self.route)
        h = F.dropout(h, self.dropout, self.training)
        return x + self.scale * F.linear(h, self.up().to(h.dtype), self.up_bias.to(h.dtype)).to(x.dtype)

    def weight(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        up = self.up()
        wide = w.to(torch.promote_types(w.dtype, up.dtype))
        shift = self.scale * (wide @ (up @ self.down_bias + self.up_bias))
        return wide + self.scale * (wide @ up) @ self.down_weight, shift if b is None else b + shift
