"""Optimiser, schedule and loss are what the recipe says."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import visionpeft as vp
from visionpeft.training import Recipe
from visionpeft.training.recipe import RecipeError, make_criterion, make_mixup, make_optimizer, make_scheduler


def rates(recipe: Recipe, per_epoch: int = 4) -> list[float]:
    """Learning rate of every epoch or update."""
    optimizer = make_optimizer(nn.Linear(2, 2), recipe)
    scheduler = make_scheduler(optimizer, recipe, per_epoch)
    step, count = (scheduler.step, recipe.epochs) if recipe.schedule == "epoch" else (
        scheduler.step_update, recipe.epochs * per_epoch)
    found = []
    for position in range(count):
        step(position)
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("schedule, unit", [("epoch", 1), ("update", 4)])
def test_cosine_after_linear_warm_up(schedule: str, unit: int) -> None:
    recipe = Recipe(lr=1.0, epochs=10, warmup_epochs=2, warmup_lr=0.1, min_lr=0.2, schedule=schedule)
    warm, total = 2 * unit, 10 * unit
    expected = [0.1 + 0.9 * t / warm if t < warm else 0.2 + 0.4 * (1 + math.cos(math.pi * t / total))
                for t in range(total)]
    assert rates(recipe) == pytest.approx(expected)


@pytest.mark.parametrize("decay_1d, expected", [(True, {0.1}), (False, {0.0, 0.1})])
def test_vectors_decay_only_if_asked(decay_1d: bool, expected: set[float]) -> None:
    groups = make_optimizer(nn.Linear(2, 2), Recipe(weight_decay=0.1, decay_1d=decay_1d)).param_groups
    assert {group["weight_decay"] for group in groups} == expected


def test_the_head_has_its_own_rate() -> None:
    """Behind the warm-up and at the end, for weights and biases; the rest is as without."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)
    vp.attach(model, vp.methods.BitFit(), train="head")
    rate, names = {}, {id(p): name for name, p in model.named_parameters()}
    for times in (1.0, 10.0):
        recipe = Recipe(lr=0.5, head_lr=times, weight_decay=0.1, epochs=4, warmup_epochs=1, min_lr=0.1, decay_1d=False)
        optimizer = make_optimizer(model, recipe)
        scheduler = make_scheduler(optimizer, recipe, 1)
        for epoch in (0, 1, 3):
            scheduler.step(epoch)
            for group in optimizer.param_groups:
                for p in group["params"]:
                    rate[times, epoch, names[id(p)]] = (group["lr"], group["weight_decay"])
    for (times, epoch, name), (lr, decay) in rate.items():
        plain, same = rate[1.0, epoch, name]
        assert lr == plain * (times if name.startswith("head.") else 1) and decay == same
    assert rate[1.0, 3, "head.weight"][1] == 0.1 and rate[1.0, 3, "blocks.0.attn.qkv.bias"][1] == 0


@pytest.mark.parametrize("decay_1d", [True, False])
def test_a_rate_for_the_head_spares_from_decay_what_timm_spares(decay_1d: bool) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)
    names = {id(p): name for name, p in model.named_parameters()}
    decays = [{names[id(p)]: group["weight_decay"] for group in make_optimizer(model, recipe).param_groups
               for p in group["params"]}
              for recipe in (Recipe(weight_decay=0.1, decay_1d=decay_1d, head_lr=times) for times in (1.0, 30.0))]
    assert decays[0] == decays[1] and decays[0]["pos_embed"] == 0


def test_where_the_head_is_must_be_known() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    with pytest.raises(RecipeError, match="not known where Sequential has its head"):
        make_optimizer(model, Recipe(head_lr=2))
    assert {group["lr_scale"] for group in make_optimizer(model[1], Recipe(head_lr=2)).param_groups} == {2}
    with pytest.raises(RecipeError, match="head_lr=0"):
        Recipe(head_lr=0)


def test_only_what_requires_grad_is_optimised() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3)).requires_grad_(False)
    model[1].requires_grad_(True)
    groups = make_optimizer(model, Recipe()).param_groups
    assert sum(p.numel() for group in groups for p in group["params"]) == 9


def test_cross_entropy_with_smoothing_and_weights() -> None:
    logits, target, weights = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0]), torch.tensor([1.0, 2.0, 0.5])
    losses = make_criterion(Recipe(label_smoothing=0.2), False, weights)(logits, target)
    log = logits.log_softmax(1)
    own = -weights[target] * log[torch.arange(5), target]
    assert torch.allclose(losses, 0.8 * own - 0.2 / 3 * (log * weights).sum(1))


def test_binary_cross_entropy_weighs_positives() -> None:
    logits, target, weights = torch.randn(4, 3), torch.randint(0, 2, (4, 3)).float(), torch.tensor([1.0, 2.0, 3.0])
    expected = -(weights * target * F.logsigmoid(logits) + (1 - target) * F.logsigmoid(-logits)).mean(1)
    assert torch.allclose(make_criterion(Recipe(), True, weights)(logits, target), expected)


@pytest.mark.parametrize("images", [1, 2, 7, 8])
def test_mixup_takes_any_batch(images: int) -> None:
    mix = make_mixup(Recipe(mixup=0.5, cutmix=1.0, label_smoothing=0.1), 4)
    inputs = torch.rand(images, 3, 8, 8)
    before = inputs.clone()
    mixed, soft = mix(inputs, torch.randint(0, 4, (images,)))
    assert mixed.shape == inputs.shape and soft.shape == (images, 4)
    assert torch.allclose(soft.sum(1), torch.ones(images))
    assert torch.equal(inputs, before), "the feed's own tensors were written to"


def test_mixup_is_off_by_default() -> None:
    assert make_mixup(Recipe(), 4) is None


@pytest.mark.parametrize("settings", [
    {"epochs": 0}, {"batch_size": 0}, {"schedule": "step"}, {"epochs": 3, "warmup_epochs": 3}])
def test_contradictions_are_named(settings: dict[str, object]) -> None:
    with pytest.raises(RecipeError):
        Recipe(**settings)


def test_label_smoothing_refuses_multi_label() -> None:
    with pytest.raises(RecipeError, match="single-label"):
        make_criterion(Recipe(label_smoothing=0.1), True)
