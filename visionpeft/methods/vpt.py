r"""Visual prompt tuning (Jia et al. 2022, arXiv 2203.12119; official code KMnP/vpt).

Learnt tokens P stand between the class token and the rest: [CLS, P, others].

    deep      every block sees its own P (tokens, D); what comes out in their place is dropped
    shallow   one P before the first block; its tokens run through all blocks and are dropped after the last

Prompts get no position embedding. Drawn uniformly from (-v, v), v = sqrt(6 / (fan_in of the patch embedding + D)).
Needs blocks that take tokens in any number (plain ViTs); others are refused by name. Does not merge.
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
from visionpeft.adapter import Adapter, Method, factory
from visionpeft.errors import SiteError
from visionpeft.sites import Backbone, Site


@dataclass(frozen=True)
class VPT(Method):
    """
    Attributes:
        tokens: number of prompts; the paper searches 1 to 200 for each task.
        deep: own prompts for every block, otherwise prompts before the first only.
        dropout: probability of dropping entries of the prompts.
    """

    key: ClassVar[str] = "vpt"
    kinds: ClassVar[frozenset[str]] = frozenset({"block"})

    tokens: int = 10
    deep: bool = True
    dropout: float = 0.1

    def default_targets(self, backbone: Backbone) -> str:
        return "block"

    def choose(self, backbone: Backbone) -> list[Site]:
        sites = super().choose(backbone)
        return sites if self.deep or len(sites) == 1 else [sites[0], sites[-1]]

    def together(self, sites: Sequence[Site]) -> list[list[Site]]:
        return super().together(sites) if self.deep else [list(sites)]

    def adapters(self, sites: Sequence[Site], backbone: Backbone) -> dict[Site, Adapter]:
        bound = self._bound(sites[0], backbone)
        found: dict[Site, Adapter] = {}
        for site in sites:
            root, _ = backbone.split(site.path)
            front = backbones.prefix_tokens(backbone.roots[root])
            if front is None:
                raise SiteError(f"VPT at {site}: it is not known where this model keeps its class token")
            at = min(1, front)
            if self.deep or site is sites[0]:
                drops = self.deep or len(sites) == 1
                found[site] = Prompts(self, site.shape[0], at, bound, drops, **factory(backbone.module(site.path)))
            else:
                found[site] = Cut(self.tokens, at)
        return found

    @staticmethod
    def _bound(site: Site, backbone: Backbone) -> float:
        root, _ = backbone.split(site.path)
        embeds = [s for s in backbone.sites() if s.role == "patch_embed" and backbone.split(s.path)[0] == root]
        if not embeds:
            raise SiteError(f"VPT at {site}: no patch embedding was found to scale the prompts by")
        return math.sqrt(6 / (math.prod(embeds[0].shape[1:]) + site.shape[0]))


class Cut(Adapter):
    """Takes the prompts out again."""

    def __init__(self, tokens: int, at: int) -> None:
        super().__init__()
        self.tokens, self.at = tokens, at

    def after(self, y: Tensor) -> Tensor:
        return torch.cat([y[:, : self.at], y[:, self.at + self.tokens :]], 1)


class Prompts(Cut):
    """prompts (tokens, D), put in behind the first `at` tokens."""

    def __init__(self, method: VPT, width: int, at: int, bound: float, drops: bool, **kw: Any) -> None:
        super().__init__(method.tokens, at)
        self.bound, self.drops, self.dropout = bound, drops, method.dropout
        self.prompts = nn.Parameter(torch.empty(method.tokens, width, **kw))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.prompts, -self.bound, self.bound)

    def before(self, x: Tensor) -> Tensor:
        p = F.dropout(self.prompts.to(x.dtype).expand(x.shape[0], -1, -1), self.dropout, self.training)
        return torch.cat([x[:, : self.at], p, x[:, self.at :]], 1)

    def after(self, y: Tensor) -> Tensor:
        return super().after(y) if self.drops else y
