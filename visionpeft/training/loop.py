"""The training loop: any model, any feed, one recipe; resumes to the same numbers after a kill."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visionpeft.errors import VisionPEFTError, require
from visionpeft.methods.mosa import consistency as apart
from visionpeft.training import checkpoint, runs
from visionpeft.training.feed import Feed
from visionpeft.training.order import Update, seed_all, updates
from visionpeft.training.recipe import Criterion, Recipe, make_optimizer, make_scheduler

Evaluate = Callable[[nn.Module], dict[str, float]]
Progress = Callable[[int, int, float], None]


class DivergedError(VisionPEFTError):
    """The loss is no longer a finite number."""


@dataclass
class History:
    """What a training run leaves behind."""

    rows: list[dict[str, float]] = field(default_factory=list)
    """One per epoch: epoch, lr, train_loss, train_accuracy and whatever `evaluate` gave."""
    seconds_per_step: float = 0.0
    """Median wall time of an update in this process, data included."""
    seconds_waiting: float = 0.0
    """Median part of it that was spent waiting for data."""
    steps: int = 0
    resumed_at: int = 0
    """Updates that had been done before this process took over."""


def fit(model: nn.Module, feed: Feed, recipe: Recipe, accelerator: Any, criterion: Criterion, *, seed: int = 0,
        mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None, folder: Path | None = None,
        evaluate: Evaluate | None = None, evaluate_every: int = 1, progress: Progress | None = None,
        checkpoint_seconds: float = 60.0, consistency: float = 0.0) -> History:
    """Train in place what requires grad in `model`.

    Args:
        feed: training inputs and targets.
        accelerator: an accelerate.Accelerator; owns device, precision and processes.
        criterion: loss per sample, see `make_criterion`.
        seed: with the epoch it fixes the order of the data; with step and process all other random draws.
        mixup: changes (inputs, targets) of a batch, see `make_mixup`.
        folder: where metrics.jsonl and checkpoint.pt are written; a checkpoint found there is resumed.
        evaluate: gives extra columns for the epoch's row, every `evaluate_every` epochs and after the last.
        progress: called after each update with (updates done, all updates, loss).
        checkpoint_seconds: least time between two checkpoints; several processes write at ends of epochs only.
        consistency: weight of the symmetric KL between the logits of two forwards, which MoSA adds to the loss.

    Raises:
        DivergedError: the loss is not finite; nothing has been updated with it.
        CheckpointError: the checkpoint is unreadable or of another run.
    """
    run = _Run(model, feed, recipe, accelerator, criterion, seed, mixup, folder, checkpoint_seconds, consistency)
    try:
        for epoch in range(run.start_epoch, recipe.epochs):
            run.epoch(epoch, progress)
            due = evaluate is not None and ((epoch + 1) % evaluate_every == 0 or epoch + 1 == recipe.epochs)
            run.close_epoch(epoch, evaluate(run.evaluated) if evaluate is not None and due else {})
    finally:
        run.release()
    return run.finish()


class _Run:
    """The state of one `fit`."""

    def __init__(self, model: nn.Module, feed: Feed, recipe: Recipe, accelerator: Any, criterion: Criterion,
                 seed: int, mixup: Any, folder: Path | None, checkpoint_seconds: float, consistency: float) -> None:
        self.model, self.feed, self.recipe, self.accelerator = model, feed, recipe, accelerator
        self.criterion, self.seed, self.mixup, self.consistency = criterion, seed, mixup, consistency
        self.folder, self.checkpoint_seconds = folder, checkpoint_seconds
        self.per_epoch = recipe.updates_per_epoch(len(feed))
        model.to(accelerator.device)
        self.had_forward = "forward" in vars(model)
        self.ema = self._make_ema()
        optimizer = make_optimizer(model, recipe)
        self.scheduler = make_scheduler(optimizer, recipe, self.per_epoch)
        self.wrapped, self.optimizer = accelerator.prepare(model, optimizer)
        self.history = History()
        self.loss_sum = self.correct = 0.0
        self.seen = self.start_epoch = self.start_update = 0
        self.times: list[float] = []
        self.waits: list[float] = []
        self._resume()
        self.saved_at = time.monotonic()

    @property
    def evaluated(self) -> nn.Module:
        """The model that counts: the moving average if there is one."""
        return self.model if self.ema is None else self.ema.module

    def _make_ema(self) -> Any:
        if self.recipe.ema is None:
            return None
        return require("timm.utils", extra="timm").ModelEmaV3(self.model, decay=self.recipe.ema, use_warmup=True)

    def epoch(self, epoch: int, progress: Progress | None) -> None:
        """Do the remaining updates of an epoch."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        todo = updates(len(self.feed), self.recipe, self.seed, epoch, rank, world)[self.start_update:]
        # A process without a share of a short batch still has to take part in the exchange of gradients.
        pieces = [piece for update in todo for piece in (update.pieces or [[0]])]
        batches = self.feed.batches(pieces, self.seed, epoch)
        self.wrapped.train()
        for number, update in enumerate(todo, start=self.start_update):
            begin = time.perf_counter()
            loss = self._update(epoch, number, update, batches)
            self.times.append(time.perf_counter() - begin)
            self._checkpoint(epoch, number + 1)
            if progress is not None:
                progress(epoch * self.per_epoch + number + 1, self.recipe.epochs * self.per_epoch, loss)
        self.start_update = 0

    def _update(self, epoch: int, number: int, update: Update, batches: Any) -> float:
        step = epoch * self.per_epoch + number
        # The value is a function of the position alone, so that a resumed run needs no state of the schedule.
        if self.recipe.schedule == "update":
            self.scheduler.step_update(step)
        else:
            self.scheduler.step(epoch)
        # After a kill the same update draws the same dropout and drop-path.
        seed_all(self.seed, step, self.accelerator.process_index, 1)
        total = waited = 0.0
        pieces = update.pieces or [[]]
        for index, piece in enumerate(pieces):
            begin = time.perf_counter()
            inputs, targets = next(batches)
            waited += time.perf_counter() - begin
            last = index == len(pieces) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                total += self._backward(inputs, targets, piece, update.size, (epoch, number))
        self._step(step)
        self.waits.append(waited)
        return total / max(update.share, 1)

    def _backward(self, inputs: Tensor, targets: Tensor, piece: list[int], size: int, at: tuple[int, int]) -> float:
        """Add the gradients of a piece of a batch of `size` images; return the sum of its losses."""
        device = self.accelerator.device
        inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        mixed = self.mixup(inputs, targets) if self.mixup is not None else (inputs, targets)
        with self.accelerator.autocast():
            logits = self.wrapped(mixed[0])
        losses = self.criterion(logits, mixed[1])
        if self.consistency:
            with self.accelerator.autocast():
                again = self.wrapped(mixed[0])
            losses = losses + self.consistency * apart(logits.float(), again.float())
        if not piece:
            losses = losses * 0.0
        value = float(losses.detach().sum())
        if not math.isfinite(value):
            raise DivergedError(self._diverged(value, piece, at))
        # Processes average their gradients: with this scale the average is that of the whole batch, however shared.
        self.accelerator.backward(losses.sum() * (self.accelerator.num_processes / size))
        self._count(value, logits.detach(), targets, len(piece))
        return value

    def _count(self, value: float, logits: Tensor, targets: Tensor, images: int) -> None:
        self.loss_sum += value
        self.seen += images
        if images:
            self.correct += _correct(logits, targets)

    def _diverged(self, value: float, piece: list[int], at: tuple[int, int]) -> str:
        names = ", ".join(self.feed.name(i) for i in piece[:4])
        return (f"the loss became {value} in epoch {at[0] + 1}, update {at[1] + 1} of {self.per_epoch} (step "
                f"{at[0] * self.per_epoch + at[1] + 1}), in a batch of {len(piece)} images beginning with {names}. "
                f"Lower the learning rate (now {self.recipe.lr:g}), set --clip 1, or look at these images")

    def _step(self, step: int) -> None:
        if self.recipe.clip is not None:
            learning = [p for p in self.model.parameters() if p.requires_grad]
            self.accelerator.clip_grad_norm_(learning, self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.model, step=step + 1)

    def close_epoch(self, epoch: int, extra: dict[str, float]) -> None:
        """Write the epoch's row."""
        sums = torch.tensor([self.loss_sum, self.correct, float(self.seen)], dtype=torch.float64)
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums.to(self.accelerator.device), reduction="sum").cpu()
        loss, correct, seen = sums.tolist()
        row = {"epoch": epoch + 1, "lr": self.optimizer.param_groups[0]["lr"], "train_loss": loss / seen}
        if not math.isnan(correct) and self.mixup is None:
            row["train_accuracy"] = correct / seen
        self.history.rows.append(row | extra)
        self.accelerator.log({k: v for k, v in (row | extra).items() if k != "epoch"}, step=epoch + 1)
        self._write_rows()
        self.loss_sum, self.correct, self.seen = 0.0, 0.0, 0
        self._checkpoint(epoch + 1, 0)

    def _write_rows(self) -> None:
        if self.folder is None or not self.accelerator.is_main_process:
            return
        runs.write_text(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.history.rows))

    def _checkpoint(self, epoch: int, update: int) -> None:
        """Save after a while; the position is that of the next update."""
        alone = self.accelerator.num_processes == 1
        due = time.monotonic() - self.saved_at >= self.checkpoint_seconds
        if self.folder is None or not due or not (alone or update == 0) or not self.accelerator.is_main_process:
            return
        checkpoint.write(self.folder / "checkpoint.pt", {
            "recipe": asdict(self.recipe), "seed": self.seed, "images": len(self.feed),
            "epoch": epoch, "update": update, "rows": self.history.rows,
            "sums": [self.loss_sum, self.correct, self.seen],
            "model": checkpoint.learnt(self.model),
            "ema": None if self.ema is None else checkpoint.learnt(self.ema.module),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
        })
        self.saved_at = time.monotonic()

    def _resume(self) -> None:
        if self.folder is None or not (self.folder / "checkpoint.pt").exists():
            return
        state = checkpoint.read(self.folder / "checkpoint.pt")
        same = {"recipe": asdict(self.recipe), "seed": self.seed, "images": len(self.feed)}
        if any(state.get(key) != value for key, value in same.items()):
            raise checkpoint.CheckpointError(
                f"{self.folder / 'checkpoint.pt'} is of a run with another recipe, seed or data; delete it or "
                "choose another folder")
        checkpoint.restore(self.model, state["model"])
        if self.ema is not None:
            checkpoint.restore(self.ema.module, state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.start_epoch, self.start_update = state["epoch"], state["update"]
        self.history.rows = state["rows"]
        self.loss_sum, self.correct, self.seen = state["sums"]
        self.history.resumed_at = self.start_epoch * self.per_epoch + self.start_update

    def release(self) -> None:
        """Take off what accelerate put around the model: DDP, and under mixed precision an instance-level forward."""
        self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        if not self.had_forward:
            self.model.__dict__.pop("forward", None)

    def finish(self) -> History:
        """Put the moving average into the model and sum up."""
        if self.ema is not None:
            self.model.load_state_dict(self.ema.module.state_dict())
        self.history.steps = self.recipe.epochs * self.per_epoch
        self.history.seconds_per_step = statistics.median(self.times) if self.times else 0.0
        self.history.seconds_waiting = statistics.median(self.waits) if self.waits else 0.0
        return self.history


def _correct(logits: Tensor, targets: Tensor) -> float:
    """Sum over images of 1 or 0, for masks of the share of right pixels among those with a class; NaN for multi-label.

    Args:
        logits: [B, C] or [B, C, H, W].
        targets: int64 [B] or [B, H, W], where negative and too large numbers are no class.
    """
    if targets.ndim == logits.ndim:
        return math.nan
    right = (logits.argmax(1) == targets).view(len(targets), -1)
    known = ((targets >= 0) & (targets < logits.shape[1])).view(len(targets), -1)
    return float((right.sum(1) / known.sum(1).clamp(min=1)).sum())
