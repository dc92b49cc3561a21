r"""The memory bank of Point-PEFT: what the training set says of a cloud (Tang et al. 2024, arXiv 2310.03059).

With f the feature of a cloud, the maximum over the normed patch tokens of the frozen model without a class token, and
M (N, D) those of N training clouds, each of length 1, as rows:

    s = M f / |f|,  the K greatest s_k and their rows m_k,  w = softmax(s_k)      no parameters
    prior = [f, sum_k w_k m_k, m_1, ..., m_K]                                      K + 2 tokens, as many as prompts

In each block with prompts p: p + prior + bottleneck(prior), 8 wide. The bank is filled by `remember` before training
and goes into the adapter file.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionpeft import binding
from visionpeft.adapter import Adapter
from visionpeft.errors import SiteError
from visionpeft.models.point_transformer import PointEncoder

if TYPE_CHECKING:
    from visionpeft.tuner import Tuner


class Priors:
    """Prior prompts of the forwards under way, by the centres of their tokens.

    It goes by the tensor itself, so that a recomputed block (checkpointing) gets those of its own forward.
    """

    def __init__(self) -> None:
        self._held: dict[int, tuple[Any, Tensor]] = {}

    def __reduce__(self) -> Any:
        return Priors, ()

    def put(self, centres: Tensor, prior: Tensor) -> None:
        key = id(centres)
        self._held[key] = weakref.ref(centres, lambda _: self._held.pop(key, None)), prior

    def __call__(self, centres: Tensor) -> Tensor:
        return self._held[id(centres)][1]


class Memory(Adapter):
    """At the grouping: looks the cloud up in bank (N, D), unit rows; count says how many of these are filled."""

    bank: Tensor
    count: Tensor

    def __init__(self, priors: Priors, root: nn.Module, size: int, nearest: int, width: int, **kw: Any) -> None:
        super().__init__()
        self.priors, self.nearest = priors, nearest
        object.__setattr__(self, "root", root)  # seen, not owned
        self.register_buffer("bank", torch.zeros(size, width, **kw))
        self.register_buffer("count", torch.zeros((), dtype=torch.long, device=kw.get("device")))

    def after(self, y: Any) -> Any:
        around, centres = y
        looking = torch.compiler.is_compiling() or self.count.is_meta or binding._fired is not None
        if not looking and int(self.count) < len(self.bank):
            raise SiteError(
                f"Point-PEFT's memory bank is empty: call visionpeft.methods.point_memory.remember(tuner, clouds) "
                f"with {len(self.bank)} training clouds or more before anything else"
            )
        self.priors.put(centres, self.prior(self.features(around, centres)))
        return y

    @torch.no_grad()
    def features(self, around: Tensor, centres: Tensor) -> Tensor:
        """Features (B, D) of groups (B, G, K, 3) and centres (B, G, 3), without this method and without drop-path."""
        root: Any = self.root
        x, positions = root.tokens(around), root.pos_embed(centres)
        for block in root.blocks.blocks:
            x = x + positions
            x = x + block.attn(block.norm1(x))
            x = x + block.mlp(block.norm2(x))
        return root.norm(x).amax(1)

    @torch.no_grad()
    def prior(self, f: Tensor) -> Tensor:
        """Features (B, D) -> prompts (B, K + 2, D)."""
        bank = self.bank.to(f.dtype)
        best = (F.normalize(f, dim=-1) @ bank.T).topk(self.nearest)
        rows = bank[best.indices]
        mean = best.values.softmax(-1).unsqueeze(1) @ rows
        return torch.cat([f.unsqueeze(1), mean, rows], 1)


def check_root(root: nn.Module) -> None:
    """Refuse models whose frozen features this does not know how to take.

    Raises:
        SiteError: not of Point-MAE's kind.
    """
    if not isinstance(root, PointEncoder):
        raise SiteError("PointPEFT(memory=...) needs a model of Point-MAE's kind; memory=0 does without")


@torch.no_grad()
def remember(tuner: Tuner, clouds: Tensor, batch: int = 32) -> None:
    """Fill the memory bank of `tuner` with features of training clouds (N, P, 3), evenly drawn where they are more.

    Raises:
        SiteError: the method has no bank, or there are fewer clouds than it holds.
    """
    memories = [adapter for adapter in tuner.adapters.values() if isinstance(adapter, Memory)]
    if not memories:
        raise SiteError(f"{tuner.method.summary()} has no memory bank: give memory=, the number of clouds in it")
    (memory,), size = memories, len(memories[0].bank)
    if len(clouds) < size:
        raise SiteError(f"{len(clouds)} clouds do not fill a memory bank of {size}: give memory={len(clouds)}")
    chosen = clouds[torch.linspace(0, len(clouds) - 1, size).round().long()]
    root: Any = memory.root
    modes = [module.training for module in root.modules()]
    root.eval()
    try:
        with tuner.disabled():
            found = [memory.features(*root.group_divider(part.to(memory.bank.device))) for part in chosen.split(batch)]
    finally:
        for module, mode in zip(root.modules(), modes, strict=True):
            module.training = mode
    memory.bank.copy_(F.normalize(torch.cat(found), dim=-1))
    memory.count.fill_(size)
