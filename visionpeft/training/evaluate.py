"""Logits over a whole feed, on any number of processes, and the scores that follow from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from visionpeft.errors import require
from visionpeft.training.feed import Feed


@torch.no_grad()
def predict_logits(model: nn.Module, feed: Feed, accelerator: Any, batch_size: int = 128) -> Tensor:
    """Logits of every item of `feed`, in order: float32 [N, C] on the CPU, the same on every process."""
    was_training = model.training
    model.eval()
    try:
        return _predict(model, feed, accelerator, batch_size)
    finally:
        model.train(was_training)


def _predict(model: nn.Module, feed: Feed, accelerator: Any, batch_size: int) -> Tensor:
    rank, world, total = accelerator.process_index, accelerator.num_processes, len(feed)
    # Every process takes equally many items, so that gathering needs no padding; the surplus wraps around.
    share = -(-total // world)
    mine = [(rank + i * world) % total for i in range(share)]
    pieces = [mine[i:i + batch_size] for i in range(0, share, batch_size)]
    parts = []
    for inputs, _ in feed.batches(pieces, 0, 0):
        with accelerator.autocast():
            parts.append(model(inputs.to(accelerator.device)).float())
    logits = torch.cat(parts)
    if world > 1:
        logits = accelerator.gather(logits)
        # Gathered process by process; item i was the (i // world)-th of process i % world.
        logits = logits.view(world, share, -1).transpose(0, 1).reshape(world * share, -1)
    return logits[:total].cpu()


def score(logits: Tensor, targets: Tensor, multi_label: bool = False) -> dict[str, Any]:
    """Scores of visionpeft.metrics, the main one (top-1, or mAP for several labels) as "accuracy".

    Args:
        logits: [N, C], of all processes.
        targets: int64 [N], or float [N, C] when multi_label.
    """
    metric = require("visionpeft.metrics", extra="train").metric_for(logits.shape[1], multi_label)
    # The logits were gathered already: adding up over processes would count each image several times.
    metric.sync_on_compute = False
    metric.update(logits, targets)
    scores = metric.compute()
    return {"accuracy": scores.pop("map" if multi_label else "top1"), **scores}
