r"""A bottleneck behind a Linear: what SPT-Adapter puts at the matrices it selects (He et al. 2023, arXiv 2303.08566).

    y + Up dropout(gelu(Down y))      on the output y of the Linear

Down (hidden, out) is drawn, Up (out, hidden) and the biases are zero: identity at the start. By itself it goes to
attention output and second MLP layer. Does not merge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionpeft.adapter import Adapter, Method, factory
from visionpeft.methods.roles import there
from visionpeft.sites import Backbone, Site


@dataclass(frozen=True)
class LinearAdapter(Method):
    """
    Attributes:
        hidden: width of the bottleneck.
        dropout: probability, before Up.
    """

    key: ClassVar[str] = "linear_adapter"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    hidden: int = 8
    dropout: float = 0.1

    def default_targets(self, backbone: Backbone) -> str:
        return there(self, backbone, "attn_out mlp_out")

    def build(self, site: Site, module: nn.Module) -> Adapter:
        return LinearAdapterAdapter(self, site.shape[0], **factory(module))


class LinearAdapterAdapter(Adapter):
    """down_weight (h, out), down_bias (h), up_weight (out, h), up_bias (out)."""

    def __init__(self, method: LinearAdapter, width: int, **kw: Any) -> None:
        super().__init__()
        self.dropout = method.dropout
        self.down_weight = nn.Parameter(torch.empty(method.hidden, width, **kw))
        self.down_bias = nn.Parameter(torch.empty(method.hidden, **kw))
        self.up_weight = nn.Parameter(torch.empty(width, method.hidden, **kw))
        self.up_bias = nn.Parameter(torch.empty(width, **kw))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.down_weight, a=math.sqrt(5))
        for zero in (self.down_bias, self.up_weight, self.up_bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = F.gelu(F.linear(y, self.down_weight.to(y.dtype), self.down_bias.to(y.dtype)))
        h = F.dropout(h, self.dropout, self.training)
        return y + F.linear(h, self.up_weight.to(h.dtype), self.up_bias.to(h.dtype)).to(y.dtype)
