r"""LoRA (Hu et al. 2021, arXiv 2106.09685; official code microsoft/LoRA).

    W' = W + s B A,   s = alpha / rank, or alpha / sqrt(rank) with rslora (arXiv 2312.03732)

A (rank, in) is drawn, B (out, rank) is zero: identity at the start. On a fused qkv, `query key value` are rows of one
weight and each gets its own pair; a path glob on the whole Linear gives one shared A. A conv's weight counts as the
matrix (out, in / groups * k * k); with one group the delta runs as a small conv and a 1x1 conv, otherwise, and for
convs that treat their weight before use (weight standardisation, same padding), W' is what the conv is given.
Merges everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionpeft import backbones
from visionpeft.adapter import Adapter, Method, factory
from visionpeft.binding import base_class
from visionpeft.errors import MethodError
from visionpeft.sites import Backbone, Site

_CONVS: dict[type, Any] = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


@dataclass(frozen=True)
class LoRA(Method):
    """
    Attributes:
        rank: width of the bottleneck, at most the smaller side of the matrix.
        alpha: numerator of the scale; None means rank, so that the scale is 1.
        dropout: probability of dropping entries of the adapter's input; on Linears and plain convs.
        rslora: divide alpha by the root of the rank.
        ranks: path of a module -> its rank, where that is another one; files of other tools have such.
        init: how A is drawn: "kaiming" (uniform, a = sqrt 5, as in the paper's code), "gaussian" (deviation 1 / rank).
    """

    key: ClassVar[str] = "lora"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv", "embed"})

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False
    init: str = "kaiming"
    ranks: dict[str, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init not in ("kaiming", "gaussian"):
            raise MethodError(f"init={self.init!r}: expected 'kaiming' or 'gaussian'")

    def default_targets(self, backbone: Backbone) -> str:
        """Query and value as in the paper, qkv where the three interleave; else the MLP layers, else the convs.

        In diffusion models all projections of attention, as their training scripts have it.
        """
        roles = {site.role for site in backbone.sites()}
        if any(map(backbones.denoises, backbone.roots.values())):
            return "query key value attn_out"
        return next((t for t in ("query value", "qkv", "mlp_in mlp_out", "conv") if set(t.split()) <= roles), "linear")

    def refuses(self, site: Site, module: nn.Module) -> str | None:
        if (reason := super().refuses(site, module)) is not None:
            return reason
        out, width = site.shape[0], math.prod(site.shape[1:])
        if site.path not in (self.ranks or {}) and self.rank > min(out, width):
            return f"rank {self.rank} is above the {out} x {width} matrix: choose at most {min(out, width)}"
        if getattr(module, "sparse", False):
            return "its gradients are sparse, and those of an adapter are not: make it with sparse=False"
        own_branch = site.host or _plain_conv(module) or base_class(module).forward is nn.Linear.forward
        if self.dropout and not own_branch:
            return "dropout needs the adapter's own branch, and here only the weight can be adapted: set dropout=0"
        return None

    def build(self, site: Site, module: nn.Module) -> Adapter:
        rank = (self.ranks or {}).get(site.path, self.rank)
        conv = module if _plain_conv(module) else None
        return LoRAAdapter(replace(self, rank=rank), site.shape, conv, **factory(module))


def _plain_conv(module: nn.Module) -> bool:
    """Whether the conv is torch's own, ungrouped and zero-padded, so that a delta can run beside it."""
    cls = base_class(module)
    return cls in _CONVS and getattr(module, "groups", 0) == 1 and getattr(module, "padding_mode", "") == "zeros"


class LoRAAdapter(Adapter):
    """a (rank, in, *kernel), b (out, rank)."""

    def __init__(self, method: LoRA, shape: tuple[int, ...], conv: nn.Module | None, **kw: Any) -> None:
        super().__init__()
        r = method.rank
        self.dropout, self.init = method.dropout, method.init
        alpha = r if method.alpha is None else method.alpha
        self.scale = alpha / math.sqrt(r) if method.rslora else alpha / r
        self.a = nn.Parameter(torch.empty(r, *shape[1:], **kw))
        self.b = nn.Parameter(torch.empty(shape[0], r, **kw))
        self.conv = None if conv is None else (_CONVS[base_class(conv)], conv.stride, conv.padding, conv.dilation)  # type: ignore[union-attr]
        self.is_matrix = len(shape) == 2
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.init == "gaussian":
            nn.init.normal_(self.a, std=1 / self.a.shape[0])
        else:
            nn.init.kaiming_uniform_(self.a.flatten(1), a=math.sqrt(5))
        nn.init.zeros_(self.b)

    @property
    def on_weight(self) -> bool:
        return self.conv is None

    def low_rank(self) -> tuple[Tensor, Tensor, float] | None:
        return (self.a, self.b, self.scale) if self.is_matrix else None

    def weight(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        delta = (self.b @ self.a.flatten(1)).view_as(w)
        return w + self.scale * delta, b

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        assert self.conv is not None
        conv, stride, padding, dilation = self.conv
        x = F.dropout(x, self.dropout) if self.training and self.dropout else x
        h = conv(x, self.a.to(x.dtype), None, stride, padding, dilation)
        up = self.b.to(h.dtype).view(*self.b.shape, *[1] * (self.a.dim() - 2))
        return y + self.scale * conv(h, up)
