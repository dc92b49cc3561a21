"""A frozen backbone gives the same features in every epoch: compute them once, if that changes nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from visionpeft.training.feed import Feed, TensorFeed
from visionpeft.training.order import seed_all


def classifier_alone(model: nn.Module) -> nn.Module | None:
    """The classifier, if it is one module that holds all that learns in `model`."""
    get = getattr(model, "get_classifier", None)
    head = get() if get is not None else None
    if not isinstance(head, nn.Module) or isinstance(head, nn.Identity):
        return None
    inside = {id(p) for p in head.parameters()}
    learning = [p for p in model.parameters() if p.requires_grad]
    return head if learning and all(id(p) in inside for p in learning) else None


@torch.no_grad()
def is_exact(model: nn.Module, head: nn.Module, feed: Feed, accelerator: Any, count: int = 32) -> bool:
    """Whether training `head` on cached features is the same as training it inside `model`.

    Measured on a batch: two draws in train mode and one in eval mode give the same features (no dropout, drop-path or
    batch statistics), and the head applied to them gives the model's output.
    """
    inputs, _ = next(iter(feed.batches([list(range(min(count, len(feed))))], 0, 0)))
    inputs = inputs.to(accelerator.device)
    outputs, features = [], []
    was_training = model.training
    for seed, training in ((1, True), (2, True), (3, False)):
        model.train(training)
        seed_all(seed)
        with accelerator.autocast():
            feature, output = _tap(model, head, inputs)
            outputs += [output, head(feature)]
        features.append(feature)
    model.train(was_training)
    return all(_same(features[0], f) for f in features) and all(_same(outputs[0], o) for o in outputs)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-5)


def _tap(model: nn.Module, head: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """What `head` receives while `model` runs, and the model's output."""
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    try:
        output = model(inputs)
    finally:
        handle.remove()
    return (seen[0] if len(seen) == 1 else output.new_empty(0)), output


@torch.no_grad()
def compute(model: nn.Module, head: nn.Module, feed: Feed, accelerator: Any, batch: int = 128) -> TensorFeed:
    """What `head` receives for every item of `feed`, as a feed of its own; every process computes all of it."""
    was_training = model.training
    model.eval()
    pieces = [list(range(i, min(i + batch, len(feed)))) for i in range(0, len(feed), batch)]
    parts, targets = [], []
    try:
        for inputs, labels in feed.batches(pieces, 0, 0):
            targets.append(labels)
            with accelerator.autocast():
                parts.append(_tap(model, head, inputs.to(accelerator.device))[0].cpu())
    finally:
        model.train(was_training)
    return TensorFeed(torch.cat(parts), torch.cat(targets), getattr(feed, "images", None))
