"""What a training run does, as one frozen dataclass, and the optimiser, schedule and loss that it names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visionpeft import backbones
from visionpeft.errors import VisionPEFTError, require

Criterion = Callable[[Tensor, Tensor], Tensor]
Mixing = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class RecipeError(VisionPEFTError):
    """Settings of a training run contradict each other."""


@dataclass(frozen=True)
class Recipe:
    """Settings of one training run; the defaults are the common recipe of VTAB-1k papers (AdamW, cosine)."""

    lr: float = 1e-3
    """Peak learning rate."""
    head_lr: float = 1.0
    """That of the head (classifier or decoder), as a multiple of lr."""
    weight_decay: float = 1e-4
    epochs: int = 100
    batch_size: int = 64
    """Images per update, over all processes and accumulation steps."""
    optimizer: str = "adamw"
    """Any optimiser name of timm."""
    warmup_epochs: int = 10
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    schedule: str = "epoch"
    """Whether the learning rate moves once per "epoch" or per "update"."""
    decay_1d: bool = True
    """Whether weight decay also acts on vectors (biases, norms, SSF's scales); timm's own habit is not to."""
    drop_path: float = 0.0
    label_smoothing: float = 0.0
    dice: float = 0.0
    """Weight of the Dice loss beside the cross-entropy, for masks."""
    mixup: float = 0.0
    cutmix: float = 0.0
    augment: str | None = None
    """Name of a random augmentation of visionpeft.data; None trains on the plain images."""
    class_weights: bool = False
    """Weigh classes by inverse frequency, mean one over the training images."""
    drop_last: bool = False
    """Leave out the last, short batch of an epoch."""
    ema: float | None = None
    """Decay of a moving average of the weights, which is then what is evaluated and saved."""
    clip: float | None = None
    """Largest gradient norm."""
    accumulation: int = 1
    """Pieces in which a batch is computed; the update is the same as without, to rounding."""

    def __post_init__(self) -> None:
        if self.schedule not in ("epoch", "update"):
            raise RecipeError(f'schedule is "epoch" or "update", not {self.schedule!r}')
        if min(self.epochs, self.batch_size, self.accumulation) < 1:
            raise RecipeError("epochs, batch_size and accumulation are at least 1")
        if self.head_lr <= 0:
            raise RecipeError(f"head_lr={self.head_lr:g}: expected a multiple of lr above 0")
        if not 0 <= self.warmup_epochs < max(self.epochs, 1):
            raise RecipeError(f"warmup_epochs={self.warmup_epochs} must be less than epochs={self.epochs}")

    def updates_per_epoch(self, images: int) -> int:
        """Number of optimiser steps in an epoch over `images` images."""
        if self.drop_last and images >= self.batch_size:
            return images // self.batch_size
        return -(-images // self.batch_size)


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """timm's optimiser over what requires grad in `model`, biases without weight decay unless decay_1d.

    Raises:
        RecipeError: the head is to have a rate of its own, and it is not known where it is.
    """
    factory = require("timm.optim", extra="timm")
    options: dict[str, Any] = {"filter_bias_and_bn": not recipe.decay_1d}
    if recipe.head_lr != 1:
        options = {"param_group_fn": partial(_with_head, recipe=recipe)}
    return factory.create_optimizer_v2(
        model, opt=recipe.optimizer, lr=recipe.lr, weight_decay=recipe.weight_decay, **options)


def _with_head(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """timm's groups of parameters, each in two: what is not in the head and what is."""
    paths = backbones.heads(model) or ([] if any(model.children()) else [""])  # a single layer is a head by itself
    if not paths:
        raise RecipeError(f"head_lr={recipe.head_lr:g}: it is not known where {type(model).__name__} has its head")
    head = {id(p) for path in paths for p in model.get_submodule(path).parameters()}
    timm = require("timm.optim", extra="timm")
    found = []
    spares: Any = getattr(model, "no_weight_decay", None)
    spared = () if spares is None else spares()
    for group in timm.param_groups_weight_decay(model, recipe.weight_decay, not recipe.decay_1d, spared):
        for scale, inside in ((1.0, False), (recipe.head_lr, True)):
            if params := [p for p in group["params"] if (id(p) in head) == inside]:
                found.append(group | {"params": params, "lr_scale": scale})  # timm's schedules multiply by it
    return found


def make_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, updates_per_epoch: int) -> Any:
    """timm's cosine with linear warm-up; its value depends on the position alone, so it has no state to save."""
    factory = require("timm.scheduler", extra="timm")
    scheduler, _ = factory.create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=recipe.epochs, warmup_epochs=recipe.warmup_epochs,
        warmup_lr=min(recipe.warmup_lr, recipe.lr), min_lr=min(recipe.min_lr, recipe.lr),
        step_on_epochs=recipe.schedule == "epoch", updates_per_epoch=updates_per_epoch,
    )
    return scheduler


def make_criterion(recipe: Recipe, multi_label: bool, weights: Tensor | None = None) -> Criterion:
    """Loss per sample [B] from logits [B, C] and targets int64 [B] or float [B, C].

    Single label: cross-entropy, smoothed, weighted by class. Multi-label: binary cross-entropy, mean over classes,
    `weights` being those of the positives.

    Args:
        weights: float [C] of visionpeft.data.class_weights.
    """
    if recipe.dice:
        raise RecipeError("the Dice loss is for masks")
    if multi_label:
        if recipe.label_smoothing or recipe.mixup or recipe.cutmix:
            raise RecipeError("label smoothing, mixup and cutmix need single-label data")
        return _Binary(weights)
    # With mixup the targets are already soft and smoothed.
    return _CrossEntropy(weights, 0.0 if recipe.mixup or recipe.cutmix else recipe.label_smoothing)


@dataclass(frozen=True)
class _Binary:
    weights: Tensor | None

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        positive = None if self.weights is None else self.weights.to(logits.device)
        losses = F.binary_cross_entropy_with_logits(
            logits.float(), target.float(), pos_weight=positive, reduction="none")
        return losses.mean(1)


@dataclass(frozen=True)
class _CrossEntropy:
    weights: Tensor | None
    smoothing: float

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        weights = None if self.weights is None else self.weights.to(logits.device)
        return F.cross_entropy(logits.float(), target, weights, reduction="none", label_smoothing=self.smoothing)


def make_mixup(recipe: Recipe, classes: int) -> Mixing | None:
    """timm's mixup and cutmix, or None when both are off."""
    if not (recipe.mixup or recipe.cutmix):
        return None
    mixup = require("timm.data.mixup", extra="timm")
    mix = mixup.Mixup(mixup_alpha=recipe.mixup, cutmix_alpha=recipe.cutmix, num_classes=classes,
                      label_smoothing=recipe.label_smoothing)
    return _Pairs(mix, mixup.mixup_target, classes, recipe.label_smoothing)


@dataclass(frozen=True)
class _Pairs:
    """timm mixes images in pairs and refuses odd batches: here the odd one out stays as it is."""

    mix: Mixing
    soften: Callable[..., Tensor]
    classes: int
    smoothing: float

    def __call__(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs [B, C, H, W], targets int64 [B] -> mixed inputs and soft targets [B, classes]."""
        even = len(inputs) // 2 * 2
        alone = self.soften(targets[even:], self.classes, 1.0, self.smoothing)
        if not even:
            return inputs, alone
        mixed, soft = self.mix(inputs[:even].clone(), targets[:even])
        return torch.cat([mixed, inputs[even:]]), torch.cat([soft, alone])
