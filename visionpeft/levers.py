"""How much memory a model takes while it learns, for how much time: `attach(model, method, memory=...)`.

    rebuild      adapters keep nothing that the frozen model does not keep; their inputs are made again (default)
    keep         adapters keep their inputs, as any autograd code would: a little faster, the memory of full fine-tuning
    checkpoint   each block keeps only its input and is run again in backward: a third more time
    reversible   blocks keep nothing but a few bits and are undone in backward: see `visionpeft.reversible`

The first two are one setting for all adapters of a model, the last given counts. The others belong to the tuner: they
come and go with it. `docs/benchmarks.md` has the cost of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from visionpeft import binding
from visionpeft.adapter import Adapter
from visionpeft.errors import SiteError, VisionPEFTError

if TYPE_CHECKING:
    from visionpeft.sites import Backbone

CHOICES = ("rebuild", "keep", "checkpoint", "reversible")


def check(memory: str) -> None:
    """Refuse what is no choice."""
    if memory not in CHOICES:
        raise VisionPEFTError(f"memory={memory!r}: there are {', '.join(CHOICES)}")


def dressed(backbone: Backbone, memory: str) -> Iterator[tuple[nn.Module, type[binding.Mixin]]]:
    """Modules that the choice dresses, and how.

    Raises:
        SiteError: the choice acts on blocks, and the model has none that are known.
    """
    if memory == "checkpoint":
        for path in blocks(backbone):
            yield backbone.module(path), CheckpointSite


def blocks(backbone: Backbone) -> list[str]:
    """Paths of the outermost blocks.

    Raises:
        SiteError: there are none.
    """
    found = [path for path in dict.fromkeys(s.path for s in backbone.sites() if s.kind in ("block", "branch"))]
    outer = [p for p in found if not any(p != q and p.startswith(f"{q}.") for q in found)]
    if not outer:
        raise SiteError(
            "no blocks are known of this model, so memory= can only be rebuild or keep; if the model has checkpointing "
            "of its own, switch that on"
        )
    return outer


def set_route(held: binding.Holder, route: str) -> None:
    """How the Linears and adapters here compute: rebuild, keep or plain."""
    held.route = route
    for module in held.modules():
        if isinstance(module, Adapter):
            module.route = route


class CheckpointSite(binding.Mixin):
    """A block that keeps its input alone while the tuner acts and gradients are wanted."""

    layer = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        users = self.peft.users
        acts = any(CheckpointSite in users[name] for name in self.peft.active if name in users)
        if not (acts and torch.is_grad_enabled()):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return checkpoint(super().forward, *args, use_reentrant=False, **kwargs)  # type: ignore[misc]
