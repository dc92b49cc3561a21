r"""MoSA, mixture of sparse adapters (Zhang et al. 2023, arXiv 2312.02923; official code Theia-4869/MoSA).

    x + z + scale * Up dropout(gelu(Down LN(x)))     beside the MLP, x the stream, LN the adapter's own (eps 1e-6)

Down is shared; Up (D, hidden) and its bias are split at random into `experts` parts of equal size that do not overlap.
In training each forward uses one part, drawn at random, and only it learns; outside training all parts act together.
Since every expert starts at zero, this one matrix is the exact merge of the experts: their sum, where the official
merge divides it by their number. For what is trained to be what is merged on average, the part that is drawn counts
that number of times in training, as what dropout leaves does. Without either, all parts together overshoot: of 200
images that a ViT-S had trained on it knew 197 with the sum divided and 59 with the sum.

The paper adds to the loss a symmetric KL term between two forwards of a batch, the function `consistency`: the jobs of
visionpeft.pipelines do so, a training loop of one's own has to. Identity at the start. Does not merge into the MLP: a
non-linearity stands between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionpeft import lowrank
from visionpeft.adapter import Adapter, Method, factory
from visionpeft.errors import MethodError
from visionpeft.sites import Backbone, Site


@dataclass(frozen=True)
class MoSA(Method):
    """
    Attributes:
        hidden: width of the bottleneck; 16 for VTAB, 64 for FGVC in the paper.
        experts: parts of Up; 1 is a dense adapter.
        scale: factor of the branch.
        dropout: probability, before Up.
        seed: of the split.
        consistency: weight of the term of that name in the loss of visionpeft.pipelines, which costs a second forward.
    """

    key: ClassVar[str] = "mosa"
    kinds: ClassVar[frozenset[str]] = frozenset({"branch"})

    hidden: int = 16
    experts: int = 4
    scale: float = 0.1
    dropout: float = 0.1
    seed: int = 0
    consistency: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.experts <= 255:
            raise MethodError(f"experts={self.experts}: expected 1 to 255")

    def default_targets(self, backbone: Backbone) -> str:
        return "mlp"

    def adapters(self, sites: Sequence[Site], backbone: Backbone) -> dict[Site, Adapter]:
        modules = (backbone.module(site.path) for site in sites)
        return {
            site: MoSAAdapter(self, site.shape[0], self.seed + i, **factory(module))
            for i, (site, module) in enumerate(zip(sites, modules, strict=True))
        }


class MoSAAdapter(Adapter):
    """norm_weight, norm_bias (D), down_weight (h, D), down_bias (h), up_weight (D, h), up_bias (D).

    Buffer expert (D, h + 1): which expert has an entry of Up, the bias in the last column; made from the seed.
    """

    expert: Tensor

    def __init__(self, method: MoSA, width: int, seed: int, **kw: Any) -> None:
        super().__init__()
        h, self.experts, self.scale, self.dropout = method.hidden, method.experts, method.scale, method.dropout
        self.norm_weight = nn.Parameter(torch.empty(width, **kw))
        self.norm_bias = nn.Parameter(torch.empty(width, **kw))
        self.down_weight = nn.Parameter(torch.empty(h, width, **kw))
        self.down_bias = nn.Parameter(torch.empty(h, **kw))
        self.up_weight = nn.Parameter(torch.empty(width, h, **kw))
        self.up_bias = nn.Parameter(torch.empty(width, **kw))
        order = torch.randperm(width * (h + 1), generator=torch.Generator().manual_seed(seed), device="cpu")
        split = (order % method.experts).to(torch.uint8).view(width, h + 1)
        self.register_buffer("expert", split.to(kw["device"]), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.norm_weight)
        nn.init.kaiming_uniform_(self.down_weight, a=math.sqrt(5))
        for zero in (self.norm_bias, self.down_bias, self.up_weight, self.up_bias):
            nn.init.zeros_(zero)

    def up(self) -> tuple[Tensor, Tensor]:
        """Up and its bias: of all experts, or while training of one at random that stands for all."""
        if self.experts == 1 or not self.training:
            return self.up_weight, self.up_bias
        own = self.expert == torch.randint(self.experts, (), device=self.expert.device)
        return self.experts * (self.up_weight * own[:, :-1]), self.experts * (self.up_bias * own[:, -1])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        dtype = x.dtype
        u = F.layer_norm(x, self.norm_weight.shape, self.norm_weight.to(dtype), self.norm_bias.to(dtype), 1e-6)
        h = F.gelu(lowrank.linear(u, self.down_weight.to(u.dtype), self.down_bias.to(u.dtype), [], route=self.route))
        h = F.dropout(h, self.dropout, self.training)
        weight, bias = self.up()
        return y + self.scale * F.linear(h, weight.to(h.dtype), bias.to(h.dtype)).to(y.dtype)


def consistency(a: Tensor, b: Tensor) -> Tensor:
    """The paper's term for two forwards of the same batch: (KL(a | b) + KL(b | a)) / 2 of each sample, (B).

    a, b (B, classes, ...), logits; where there is a class for every pixel, the mean over pixels.
    """
    p, q = a.log_softmax(1), b.log_softmax(1)
    apart = ((p.exp() - q.exp()) * (p - q)).sum(1) / 2
    return apart.reshape(len(a), -1).mean(1)
