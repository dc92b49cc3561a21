r"""NOAH's sub-networks (Zhang et al. 2022, arXiv 2206.04673; official code ZhangYuanhan-AI/NOAH).

Every block of a ViT has, each with a width of its own or not at all,

    LoRA      one pair A (r, D), B (3 D, r) on the fused qkv, scale 1          LoRA at the path of qkv
    adapter   x + z + Up quick_gelu(Down z) behind the MLP                     Pfeiffer
    prompts   learnt tokens, dropped behind the block                          VPT

The search over widths is not here: give what it found, `NOAH(lora=(8, 0, 5, ...), adapter=..., prompts=...)`, one
number for all blocks or one for each, 0 for none. NOAH puts its prompts last, here they follow the class token, which
makes no difference to attention; its further prompts of the first layer with their position table are left out. Not the
identity at the start. Does not merge as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from visionpeft import backbones
from visionpeft.adapter import Adapter, Method, factory
from visionpeft.errors import MethodError, SiteError
from visionpeft.methods.bottleneck import Pfeiffer
from visionpeft.methods.lora import LoRA
from visionpeft.methods.vpt import VPT, Prompts
from visionpeft.sites import Backbone, Site

Widths = int | tuple[int, ...]
PARTS = {"qkv": "lora", "mlp": "adapter", "block": "prompts"}  # role of the site -> field


@dataclass(frozen=True)
class NOAH(Method):
    """
    Attributes:
        lora, adapter, prompts: width of each in all blocks, or in each block; the search space has 0, 1, 5 and 10.
        dropout: probability, in all three.
    """

    key: ClassVar[str] = "noah"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "branch", "block"})

    lora: Widths = 5
    adapter: Widths = 5
    prompts: Widths = 5
    dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in PARTS.values():
            value = getattr(self, name)
            if not isinstance(value, int):
                object.__setattr__(self, name, tuple(value))  # JSON has lists
            if min(value if not isinstance(value, int) else (value,)) < 0:
                raise MethodError(f"{name}={value}: expected widths of 0 or more")

    def default_targets(self, backbone: Backbone) -> str:
        return "block"

    def choose(self, backbone: Backbone) -> list[Site]:
        """The sites in every chosen block that have a width there."""
        blocks = [site.path for site in super().choose(backbone) if site.kind == "block"]
        every = [site.path for site in backbone.sites() if site.kind == "block"]
        found = []
        for site in backbone.sites():
            block = next((p for p in blocks if site.path == p or site.path.startswith(p + ".")), None)
            if block is not None and site.role in PARTS and self._width(site, every):
                found.append(site)
        if not found:
            raise SiteError("NOAH has no width above 0 at any block")
        return found

    def _width(self, site: Site, blocks: Sequence[str]) -> int:
        """The width at a site; blocks are all those of the model, in order."""
        value = getattr(self, PARTS[site.role])
        if isinstance(value, int):
            return value
        if len(value) != len(blocks):
            raise MethodError(f"{PARTS[site.role]} has {len(value)} widths, and the model {len(blocks)} blocks")
        return int(value[next(i for i, p in enumerate(blocks) if site.path == p or site.path.startswith(p + "."))])

    def adapters(self, sites: Sequence[Site], backbone: Backbone) -> dict[Site, Adapter]:
        blocks = [site.path for site in backbone.sites() if site.kind == "block"]
        found: dict[Site, Adapter] = {}
        for site in sites:
            width, module = self._width(site, blocks), backbone.module(site.path)
            if site.role == "qkv":
                found[site] = LoRA(rank=width, dropout=self.dropout).build(site, module)
            elif site.role == "mlp":
                found[site] = Pfeiffer(hidden=width, dropout=self.dropout).build(site, module)
            else:
                found[site] = self._prompts(width, site, module, backbone)
        return found

    def _prompts(self, width: int, site: Site, module: nn.Module, backbone: Backbone) -> Adapter:
        front = backbones.prefix_tokens(backbone.roots[backbone.split(site.path)[0]])
        bound = (6 / (width + site.shape[0])) ** 0.5  # Xavier
        kw: dict[str, Any] = factory(module)
        method = VPT(tokens=width, dropout=self.dropout)
        return Prompts(method, site.shape[0], min(1, front or 0), bound, drops=True, **kw)
