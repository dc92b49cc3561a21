r"""Compacter (Mahabadi et al. 2021, arXiv 2106.04647; official code rabeehk/compacter).

A bottleneck behind attention and MLP, as Houlsby's, x + z + Up(gelu(Down z)), whose matrices are sums of n Kronecker
products with factors of rank 1:

    Down = sum_i A_i kron (s_i t_i^T),   A_i (n, n), s_i (D / n), t_i (hidden / n)     in z Down + b;  Up likewise

The rule A (n, n, n) is one for the whole network. Drawn from N(0, 0.01), s and t by Glorot, biases zero: near the
identity at the start. n must divide both widths. Does not merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionpeft.adapter import Adapter, Method, Shared, factory
from visionpeft.errors import MethodError
from visionpeft.sites import Backbone, Site


@dataclass(frozen=True)
class Compacter(Method):
    """
    Attributes:
        hidden: width of the bottleneck, a multiple of n.
        n: number of Kronecker products.
    """

    key: ClassVar[str] = "compacter"
    kinds: ClassVar[frozenset[str]] = frozenset({"branch"})

    hidden: int = 32
    n: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n < 1 or self.hidden % self.n:
            raise MethodError(f"n={self.n} must divide hidden={self.hidden}")

    def default_targets(self, backbone: Backbone) -> str:
        return "attention mlp"

    def refuses(self, site: Site, module: nn.Module) -> str | None:
        if (reason := super().refuses(site, module)) is not None:
            return reason
        return f"n={self.n} does not divide its width {site.shape[0]}" if site.shape[0] % self.n else None

    def adapters(self, sites: Sequence[Site], backbone: Backbone) -> dict[Site, Adapter]:
        found: dict[Site, Adapter] = {}
        for site in sites:
            component, kw = backbone.split(site.path)[0], factory(backbone.module(site.path))
            root = Shared.site("rule", component)
            rule: Any = found[root] if root in found else Rule(self.n, **kw)
            found[root], found[site] = rule, CompacterAdapter(self, site.shape[0], **kw)
            rule.refer(found[site])
        return found


class Rule(Shared):
    """rule (n, n, n)."""

    def __init__(self, n: int, **kw: Any) -> None:
        super().__init__()
        self.rule = nn.Parameter(torch.empty(n, n, n, **kw))
        nn.init.normal_(self.rule, std=0.01)


class CompacterAdapter(Adapter):
    """down_s (n, D / n), down_t (n, h / n), down_bias (h), up_s (n, h / n), up_t (n, D / n), up_bias (D)."""

    shared: Any

    def __init__(self, method: Compacter, width: int, **kw: Any) -> None:
        super().__init__()
        n, h = method.n, method.hidden
        self.down_s, self.down_t = (nn.Parameter(torch.empty(n, size // n, **kw)) for size in (width, h))
        self.up_s, self.up_t = (nn.Parameter(torch.empty(n, size // n, **kw)) for size in (h, width))
        self.down_bias = nn.Parameter(torch.empty(h, **kw))
        self.up_bias = nn.Parameter(torch.empty(width, **kw))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for vectors in (self.down_s, self.down_t, self.up_s, self.up_t):
            bound = (6 / (vectors.shape[1] + 1)) ** 0.5  # Glorot for a matrix of one column
            nn.init.uniform_(vectors, -bound, bound)
        nn.init.zeros_(self.down_bias)
        nn.init.zeros_(self.up_bias)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        down, up = self._matrix(self.down_s, self.down_t), self._matrix(self.up_s, self.up_t)
        h = F.linear(y, down.t().to(y.dtype), self.down_bias.to(y.dtype))
        h = F.gelu(h, approximate="tanh")
        return y + F.linear(h, up.t().to(h.dtype), self.up_bias.to(h.dtype)).to(y.dtype)

    def _matrix(self, s: Tensor, t: Tensor) -> Tensor:
        """sum_i A_i kron s_i t_i^T, (in, out)."""
        return torch.einsum("iab,ip,iq->apbq", self.shared.rule, s, t).flatten(2).flatten(0, 1)
