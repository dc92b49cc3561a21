"""The loop: exact resumption, the same update however it is cut up, an early end where the loss is no number."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from visionpeft.training import DivergedError, History, Recipe, TensorFeed, fit, make_accelerator
from visionpeft.training.checkpoint import CheckpointError
from visionpeft.training.order import seed_all, updates
from visionpeft.training.recipe import make_criterion, make_mixup, make_optimizer, make_scheduler

RECIPE = Recipe(lr=1e-2, epochs=3, batch_size=16, warmup_epochs=1, schedule="update")
FULL = replace(RECIPE, ema=0.9, mixup=0.5, cutmix=0.5, accumulation=2, clip=1.0, label_smoothing=0.1)


class Stop(Exception):
    """Ends a run in the middle."""


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.BatchNorm1d(32), nn.Dropout(0.3), nn.Linear(32, 4))


def small_feed() -> TensorFeed:
    generator = torch.Generator().manual_seed(0)
    return TensorFeed(torch.randn(70, 3, 4, 4, generator=generator), torch.randint(0, 4, (70,), generator=generator))


def train(recipe: Recipe = RECIPE, folder: Path | None = None, stop_at: int | None = None, precision: str = "fp32",
          model: nn.Module | None = None, feed: TensorFeed | None = None, **options: Any) -> tuple[nn.Module, History]:
    model = model if model is not None else small_model()

    def progress(done: int, total: int, loss: float) -> None:
        if done == stop_at:
            raise Stop

    history = fit(
        model, feed or small_feed(), recipe, make_accelerator(precision), make_criterion(recipe, False), seed=5,
        mixup=make_mixup(recipe, 4), folder=folder, progress=progress, checkpoint_seconds=0, **options)
    return model, history


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("recipe, precision", [(RECIPE, "fp32"), (FULL, "fp32"), (FULL, "bf16")])
@pytest.mark.parametrize("stop_at", [1, 5, 7])
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path, recipe: Recipe, precision: str, stop_at: int) -> None:
    whole, history = train(recipe, precision=precision)
    with pytest.raises(Stop):
        train(recipe, tmp_path, stop_at, precision)
    resumed, again = train(recipe, tmp_path, precision=precision)
    assert again.resumed_at == stop_at
    assert same(whole, resumed)
    assert again.rows == history.rows
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == history.rows


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        train(folder=tmp_path, stop_at=3)
    with pytest.raises(CheckpointError, match="another recipe"):
        train(replace(RECIPE, lr=1.0), tmp_path)


def test_a_truncated_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"half of a")
    with pytest.raises(CheckpointError, match="checkpoint.pt"):
        train(folder=tmp_path)


def test_consistency_is_added_from_a_second_forward() -> None:
    """One update by hand: cross-entropy of the first forward and w (KL(p | q) + KL(q | p)) / 2 of both."""
    recipe = replace(RECIPE, epochs=1, warmup_epochs=0, batch_size=70, optimizer="sgd")
    found, history = train(recipe, consistency=0.7)
    model, feed = small_model().train(), small_feed()
    order = updates(70, recipe, 5, 0, 0, 1)[0].pieces[0]
    seed_all(5, 0, 0, 1)  # as the loop draws its dropout
    a, b = model(feed.inputs[order]), model(feed.inputs[order])
    p, q = a.softmax(1), b.softmax(1)
    apart = ((p * (p / q).log()).sum(1) + (q * (q / p).log()).sum(1)) / 2
    loss = (nn.functional.cross_entropy(a, feed.targets[order], reduction="none") + 0.7 * apart).mean()
    optimizer = make_optimizer(model, recipe)
    make_scheduler(optimizer, recipe, 1).step_update(0)
    loss.backward()
    optimizer.step()
    assert apart.mean() > 0.01
    assert history.rows[0]["train_loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(found.parameters(), model.parameters(), strict=True))


def test_accumulation_gives_the_same_update() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    alone, _ = train(model=model)
    pieces = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    pieces.load_state_dict(state)
    train(replace(RECIPE, accumulation=3), model=pieces)
    for name, tensor in alone.state_dict().items():
        assert torch.allclose(tensor, pieces.state_dict()[name], atol=1e-6), name


def test_the_loss_falls_and_is_told(tmp_path: Path) -> None:
    _, history = train(replace(RECIPE, epochs=8), tmp_path)
    losses = [row["train_loss"] for row in history.rows]
    assert len(losses) == 8 and losses[-1] < 0.8 * losses[0]
    assert history.steps == 8 * 5


def test_nan_stops_before_anything_is_updated() -> None:
    feed = small_feed()
    feed.inputs[7] = float("nan")
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    with pytest.raises(DivergedError, match=r"epoch 1, update \d of 5 \(step \d\).*beginning with \d+"):
        train(model=model, feed=feed)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_evaluation_runs_when_due() -> None:
    seen = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        seen.append(model)
        return {"test_accuracy": 0.5}

    _, history = train(evaluate=evaluate, evaluate_every=2)
    assert ["test_accuracy" in row for row in history.rows] == [False, True, True]


def test_no_trace_of_mixed_precision_is_left() -> None:
    model, _ = train(precision="bf16")
    assert "forward" not in vars(model) and "_original_forward" not in vars(model)


def test_weights_are_the_moving_average() -> None:
    """With one update the average is the new weight (timm starts the average there)."""
    feed = small_feed()
    feed = TensorFeed(feed.inputs[:16], feed.targets[:16])
    one = replace(RECIPE, epochs=1, warmup_epochs=0)
    plain, _ = train(one, feed=feed)
    averaged, _ = train(replace(one, ema=0.9), feed=feed)
    assert same(plain, averaged)
    longer, _ = train(replace(RECIPE, ema=0.9))
    last, _ = train(RECIPE)
    assert not same(longer, last)


class Frozen(nn.Module):
    """A frozen part whose state must not move."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(48, 8), nn.Linear(8, 4)
        self.body.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.flatten(1)))


def test_what_is_frozen_stays() -> None:
    model = Frozen()
    before = model.body.weight.clone()
    train(replace(RECIPE, weight_decay=0.5), model=model)
    assert torch.equal(model.body.weight, before)
