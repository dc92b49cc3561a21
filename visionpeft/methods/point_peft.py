r"""Point-PEFT (Tang et al. 2024, arXiv 2310.03059; official code Ivan-Tang-3D/Point-PEFT).

With bottleneck(u) = Up dropout(quick_gelu(Down u)) and z the output of a block's MLP after drop-path:

    prompts       tokens behind the class token in the first half of the blocks, taken out again behind each
    z + 0.7 bottleneck_1(z)                                  instead of z
    geometry      patches x with centres c, behind the block: n = k nearest tokens of farthest-point centres c';
                  n <- n + attention(LN(n)), 18 wide, shared by all blocks
                  v = GELU(BN(max n)) + 0.3 x(c'),  x <- x + 0.3 (v at c, by inverse squared distance)
    x + bottleneck_2(x)                                      on all tokens

In the paper prompts also carry what a bank of training features says of the cloud, see `visionpeft.methods.
point_memory`: `memory=` says how many clouds it holds, and `remember` fills it. Without, which is the default since a
method knows no training set, prompts are the learnt ones alone. The released code also keeps prompts (and bottlenecks
of the bank) for the other half of the blocks, which do nothing: on Point-MAE with 15 classes 656,911 numbers with such
prompts, 633,871 without, 673,087 with a bank. How many centres and neighbours it takes depends on its settings: half
of the tokens and 16 are ours. Its geometry also sees ten learnt points among the centres in the first blocks; ours
sees the cloud. Not the identity at the start; does not merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionpeft.adapter import Adapter, Shared, factory
from visionpeft.errors import MethodError
from visionpeft.methods.bottleneck import quick_gelu
from visionpeft.methods.point_memory import Memory, Priors, check_root
from visionpeft.methods.points import PointMethod, stages
from visionpeft.models.point_ops import farthest_points, interpolate, nearest_points, take
from visionpeft.models.point_transformer import add_positions
from visionpeft.sites import Backbone, Site

WIDTH = 18
HEADS = 6
PRIOR = 8
"""Width of the bottleneck on what the memory bank says."""


@dataclass(frozen=True)
class PointPEFT(PointMethod):
    """
    Attributes:
        tokens: prompts in each block of the first half.
        hidden: width of the bottlenecks.
        dropout: probability, in the bottlenecks and on the prompts.
        neighbours: tokens about each centre, all where there are fewer.
        memory: training clouds in the bank, 0 for none. The paper's bank holds the whole training set.
    """

    key: ClassVar[str] = "point_peft"
    kinds: ClassVar[frozenset[str]] = frozenset({"block", "branch", "stage"})

    tokens: int = 10
    hidden: int = 16
    dropout: float = 0.1
    neighbours: int = 16
    memory: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory and (self.tokens < 3 or self.memory < self.tokens - 2):
            raise MethodError(f"memory={self.memory}, tokens={self.tokens}: prompts are two and the nearest of the "
                              "bank, so tokens is 3 or more, and memory at least tokens - 2")
        if self.memory and self.legacy:
            raise MethodError("memory= needs features that stay as they are, and legacy=True lets statistics drift")

    def default_targets(self, backbone: Backbone) -> str:
        return "block"

    def choose(self, backbone: Backbone) -> list[Site]:
        blocks = {site.path for site in super().choose(backbone)}
        inner = [s for s in backbone.sites() if s.path in blocks and s.role in ("block", "mlp")]
        return [*(stages(backbone, "grouping") if self.memory else ()), *inner]

    def adapters(self, sites: Sequence[Site], backbone: Backbone) -> dict[Site, Adapter]:
        blocks = [site for site in sites if site.kind == "block"]
        width, kw = blocks[0].shape[0], factory(backbone.module(blocks[0].path))
        attention = NeighbourAttention(width, **kw)
        found: dict[Site, Adapter] = {Shared.site("attention"): attention}
        priors = Priors() if self.memory else None
        for site in sites:
            if site.kind == "stage":
                root = backbone.roots[""]
                check_root(root)
                assert priors is not None
                found[site] = Memory(priors, root, self.memory, self.tokens - 2, width, **kw)
                continue
            if site.kind == "branch":
                found[site] = BehindMLP(self, width, **kw)
                continue
            tokens = self.tokens if blocks.index(site) < (len(blocks) + 1) // 2 else 0
            found[site] = Geometry(self, tokens, priors, width, **kw)
            attention.refer(found[site])
        return found


class NeighbourAttention(Shared):
    """norm weight and bias (D), qkv (54, D), proj_weight (D, 18), proj_bias (D)."""

    def __init__(self, width: int, **kw: Any) -> None:
        super().__init__()
        self.norm_weight = nn.Parameter(torch.ones(width, **kw))
        self.norm_bias = nn.Parameter(torch.zeros(width, **kw))
        self.qkv = nn.Parameter(torch.empty(3 * WIDTH, width, **kw))
        self.proj_weight = nn.Parameter(torch.empty(width, WIDTH, **kw))
        self.proj_bias = nn.Parameter(torch.zeros(width, **kw))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.qkv, self.proj_weight):
            nn.init.trunc_normal_(weight, std=0.02)

    def run(self, n: Tensor) -> Tensor:
        """Neighbourhoods (M, k, D), each attending within itself."""
        x = F.layer_norm(n, self.norm_weight.shape, self.norm_weight.to(n.dtype), self.norm_bias.to(n.dtype))
        q, k, v = F.linear(x, self.qkv.to(x.dtype)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, scale=WIDTH**-0.5).transpose(1, 2).flatten(2)
        return F.linear(y, self.proj_weight.to(y.dtype), self.proj_bias.to(y.dtype)).to(n.dtype)


class Bottleneck(Adapter):
    """down (hidden, D), up (D, hidden), each with its bias."""

    down_weight: nn.Parameter
    down_bias: nn.Parameter
    up_weight: nn.Parameter
    up_bias: nn.Parameter

    def __init__(self, method: PointPEFT, width: int, **kw: Any) -> None:
        super().__init__()
        self.dropout = method.dropout
        self._make("", method.hidden, width, **kw)

    def _make(self, name: str, hidden: int, width: int, **kw: Any) -> None:
        for part, shape in {"down": (hidden, width), "up": (width, hidden)}.items():
            setattr(self, f"{name}{part}_weight", nn.Parameter(torch.empty(shape, **kw)))
            setattr(self, f"{name}{part}_bias", nn.Parameter(torch.empty(shape[0], **kw)))
        self.reset_parameters(name)

    def reset_parameters(self, name: str = "") -> None:
        for part in ("down", "up"):
            nn.init.xavier_uniform_(getattr(self, f"{name}{part}_weight"))
            nn.init.normal_(getattr(self, f"{name}{part}_bias"), std=1e-6)

    def bottleneck(self, u: Tensor, name: str = "") -> Tensor:
        """u (..., D) -> (..., D)."""
        w = {part: getattr(self, name + part) for part in ("down_weight", "down_bias", "up_weight", "up_bias")}
        h = quick_gelu(F.linear(u, w["down_weight"].to(u.dtype), w["down_bias"].to(u.dtype)))
        h = F.dropout(h, self.dropout, self.training)
        return F.linear(h, w["up_weight"].to(h.dtype), w["up_bias"].to(h.dtype)).to(u.dtype)


class BehindMLP(Bottleneck):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + 0.7 * self.bottleneck(y)


class Geometry(Bottleneck):
    """At a whole block: prompts (tokens, D) in, and behind it the geometry and the second bottleneck.

    Also norm_weight, norm_bias (D) of the BatchNorm and its buffers mean, var (D); with a memory bank prior_down_weight
    (8, D) and prior_up_weight (D, 8) with their biases.
    """

    shared: NeighbourAttention
    mean: Tensor
    var: Tensor

    def __init__(self, method: PointPEFT, tokens: int, priors: Priors | None, width: int, **kw: Any) -> None:
        super().__init__(method, width, **kw)
        self.tokens, self.neighbours = tokens, method.neighbours
        self.priors = priors if tokens else None
        self._centres: Tensor | None = None
        if self.priors is not None:
            self._make("prior_", PRIOR, width, **kw)
        if tokens:
            self.prompts = nn.Parameter(nn.init.trunc_normal_(torch.empty(tokens, width, **kw), std=0.02))
        self.norm_weight = nn.Parameter(torch.ones(width, **kw))
        self.norm_bias = nn.Parameter(torch.zeros(width, **kw))
        self.register_buffer("mean", torch.zeros(width, **kw))
        self.register_buffer("var", torch.ones(width, **kw))

    def arguments(self, x: Tensor, *rest: Any) -> tuple[Any, ...]:
        positions, centres = rest
        self._centres = centres
        front = x.shape[1] - centres.shape[1]
        x = add_positions(x, positions, front)
        if not self.tokens:
            return x, None, centres
        prompts = F.dropout(self.prompts.to(x.dtype).expand(len(x), -1, -1), self.dropout, self.training)
        if self.priors is not None:
            prior = self.priors(centres).to(x.dtype)
            prompts = prompts + prior + self.bottleneck(prior, "prior_")
        return torch.cat([x[:, :front], prompts, x[:, front:]], 1), None, centres

    def after(self, y: Tensor) -> Tensor:
        centres, self._centres = self._centres, None
        assert centres is not None
        at = -centres.shape[1]
        y = torch.cat([y[:, :at], self.geometry(y[:, at:], centres)], 1)
        y = y + self.bottleneck(y)
        return torch.cat([y[:, : at - self.tokens], y[:, at:]], 1)

    def geometry(self, x: Tensor, centres: Tensor) -> Tensor:
        """Patches x (B, G, D) with what their surroundings say."""
        few = farthest_points(centres, max(1, centres.shape[1] // 2))
        places = take(centres, few)
        near = nearest_points(places, centres, min(self.neighbours, centres.shape[1]))
        n = take(x, near)
        n = n + self.shared.run(n.flatten(0, 1)).view_as(n)
        pooled = n.amax(2)
        flat = pooled.flatten(0, 1).to(self.norm_weight.dtype)
        normed = F.batch_norm(flat, self.mean, self.var, self.norm_weight, self.norm_bias, self.training)
        v = F.gelu(normed.view_as(pooled)).to(x.dtype) + 0.3 * take(x, few)
        return x + 0.3 * interpolate(centres, places, v, k=places.shape[1]).to(x.dtype)
