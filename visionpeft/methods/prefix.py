r"""Prefix tuning (Li and Liang 2021, arXiv 2101.00190), as the unified view writes it (He et al. 2021, 2110.04366).

Every attention has learnt keys P_k and values P_v (tokens, D), split among its heads as its own are:

    attention(q, [K, P_k], [V, P_v]) = (1 - l) attention(q, K, V) + l attention(q, P_k, P_v)

with l the share of the prefix in the sum of exponentials. Drawn from N(0, 0.02) and learnt directly (the papers'
reparametrisation by an MLP is left out). The attention is given as many more tokens, whose keys and values are replaced
by P_k and P_v and whose outputs are dropped: query tokens, residual stream and MLP are as before. An own norm of the
keys acts on P_k too. Only blocks of plain ViTs take more tokens; windows, position biases and nn.MultiheadAttention are
refused by name. Not the identity at the start; does not merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visionpeft.adapter import Adapter, Method, factory
from visionpeft.errors import SiteError
from visionpeft.sites import Backbone, Site, inside


@dataclass(frozen=True)
class PrefixTuning(Method):
    """
    Attributes:
        tokens: length of the prefix.
    """

    key: ClassVar[str] = "prefix"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    tokens: int = 10

    def default_targets(self, backbone: Backbone) -> str:
        if not any(site.kind == "block" for site in backbone.sites()):
            raise SiteError("PrefixTuning needs a block whose attention takes any number of tokens: there is none here")
        return "key value"

    def refuses(self, site: Site, module: nn.Module) -> str | None:
        if site.role not in ("key", "value") or site.host:
            return "it adapts the key and value of a plain ViT's block"
        return super().refuses(site, module)

    def together(self, sites: Sequence[Site]) -> list[list[Site]]:
        found: dict[str, list[Site]] = {}
        for site in sites:
            found.setdefault(_attention(site), []).append(site)
        return list(found.values())

    def adapters(self, sites: Sequence[Site], backbone: Backbone) -> dict[Site, Adapter]:
        blocks = [site.path for site in backbone.sites() if site.kind == "block"]
        found: dict[Site, Adapter] = {}
        widened: dict[Site, Adapter] = {}
        for site in sites:
            if not inside(site.path, blocks):
                raise SiteError(f"PrefixTuning at {site}: it adapts the key and value of a plain ViT's block")
            found[site] = Prefix(self.tokens, site.shape[0], **factory(backbone.module(site.path)))
            attention = Site(_attention(site), "widened", kind="block")
            widened.setdefault(attention, Widened(self.tokens))
        for group in self.together(sites):  # the empty tokens would have keys or values of their own
            if {site.role for site in group} != {"key", "value"}:
                raise SiteError(f"PrefixTuning at {_attention(group[0])}: it needs both key and value")
        return {**found, **widened}


def _attention(site: Site) -> str:
    return site.path.rpartition(".")[0]


class Prefix(Adapter):
    """prefix (tokens, D) instead of what a Linear gives for the last tokens."""

    def __init__(self, tokens: int, width: int, **kw: Any) -> None:
        super().__init__()
        self.prefix = nn.Parameter(torch.empty(tokens, width, **kw))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.prefix, std=0.02)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        prefix = self.prefix.to(y.dtype).expand(y.shape[0], -1, -1)
        return torch.cat([y[:, : y.shape[1] - prefix.shape[1]], prefix], 1)


class Widened(Adapter):
    """An attention with empty tokens at the end of its input, and without them at the end of its output."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens

    def before(self, x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros(x.shape[0], self.tokens, x.shape[2])], 1)

    def after(self, y: Any) -> Any:
        if isinstance(y, tuple):  # transformers' attention gives its weights too
            return (self.after(y[0]), *y[1:])
        return y[:, : y.shape[1] - self.tokens]
