"""Logits in order, and scores."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from visionpeft.training import TensorFeed, make_accelerator, predict_logits, score


def test_logits_come_in_order_and_in_eval_mode() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)).train()
    feed = TensorFeed(torch.randn(11, 3), torch.zeros(11, dtype=torch.long))
    logits = predict_logits(model, feed, make_accelerator(), batch_size=4)
    assert torch.allclose(logits, model[0](feed.inputs))
    assert model.training


def test_accuracy() -> None:
    logits = torch.eye(4)[torch.tensor([0, 1, 2, 3, 0])]
    assert score(logits, torch.tensor([0, 1, 2, 0, 0]))["accuracy"] == pytest.approx(0.8)


def test_multi_label_is_mean_average_precision() -> None:
    logits = torch.tensor([[3.0, -1.0], [2.0, 4.0], [-2.0, 1.0]])
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    # Class 0 is ranked 1, 0, 1: (1 + 2/3) / 2. Class 1 has its only positive first.
    assert score(logits, targets, multi_label=True)["accuracy"] == pytest.approx((5 / 6 + 1) / 2)
