r"""Parallel adapters (He et al. 2021, arXiv 2110.04366; official code jxhe/unify-parameter-efficient-tuning).

    x + z + scale * Up dropout(ReLU(Down u))      u is what the MLP is given, z = drop_path(MLP(u))

In the paper's post-norm language models u is the stream itself. In pre-norm blocks it is the norm's output, which is
used here; AdaptFormer is the same adapter on the stream. Down (hidden, D), Up (D, hidden), both with bias; Up and the
biases start at zero. Does not merge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from visionpeft import lowrank
from visionpeft.adapter import Adapter, factory
from visionpeft.methods.bottleneck import AdaptFormer, BottleneckAdapter
from visionpeft.sites import Site


@dataclass(frozen=True)
class ParallelAdapter(AdaptFormer):
    """
    Attributes:
        scale: s; 4 in the paper's scaled form, 1 is the plain one.
    """

    key: ClassVar[str] = "parallel"
    dropout: float = 0.0
    scale: float = 4.0

    def build(self, site: Site, module: nn.Module) -> Adapter:
        return NormedAdapter(self, site.shape[0], **factory(module))


class NormedAdapter(BottleneckAdapter):
    """Is given the output of the branch's norm, which the frozen model does not keep."""

    normed = True

    def down(self, u: Tensor) -> Tensor:
        return lowrank.linear(u, self.down_weight.to(u.dtype), self.down_bias.to(u.dtype), [], route=self.route)
