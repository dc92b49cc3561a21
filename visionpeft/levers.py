"""How much memory a model takes while it learns, for how much time: `attach(model, method, memory=...)`.

    rebuild      adapters keep nothing that the frozen model does not keep; their inputs are made again (default)
    keep         adapters keep their inputs, as any autograd code would: a little faster, the memory of full fine-tuning
    checkpoint   each block keeps only its input and is run again in backward: a third more time
    reversible   blocks keep a few bits and are undone in backward; changes the model: see `visionpeft.reversible`

While a tuner with `keep` acts, all adapters of the model keep. The last two belong to the blocks where the tuner acts:
they come and go with it. `docs/benchmarks.md` has the cost of each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._C._functorch import peek_interpreter_stack
from torch.utils.checkpoint import checkpoint

from visionpeft import binding
from visionpeft.errors import SiteError, VisionPEFTError
from visionpeft.reversible import Chain, ReversibleSite
from visionpeft.sites import inside

if TYPE_CHECKING:
    from visionpeft.tuner import Tuner

CHOICES = ("rebuild", "keep", "checkpoint", "reversible")


def check(memory: str) -> None:
    """Refuse what is no choice."""
    if memory not in CHOICES:
        raise VisionPEFTError(f"memory={memory!r}: there are {', '.join(CHOICES)}")


def dress(tuner: Tuner, put: Callable[..., binding.Holder]) -> None:
    """Dress the blocks as the tuner's choice wants; `put(module, mixin)` does it.

    Raises:
        SiteError: the choice acts on blocks, and none are known where the tuner acts.
    """
    if tuner.memory not in ("checkpoint", "reversible"):
        return
    rows = _rows(tuner)
    if not rows:
        raise SiteError(
            f"memory={tuner.memory!r}: no blocks are known where {tuner.name!r} acts, so rebuild and keep are left; if "
            "the model has checkpointing of its own, switch that on"
        )
    if tuner.memory == "checkpoint":
        for block in (block for row in rows for block in row):
            put(block, CheckpointSite)
        return
    if not any(len(row) > 1 for row in rows):
        raise SiteError("memory='reversible': no two blocks stand side by side where the tuner acts: use checkpoint")
    for row in (row for row in rows if len(row) > 1):
        chain = Chain()
        for block in row:
            place = "first" if block is row[0] else "last" if block is row[-1] else "middle"
            put(block, ReversibleSite).chain = chain, place


def _rows(tuner: Tuner) -> list[list[nn.Module]]:
    """The outermost blocks by the container where they stand; of containers without anything of the tuner's none."""
    backbone = tuner.backbone
    found = list(dict.fromkeys(s.path for s in backbone.sites() if s.kind in ("block", "branch")))
    rows: dict[str, list[str]] = {}
    for path in (p for p in found if not any(p != q and p.startswith(f"{q}.") for q in found)):
        rows.setdefault(path.rpartition(".")[0], []).append(path)
    own = {site.path for site in tuner.sites} | {path for path, _ in tuner.in_place}
    return [[backbone.module(p) for p in row] for row in rows.values() if any(inside(path, row) for path in own)]


class CheckpointSite(binding.Mixin):
    """A block that keeps its input alone while the tuner acts and gradients are wanted."""

    layer = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        acts, inner = CheckpointSite.__name__ in self.peft.levers, super().forward  # type: ignore[misc]
        if not (acts and torch.is_grad_enabled()) or peek_interpreter_stack() is not None:
            return inner(*args, **kwargs)
        if torch.compiler.is_compiling():
            return checkpoint(inner, *args, use_reentrant=False, **kwargs)
        before = _acting(self)  # type: ignore[arg-type]

        def run(*args: Any, **kwargs: Any) -> Any:
            if _acting(self) != before:  # type: ignore[arg-type]
                raise VisionPEFTError(
                    'memory="checkpoint": adapters were switched or scaled between forward and backward, and backward '
                    "runs the blocks again"
                )
            return inner(*args, **kwargs)

        return checkpoint(run, *args, use_reentrant=False, **kwargs)


def _acting(block: nn.Module) -> list[tuple[int, float]]:
    """Who acts in a block, and how strongly."""
    return [(id(a), a.strength) for _, _, held in binding.holders(block) for a in held.now or ()]
