r"""DAPT, dynamic adapters and internal prompts (Zhou et al. 2024, arXiv 2403.01439; official code LMD0311/DAPT).

In every block, with n the output of its second norm and z that of the MLP:

    a = ReLU(w n' + c) * Up dropout(GELU(Down n')),  n' = LN(n)         added to z before drop-path; Up is zero
    prompt = mean over tokens of GELU(a)                                one more token behind the class token

and every operation (norms, qkv, attention output, both MLP layers, patch tokens, prompts) is scaled and shifted by
gamma ~ N(1, 0.02), beta ~ N(0, 0.02) a channel. Positions are added once and not before every block. The classifier
takes class token, mean of the prompts and maximum over the patches. Not the identity at the start; does not merge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionpeft import backbones
from visionpeft.adapter import Adapter, factory
from visionpeft.methods.points import MoreColumns, PoolMore, Slot, WiderHead, stages
from visionpeft.methods.ssf import SSF
from visionpeft.sites import Backbone, Site

SCALED = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@dataclass(frozen=True)
class DAPT(WiderHead):
    """
    Attributes:
        hidden: width of the adapters.
        dropout: probability, behind the non-linearity.
    """

    key: ClassVar[str] = "dapt"

    hidden: int = 64
    dropout: float = 0.2

    def default_targets(self, backbone: Backbone) -> str:
        return "block"

    def choose(self, backbone: Backbone) -> list[Site]:
        blocks = [site.path for site in super().choose(backbone)]
        scaled = {f"{path}.{name}" for path in blocks for name in SCALED} | {"norm"}
        wanted = [
            site
            for site in backbone.sites()
            if (site.path in blocks and site.role in ("block", "mlp")) or (site.path in scaled and not site.part)
        ]
        return [*stages(backbone, "tokens"), *wanted, *self.head(backbone)]

    def adapters(self, sites: Sequence[Site], backbone: Backbone) -> dict[Site, Adapter]:
        slots: dict[str, Slot] = {site.path: Slot() for site in sites if site.kind == "block"}
        first, feature = next(iter(slots)), Slot()
        width = next(site.shape[0] for site in sites if site.kind == "block")
        front = backbones.prefix_tokens(backbone.roots[""]) or 0
        found: dict[Site, Adapter] = {}
        for site in sites:
            module = backbone.module(site.path)
            if site.kind == "branch":  # ends before drop-path
                site = replace(site, ends=(site.ends[0], f"{site.path}.mlp"))
                found[site] = DynamicAdapter(self, slots[site.path], site.shape[0], **factory(module))
            elif site.kind == "block":
                keeps = site.path == first
                found[site] = InternalPrompt(slots[site.path], keeps, front, site.shape[0], **factory(module))
            elif site.role == "pool":
                found[site] = PromptsPool(feature, len(slots))
            elif site.role == "tokens":
                found[site] = Scaled(site.shape[0], **factory(module))
            elif site.role == "head":
                found[site] = MoreColumns(feature, site.shape[0], width, **factory(module))
            else:
                found[site] = SSF().build(site, module)
        return found


class Scaled(Adapter):
    """gamma, beta (D) on all that a stage gives."""

    def __init__(self, width: int, **kw: Any) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width, **kw))
        self.beta = nn.Parameter(torch.empty(width, **kw))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.gamma, mean=1.0, std=0.02)
        nn.init.normal_(self.beta, mean=0.0, std=0.02)

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.gamma.to(x.dtype) + self.beta.to(x.dtype)

    def after(self, y: Tensor) -> Tensor:
        return self.scaled(y)


class InternalPrompt(Scaled):
    """Puts the block's prompt behind the class token; leaves positions out but in the first block."""

    def __init__(self, slot: Slot, first: bool, front: int, width: int, **kw: Any) -> None:
        super().__init__(width, **kw)
        self.slot, self.first, self.front = slot, first, front

    def arguments(self, x: Tensor, *rest: Any) -> tuple[Any, ...]:
        positions, centres = rest
        return x, positions if self.first else None, centres

    def after(self, y: Tensor) -> Tensor:
        prompt = self.slot.take().to(y.dtype)
        return torch.cat([y[:, : self.front], self.scaled(prompt), y[:, self.front :]], 1)


class DynamicAdapter(Adapter):
    """norm weight and bias (D), scale_weight (1, D), down_weight (hidden, D), up_weight (D, hidden), and biases."""

    down_weight: nn.Parameter
    up_weight: nn.Parameter
    scale_weight: nn.Parameter
    normed = True

    def __init__(self, method: DAPT, slot: Slot, width: int, **kw: Any) -> None:
        super().__init__()
        self.slot, self.dropout = slot, method.dropout
        shapes = {"down": (method.hidden, width), "up": (width, method.hidden), "scale": (1, width)}
        for name, shape in shapes.items():
            setattr(self, f"{name}_weight", nn.Parameter(torch.empty(shape, **kw)))
            setattr(self, f"{name}_bias", nn.Parameter(torch.zeros(shape[0], **kw)))
        self.norm_weight = nn.Parameter(torch.ones(width, **kw))
        self.norm_bias = nn.Parameter(torch.zeros(width, **kw))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.down_weight, self.scale_weight):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        nn.init.zeros_(self.up_weight)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = F.layer_norm(x, self.norm_weight.shape, self.norm_weight.to(x.dtype), self.norm_bias.to(x.dtype))
        h = F.dropout(F.gelu(self._linear(x, "down")), self.dropout, self.training)
        a = self._linear(h, "up") * F.relu(self._linear(x, "scale"))
        self.slot.value = F.gelu(a).mean(1, keepdim=True)
        return y + a.to(y.dtype)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
        return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


class PromptsPool(PoolMore):
    """The mean of the prompts is the feature."""

    def __init__(self, slot: Slot, prompts: int) -> None:
        super().__init__(slot)
        self.prompts = prompts

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        end = 1 + self.prompts
        return torch.cat([x[:, :1], x[:, end:]], 1), x[:, 1:end].mean(1)
