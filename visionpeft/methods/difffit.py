r"""DiffFit (Xie et al. 2023, arXiv 2304.06648; no official code for DiT: re-implementations thuml/Diffusion-Tuning and
mkshing/DiffFit-pytorch).

    every bias, every affine norm and the class table learn in place, and    z' = gamma * z

with gamma, one number a channel, starting at one (identity at the start). z is the output of a sub-layer before it is
added to the residual stream. A gate on z commutes with gamma, so gamma acts on the sub-layer's last Linear. Placements:

    block       gamma on the output of each attention (self, cross, added) and of each MLP, all blocks: mkshing's on
                UNets, the paper's text on DiT (2 d a block)
    thuml       in the first half of the blocks, gamma on query, key and value, two on the attention's output (that of
                its projection and that of the block), one on the MLP's: 6 d a block
    published   in all blocks, thuml's and a second on the MLP's output: 7 d a block. On DiT-XL/2 with 101 classes
                that gives 832,928, the published 0.83 M; the placement behind that figure is an inference

"Norm" means LayerNorm, GroupNorm and RMSNorm by their type: names would take diffusers' adaptive norms
(`norm1.linear`), 40 % of DiT-XL/2. diffusers gives each block of a DiT its own copy of the class table and of the
timestep embedding where the original has one: the copies learn as one (`tied`). Merges; UNets, DiTs and ViTs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visionpeft import backbones
from visionpeft.adapter import Adapter, factory
from visionpeft.errors import MethodError, SiteError
from visionpeft.methods.in_place import InPlace
from visionpeft.methods.ssf import Rescaling, source_of
from visionpeft.sites import Backbone, Site, inside, kind_of
from visionpeft.targets import choose_among

PLACEMENTS: dict[str, dict[str, int]] = {  # role -> how many vectors
    "block": {"attn_out": 1, "mlp_out": 1},
    "thuml": {"query": 1, "key": 1, "value": 1, "qkv": 1, "attn_out": 2, "mlp_out": 1},
    "published": {"query": 1, "key": 1, "value": 1, "qkv": 1, "attn_out": 2, "mlp_out": 2},
}
_BLOCK = re.compile(r"^(.*(?:blocks|layers|layer|stages)\.\d+)\.")
_TABLE = re.compile(r"(^|\.)(class_embed|y_embed)")


@dataclass(frozen=True)
class DiffFit(InPlace):
    """
    Attributes:
        placement: "block", "thuml" or "published", see above.
        tied: the copies that diffusers makes of a DiT's class table and timestep embedding learn as one.
        recompute: roles whose z, which gamma's gradient needs, is computed again in backward instead of kept, as SSF's.
    """

    key: ClassVar[str] = "difffit"
    lacking: ClassVar[str] = "this model has no bias, norm or attention outside the classifier"

    placement: str = "block"
    tied: bool = True
    recompute: str = "attn_out"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.placement not in PLACEMENTS:
            raise MethodError(f"placement={self.placement!r}: expected one of {', '.join(PLACEMENTS)}")

    def choose(self, backbone: Backbone) -> list[Site]:
        sites = [*self._scaled(backbone), *self._learnt(backbone)]
        sites = backbone.in_tower(sites, self.tower)
        if self.targets is None and self.within is None:
            sites = backbone.main(sites)
        if not sites:
            raise SiteError(f"DiffFit: {self.lacking}")
        chosen = choose_among(sites, self.targets or (lambda site: True), self.within, self.exclude)
        self._check_ties(chosen, backbone)
        return chosen

    def _learnt(self, backbone: Backbone) -> list[Site]:
        heads = backbone.heads()
        return [
            Site(path, name, kind_of(module) or "", "tensor", tuple(getattr(module, name).shape))
            for path, module, name in backbone.named_tensors()
            if not inside(path, heads) and not backbone.hidden(path) and _selected(path, module, name)
        ]

    def _scaled(self, backbone: Backbone) -> list[Site]:
        table = PLACEMENTS[self.placement]
        sites = [s for s in backbone.sites() if s.role in table and s.kind in ("linear", "conv")]
        parted = {s.path for s in sites if s.part}
        sites = [s for s in sites if s.part or s.path not in parted]  # rows where query, key and value have their own
        # Of a pipeline the half is the denoiser's: the autoencoder's attention is in no block.
        return _first_half(backbone.main(sites)) if self.placement == "thuml" else sites

    def shares(self, key: tuple[str, str], backbone: Backbone) -> str | None:
        return backbones.twin(".".join(key)) if self.tied else None

    def _check_ties(self, sites: Sequence[Site], backbone: Backbone) -> None:
        first: dict[str, Tensor] = {}
        for site in sites:
            if site.kind != "tensor" or (group := self.shares((site.path, site.part), backbone)) is None:
                continue
            tensor = getattr(backbone.module(site.path), site.part)
            one = first.setdefault(group, tensor)
            if one is not tensor and not tensor.is_meta and not torch.equal(one, tensor):
                raise SiteError(
                    f"{site}: this is not what the other blocks have, so that the copies cannot learn as one (they "
                    "are equal in a converted DiT): give tied=False for a copy each"
                )

    def adapters(self, sites: Sequence[Site], backbone: Backbone) -> dict[Site, Adapter]:
        table = PLACEMENTS[self.placement]
        scaled = [site for site in sites if site.kind != "tensor"]
        return {site: self._gamma(site, backbone.module(site.path), table[site.role]) for site in scaled}

    def _gamma(self, site: Site, module: nn.Module, vectors: int) -> Gamma:
        source = source_of(site.role, self.recompute)
        return Gamma(vectors, site.shape[0], len(site.shape) - 2, source, **factory(module))

    def learns(self, sites: Sequence[Site], backbone: Backbone) -> list[tuple[str, str]]:
        return [(site.path, site.part) for site in sites if site.kind == "tensor"]


def _selected(path: str, module: nn.Module, name: str) -> bool:
    if name.endswith("bias") or kind_of(module) == "norm":
        return True
    return isinstance(module, nn.Embedding) and bool(_TABLE.search(path))


def _first_half(sites: Sequence[Site]) -> list[Site]:
    blocks = {s: found.group(1) for s in sites if (found := _BLOCK.match(s.path))}
    if len(blocks) != len(sites):
        lost = next(s for s in sites if s not in blocks)
        raise SiteError(f"DiffFit at {lost}: in which block this is cannot be told, so placement='thuml' has no half")
    order = list(dict.fromkeys(blocks.values()))
    first = set(order[: len(order) // 2])
    return [s for s in sites if blocks[s] in first]


class Gamma(Rescaling):
    """gamma (vectors, channels), their product taken."""

    def __init__(self, vectors: int, channels: int, dims: int, source: str, **kw: Any) -> None:
        super().__init__(dims, source)
        self.gamma = nn.Parameter(torch.empty(vectors, channels, **kw))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gamma)

    def factors(self) -> tuple[Tensor, Tensor]:
        gamma = self.gamma.prod(0)
        return gamma, torch.zeros_like(gamma)

    def weight(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        gamma = self.gamma.prod(0)
        return w * gamma.view(-1, *[1] * (w.dim() - 1)), None if b is None else b * gamma
