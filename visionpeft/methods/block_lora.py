r"""Block-LoRA ("One Head Eight Arms", 2025, arXiv 2501.16720; no official code was found).

    W' = W + s (B_1 + ... + B_n) A,   A (r / n, in) shared by the n blocks, B_i (out, r / n),   s as in LoRA

A is drawn, every B_i is zero: identity at the start; r out + r / n in scalars for a matrix. Merges everywhere.

**What to know before choosing it.** The delta has rank r / n at most, and the B_i get one and the same gradient from
one and the same start, so that under SGD and Adam they stay equal: this is LoRA of rank r / n whose B learns n times as
fast. No other function can be learnt than with `LoRA(rank=r // n)`, which has fewer scalars.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visionpeft.adapter import Adapter, Method, factory
from visionpeft.errors import MethodError
from visionpeft.methods.lora import LoRA
from visionpeft.sites import Backbone, Site


@dataclass(frozen=True)
class BlockLoRA(Method):
    """
    Attributes:
        rank: r, of all blocks together; the paper's choice was not to be had.
        blocks: n, which divides r.
        alpha: numerator of the scale alpha / r; None means r, so that the scale is 1.
        dropout: probability of dropping entries of the adapter's input.
        rslora: divide alpha by the root of r, as CLIP-LoRA does.
    """

    key: ClassVar[str] = "block_lora"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    rank: int = 8
    blocks: int = 2
    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks < 1 or self.rank % self.blocks:
            raise MethodError(f"blocks={self.blocks}: expected a divisor of rank={self.rank}")

    @property
    def plain(self) -> LoRA:
        """The LoRA that learns the same functions."""
        return LoRA(rank=self.rank // self.blocks, dropout=self.dropout)

    def default_targets(self, backbone: Backbone) -> str:
        return self.plain.default_targets(backbone)

    def refuses(self, site: Site, module: nn.Module) -> str | None:
        return super().refuses(site, module) or self.plain.refuses(site, module)

    def build(self, site: Site, module: nn.Module) -> Adapter:
        return BlockLoRAAdapter(self, *site.shape, **factory(module))


class BlockLoRAAdapter(Adapter):
    """a (r / n, in), b (n, out, r / n)."""

    def __init__(self, method: BlockLoRA, out: int, width: int, **kw: Any) -> None:
        super().__init__()
        alpha = method.rank if method.alpha is None else method.alpha
        self.scale = alpha / math.sqrt(method.rank) if method.rslora else alpha / method.rank
        self.dropout = method.dropout
        each = method.rank // method.blocks
        self.a = nn.Parameter(torch.empty(each, width, **kw))
        self.b = nn.Parameter(torch.empty(method.blocks, out, each, **kw))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        nn.init.zeros_(self.b)

    def low_rank(self) -> tuple[Tensor, Tensor, float] | None:
        return self.a, self.b.sum(0), self.scale

    def weight(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return w + self.scale * (self.b.sum(0) @ self.a), b
