r"""A bottleneck behind a Linear: what SPT-Adapter puts at the matrices it selects (He et al. 2023, arXiv 2303.08566).

    y + Up dropout(gelu(Down y))      on the output y of the Linear

Down (hidden, out) is drawn, Up (out, hidden) and the biases are zero: identity at the start. By itself it goes to
attention output and second MLP layer. Does not merge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from visionpeft.methods.bottleneck import Bottleneck
from visionpeft.methods.roles import there
from visionpeft.sites import Backbone


@dataclass(frozen=True)
class LinearAdapter(Bottleneck):
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

    def act(self, x: Tensor) -> Tensor:
        return F.gelu(x)
