"""How much memory a model takes while it learns, for how much time: `attach(model, method, memory=...)`.

    rebuild      adapters keep nothing that the frozen model does not keep; their inputs are made again (default)
    keep         adapters keep their inputs, as any autograd code would: a little faster, the memory of full fine-tuning
    checkpoint   each block keeps only its input and is run again in backward: a third more time
    reversible   blocks keep a few bits and are undone in backward; changes the model: see `visionpeft.reversible`

The first two are one setting for all adapters of a model, the last given counts. The others belong to the tuner: they
come and go with it. `docs/benchmarks.md` has the cost of each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from visionpeft import binding
from visionpeft.adapter import Adapter
from visionpeft.errors import SiteError, VisionPEFTError
from visionpeft.reversible import Chain, ReversibleSite

if TYPE_CHECKING:
    from visionpeft.sites import Backbone

CHOICES = ("rebuild", "keep", "checkpoint", "reversible")


def check(memory: str) -> None:
    """Refuse what is no choice."""
    if memory not in CHOICES:
        raise VisionPEFTError(f"memory={memory!r}: there are {', '.join(CHOICES)}")


def dress(backbone: Backbone, memory: str, put: Callable[..., binding.Holder]) -> None:
    """Dress the blocks as the choice wants; `put(module, mixin)` does it.

    Raises:
        SiteError: the choice acts on blocks, and the model has none that are known.
    """
    if memory == "checkpoint":
        for path in blocks(backbone):
            put(backbone.module(path), CheckpointSite)
    elif memory == "reversible":
        for row in _rows(backbone):
            chain = Chain(len(row))
            for index, block in enumerate(row):
                put(block, ReversibleSite).chain = chain, index


def _rows(backbone: Backbone) -> list[list[nn.Module]]:
    """Blocks that stand side by side in one container and keep the size of what they are given."""
    rows: dict[str, list[nn.Module]] = {}
    for path in blocks(backbone):
        rows.setdefault(path.rpartition(".")[0], []).append(backbone.module(path))
    found = [row for row in rows.values() if len(row) > 1]
    if not found:
        raise SiteError("no two blocks stand side by side here: memory= can be rebuild, keep or checkpoint")
    return found


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
