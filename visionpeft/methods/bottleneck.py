r"""Bottleneck adapters beside and behind the residual branches of a transformer block.

With x the residual stream before a branch, z = drop_path(branch(norm x)) what is added to it, and
bottleneck(u) = Up dropout(act(Down u)), Down (hidden, D), Up (D, hidden), both with bias:

    AdaptFormer   x + z + scale * bottleneck(x)     MLP branch, ReLU (Chen et al. 2022, arXiv 2205.13535;
                                                    official code ShoufaChen/AdaptFormer)
    Houlsby       x + z + bottleneck(z)             attention and MLP, GELU (Houlsby et al. 2019, arXiv 1902.00751)
    Pfeiffer      x + z + bottleneck(z)             MLP only, quick GELU, as NOAH's "Adapter" (Pfeiffer et al. 2020,
                                                    arXiv 2005.00247; Zhang et al. 2022, arXiv 2206.04673)

z is taken after drop-path and LayerScale. None merges: a non-linearity stands between Down and Up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionpeft.adapter import Adapter, Method, factory
from visionpeft.sites import Backbone, Site


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


@dataclass(frozen=True)
class Bottleneck(Method):
    """What adapters of two matrices with a non-linearity between them have in common.

    Attributes:
        hidden: width of the bottleneck.
        dropout: probability, behind the non-linearity.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"branch"})
    roles: ClassVar[str] = "mlp"

    hidden: int = 64
    dropout: float = 0.0

    def default_targets(self, backbone: Backbone) -> str:
        return self.roles

    def build(self, site: Site, module: nn.Module) -> Adapter:
        return BottleneckAdapter(self, site.shape[0], **factory(module))

    def act(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def reset(self, adapter: BottleneckAdapter) -> None:
        """Down is drawn, Up and both biases are zero: identity."""
        nn.init.kaiming_uniform_(adapter.down_weight, a=math.sqrt(5))
        for zero in (adapter.down_bias, adapter.up_weight, adapter.up_bias):
            nn.init.zeros_(zero)

    def combine(self, adapter: BottleneckAdapter, x: Tensor, z: Tensor) -> Tensor:
        """What is added to the residual stream instead of z."""
        return z + adapter.bottleneck(z)


@dataclass(frozen=True)
class AdaptFormer(Bottleneck):
    """
    Attributes:
        scale: factor of the adapter's branch; 0.1 in the paper, searched per task in VTAB tables.
    """

    key: ClassVar[str] = "adaptformer"
    dropout: float = 0.1
    scale: float = 0.1

    def act(self, x: Tensor) -> Tensor:
        return F.relu(x)

    def combine(self, adapter: BottleneckAdapter, x: Tensor, z: Tensor) -> Tensor:
        return z + self.scale * adapter.bottleneck(x).to(z.dtype)  # under autocast the stream is wider


@dataclass(frozen=True)
class Houlsby(Bottleneck):
    key: ClassVar[str] = "houlsby"
    roles: ClassVar[str] = "attention mlp"

    def act(self, x: Tensor) -> Tensor:
        return F.gelu(x)

    def reset(self, adapter: BottleneckAdapter) -> None:
        """Normal of deviation 0.01 cut at two deviations, biases zero: near the identity."""
        for weight in (adapter.down_weight, adapter.up_weight):
            nn.init.trunc_normal_(weight, std=0.01, a=-0.02, b=0.02)
        for bias in (adapter.down_bias, adapter.up_bias):
            nn.init.zeros_(bias)


@dataclass(frozen=True)
class Pfeiffer(Bottleneck):
    key: ClassVar[str] = "pfeiffer"
    hidden: int = 8
    dropout: float = 0.1

    def act(self, x: Tensor) -> Tensor:
        return quick_gelu(x)

    def reset(self, adapter: BottleneckAdapter) -> None:
        """Xavier weights and biases of deviation 1e-6, as in NOAH: not the identity."""
        for weight in (adapter.down_weight, adapter.up_weight):
            nn.init.xavier_uniform_(weight)
        for bias in (adapter.down_bias, adapter.up_bias):
            nn.init.normal_(bias, std=1e-6)


class BottleneckAdapter(Adapter):
    """down_weight (hidden, D), down_bias (hidden), up_weight (D, hidden), up_bias (D)."""

    def __init__(self, method: Bottleneck, width: int, **kw: Any) -> None:
        super().__init__()
        self.method = method
        self.down_weight = nn.Parameter(torch.empty(method.hidden, width, **kw))
        self.down_bias = nn.Parameter(torch.empty(method.hidden, **kw))
        self.up_weight = nn.Parameter(torch.empty(width, method.hidden, **kw))
        self.up_bias = nn.Parameter(torch.empty(width, **kw))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.method.reset(self)

    def bottleneck(self, u: Tensor) -> Tensor:
        """u (..., D) -> (..., D), in u's dtype."""
        dtype = u.dtype
        h = F.dropout(self.method.act(self.down(u)), self.method.dropout, self.training)
        return F.linear(h, self.up_weight.to(dtype), self.up_bias.to(dtype)).to(dtype)

    def down(self, u: Tensor) -> Tensor:
        return F.linear(u, self.down_weight.to(u.dtype), self.down_bias.to(u.dtype))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.method.combine(self, x, y)
