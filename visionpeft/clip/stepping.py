"""The loop of CLIP's training runs: a number of updates, which a killed run takes up to the same bits on a CPU.

Nothing random needs saving: before every update all generators are seeded with (seed, update), as in
`visionpeft.training`, whose checkpoints these are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visionpeft.clip.errors import ClipError
from visionpeft.training import checkpoint
from visionpeft.training.order import seed_all

Watch = Callable[[int, int, float], None]


def alone(accelerator: Any) -> Any:
    """The accelerator.

    Raises:
        ClipError: there are several processes, each of which would do the whole run and write the same files.
    """
    if accelerator.num_processes > 1:
        raise ClipError(f"CLIP jobs run in one process, and here are {accelerator.num_processes}: start it without "
                        "`accelerate launch`")  # fmt: skip
    return accelerator


@dataclass(frozen=True)
class Steps:
    """Optimiser and schedule. The defaults are CLIP-LoRA's (Zanella and Ben Ayed, arXiv 2405.18541).

    Attributes:
        count: updates; the learning rate falls by a cosine from lr to min_lr over them.
        warmup: first updates, at `warmup_lr`.
        augment: of visionpeft.data; None trains on the images as they are evaluated.
    """

    count: int
    batch: int = 32
    lr: float = 2e-4
    weight_decay: float = 1e-2
    optimizer: str = "adamw"
    min_lr: float = 1e-6
    warmup: int = 0
    warmup_lr: float = 1e-5
    augment: str | None = "resized_crop"

    def __post_init__(self) -> None:
        if self.count < 1 or self.batch < 1 or self.optimizer not in ("adamw", "sgd"):
            raise ClipError(f"{self}: expected at least one update of one image, by adamw or sgd")

    def rate(self, step: int) -> float:
        """Learning rate of an update, counted from 0."""
        if step < self.warmup:
            return self.warmup_lr
        return self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * step / self.count)) / 2

    def optimiser(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=self.lr, momentum=0.9, weight_decay=self.weight_decay)
        return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)


@dataclass
class EpochAverage:
    """sum_e w_e theta_e over the ends of epochs, in double precision; short of a whole epoch the rest counts as one.

    Attributes:
        weights: one for each epoch; they sum to 1.
        per_epoch: updates of an epoch.
    """

    weights: Sequence[float]
    per_epoch: int
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, module: nn.Module, done: int, last: bool) -> None:
        """Take note of the parameters after `done` updates."""
        if done % self.per_epoch and not last:
            return
        weight = self.weights[(done - 1) // self.per_epoch]
        for name, p in module.named_parameters():
            if p.requires_grad:
                part = weight * p.detach().double()
                self.sums[name] = self.sums[name] + part if name in self.sums else part

    @torch.no_grad()
    def put(self, module: nn.Module) -> None:
        """Give the module the average."""
        for name, p in module.named_parameters():
            if p.requires_grad:
                p.copy_(self.sums[name])


@dataclass
class Loop:
    """
    Attributes:
        module: what requires grad in it learns.
        identity: what else decides the numbers; a checkpoint of something else is refused.
        folder: where checkpoint.pt is written and looked for; None keeps none.
        seconds: least time between two checkpoints.
        watch: called with (updates done, all updates, loss).
    """

    module: nn.Module
    steps: Steps
    seed: int
    accelerator: Any
    identity: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    seconds: float = 60.0
    average: EpochAverage | None = None
    watch: Watch | None = None

    def run(self, update: Callable[[int], Tensor]) -> list[float]:
        """Do the updates that are not done; returns the losses of all.

        Args:
            update: number of an update -> its loss, gradients added.

        Raises:
            ClipError: the loss is no number any more; nothing was updated with it.
            CheckpointError: the checkpoint is unreadable or of another run.
        """
        learning = [p for p in self.module.parameters() if p.requires_grad]
        optimiser = self.accelerator.prepare_optimizer(self.steps.optimiser(learning))
        losses, saved = self._resume(optimiser), time.monotonic()
        for step in range(len(losses), self.steps.count):
            losses.append(self._update(update, optimiser, step))
            if self.folder is not None and time.monotonic() - saved >= self.seconds:
                self._save(optimiser, losses)
                saved = time.monotonic()
            if self.watch is not None:
                self.watch(step + 1, self.steps.count, losses[-1])
        if self.average is not None:
            self.average.put(self.module)
        return losses

    def _update(self, update: Callable[[int], Tensor], optimiser: Any, step: int) -> float:
        for group in optimiser.param_groups:
            group["lr"] = self.steps.rate(step)
        seed_all(self.seed, step, 0, 1)
        optimiser.zero_grad()
        loss = float(update(step).detach())
        if not math.isfinite(loss):
            raise ClipError(f"the loss is {loss} at update {step}: lower the learning rate")
        optimiser.step()
        if self.average is not None:
            self.average.add(self.module, step + 1, step + 1 == self.steps.count)
        return loss

    def _told(self) -> dict[str, Any]:
        return {"steps": asdict(self.steps), "seed": self.seed, **self.identity}

    def _save(self, optimiser: Any, losses: list[float]) -> None:
        assert self.folder is not None
        scaler = self.accelerator.scaler
        checkpoint.write(self.folder / "checkpoint.pt", {
            **self._told(), "losses": losses, "model": checkpoint.learnt(self.module),
            "optimizer": optimiser.state_dict(), "scaler": None if scaler is None else scaler.state_dict(),
            "average": None if self.average is None else self.average.sums,
        })  # fmt: skip

    def _resume(self, optimiser: Any) -> list[float]:
        """The losses of what an earlier run did, its state put back."""
        if self.folder is None or not (path := self.folder / "checkpoint.pt").exists():
            return []
        state = checkpoint.read(path)
        if other := [key for key, value in self._told().items() if state.get(key) != value]:
            raise checkpoint.CheckpointError(f"{path} is of another run ({other[0]} differs); delete it")
        checkpoint.restore(self.module, state["model"])
        optimiser.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.sums = state["average"]
        return state["losses"]
