r"""IDPT, instance-aware dynamic prompts (Zha et al. 2023, arXiv 2304.07221; official code zyh16143998882/ICCV23-IDPT).

At the input of the last block a DGCNN reads the G patch tokens f and makes one prompt of them:

    e_i = max_j LeakyReLU(BN(W [f_j - f_i, f_i]))      over the k nearest j in feature space, three times
    prompt = max_i LeakyReLU(BN(W' [e1, e2, e3]_i))    put in behind the class token

The prompt has a position that was drawn once and does not learn, as in the official code. The classifier takes class
token, prompt and maximum over the patches. The DGCNN's BatchNorms learn in training. Not the identity at the start;
does not merge. 1,330,176 parameters at width 384, besides class token and classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionpeft.adapter import Adapter, factory
from visionpeft.methods.points import MoreColumns, PoolMore, Slot, WiderHead
from visionpeft.models.point_ops import take
from visionpeft.sites import Backbone, Site


@dataclass(frozen=True)
class IDPT(WiderHead):
    """
    Attributes:
        neighbours: k, all tokens where there are fewer.
    """

    key: ClassVar[str] = "idpt"

    neighbours: int = 20

    def default_targets(self, backbone: Backbone) -> str:
        return "block"

    def choose(self, backbone: Backbone) -> list[Site]:
        return [super().choose(backbone)[-1], *self.head(backbone)]

    def adapters(self, sites: Sequence[Site], backbone: Backbone) -> dict[Site, Adapter]:
        block, *head = sites
        slot, width, kw = Slot(), block.shape[0], factory(backbone.module(block.path))
        found: dict[Site, Adapter] = {block: DynamicPrompt(self, width, **kw)}
        for pool, first in [head] if head else []:
            found |= {pool: PromptPool(slot), first: MoreColumns(slot, first.shape[0], width, **kw)}
        return found


class PromptPool(PoolMore):
    """The prompt is the feature."""

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([x[:, :1], x[:, 2:]], 1), x[:, 1]


class DynamicPrompt(Adapter):
    """edges (3, D, 2 D), join (D, 3 D); of four BatchNorms norm_weight, norm_bias (4, D) and, as buffers, mean and var.

    position (1, 1, D), a buffer too.
    """

    position: Tensor
    mean: Tensor
    var: Tensor

    def __init__(self, method: IDPT, width: int, **kw: Any) -> None:
        super().__init__()
        self.neighbours = method.neighbours
        self.edges = nn.Parameter(torch.empty(3, width, 2 * width, **kw))
        self.join = nn.Parameter(torch.empty(width, 3 * width, **kw))
        self.norm_weight = nn.Parameter(torch.ones(4, width, **kw))
        self.norm_bias = nn.Parameter(torch.zeros(4, width, **kw))
        self.register_buffer("mean", torch.zeros(4, width, **kw))
        self.register_buffer("var", torch.ones(4, width, **kw))
        self.register_buffer("position", torch.empty(1, 1, width, **kw))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (*self.edges, self.join):
            nn.init.kaiming_uniform_(weight, a=5**0.5)
        nn.init.trunc_normal_(self.position, std=0.02)

    def arguments(self, x: Tensor, *rest: Any) -> tuple[Any, ...]:
        positions, centres = rest
        at = -centres.shape[1]
        prompt = self.prompt(x[:, at:])
        if positions is not None:
            own = self.position.to(positions.dtype).expand(len(x), -1, -1)
            positions = torch.cat([positions[:, :at], own, positions[:, at:]], 1)
        return torch.cat([x[:, :at], prompt, x[:, at:]], 1), positions, centres

    def prompt(self, f: Tensor) -> Tensor:
        """Patch tokens (B, G, D) -> prompt (B, 1, D)."""
        found = []
        for i, weight in enumerate(self.edges):
            found.append(f := self._edge(f, weight.to(f.dtype), i))
        joined = self._activated(F.linear(torch.cat(found, -1), self.join.to(f.dtype)), 3)
        return joined.amax(1, keepdim=True)

    def _edge(self, f: Tensor, weight: Tensor, i: int) -> Tensor:
        near, own = weight.chunk(2, 1)  # W [f_j - f_i, f_i] = near f_j + (own - near) f_i, before any pairs are made
        pairs = take(F.linear(f, near), self._nearest(f)) + F.linear(f, own - near).unsqueeze(2)
        return self._activated(pairs, i).amax(2)

    @torch.no_grad()
    def _nearest(self, f: Tensor) -> Tensor:
        square = f.square().sum(-1)
        distances = square.unsqueeze(2) - 2 * f @ f.mT + square.unsqueeze(1)
        return distances.topk(min(self.neighbours, f.shape[1]), largest=False).indices

    def _activated(self, x: Tensor, i: int) -> Tensor:
        """The i-th BatchNorm on x (..., D), then LeakyReLU."""
        flat, weight, bias = x.flatten(0, -2), self.norm_weight[i], self.norm_bias[i]
        y = F.batch_norm(flat, self.mean[i], self.var[i], weight, bias, self.training)
        return F.leaky_relu(y.view_as(x), 0.2).to(x.dtype)
