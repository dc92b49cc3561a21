"""Targets, weights and losses against their formulas, written out here in float64."""

from __future__ import annotations

import math

import pytest
import torch

from visionpeft.diffusion import objective
from visionpeft.diffusion.errors import DiffusionError

A = torch.linspace(0.999, 0.004, 50, dtype=torch.float64)
X, E = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
T = torch.tensor([0, 7, 30, 49])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_noised_and_target(kind: str) -> None:
    noisy, target = objective.noised(kind, X, E, T, A)
    for i, t in enumerate(T.tolist()):
        s, c = math.sqrt(A[t]), math.sqrt(1 - A[t])
        torch.testing.assert_close(noisy[i], s * X[i] + c * E[i], rtol=1e-14, atol=1e-14)
        wanted = E[i] if kind == "epsilon" else s * E[i] - c * X[i]
        torch.testing.assert_close(target[i], wanted, rtol=1e-14, atol=1e-14)


def test_targets_are_those_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    x, e, t = X.float(), E.float(), torch.tensor([1, 300, 700, 999])
    noisy, target = objective.noised("v_prediction", x, e, t, scheduler.alphas_cumprod)
    assert torch.equal(noisy, scheduler.add_noise(x, e, t))
    assert torch.equal(target, scheduler.get_velocity(x, e, t))


def test_flow() -> None:
    t = torch.tensor([0.0, 250.0, 500.0, 1000.0], dtype=torch.float64)
    noisy, target = objective.noised("flow", X, E, t, None)
    assert torch.equal(noisy[0], X[0]) and torch.equal(noisy[3], E[3])
    torch.testing.assert_close(noisy[1], 0.75 * X[1] + 0.25 * E[1], rtol=1e-14, atol=1e-14)
    assert torch.equal(target, E - X)


def test_snr_weights() -> None:
    snr = A[T] / (1 - A[T])
    least = torch.minimum(snr, torch.tensor(5.0, dtype=torch.float64))
    torch.testing.assert_close(objective.snr_weights("epsilon", T, A, 5.0), least / snr, rtol=1e-14, atol=0)
    torch.testing.assert_close(objective.snr_weights("v_prediction", T, A, 5.0), least / (snr + 1), rtol=1e-14, atol=0)
    assert torch.equal(objective.snr_weights("epsilon", T, A, None), torch.ones(4))
    with pytest.raises(DiffusionError, match="flow"):
        objective.snr_weights("flow", T, None, 5.0)


def test_prior_preservation_keeps_the_weight_of_each_example() -> None:
    """Three of the subject, two class images: each mean is of its own weighted losses."""
    losses = torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.25, 1.0, 0.1, 0.3], dtype=torch.float64)
    prior = torch.tensor([False, False, False, True, True])
    wanted = (0.5 * 1 + 0.25 * 2 + 1.0 * 3) / 3 + 0.7 * (0.1 * 5 + 0.3 * 7) / 2
    assert abs(float(objective.total(losses, weights, prior, 0.7)) - wanted) < 1e-15
    alone = objective.total(losses[:3], weights[:3], prior[:3], 0.7)
    assert abs(float(alone) - (0.5 + 0.5 + 3.0) / 3) < 1e-15


def test_masked_loss() -> None:
    p, t = X.float(), E.float()
    torch.testing.assert_close(objective.examples_loss(p, t), (p - t).square().flatten(1).mean(1))
    mask = torch.zeros(4, 1, 5, 5)
    mask[:, :, 1:3] = 1
    mask[:, :, 3] = 0.5
    whole = (p - t).square()
    wanted = (whole[:, :, 1:3].sum((1, 2, 3)) + 0.5 * whole[:, :, 3].sum((1, 2))) / (3 * (10 + 2.5))
    torch.testing.assert_close(objective.examples_loss(p, t, mask), wanted)


def test_noise_offset_is_one_number_a_channel() -> None:
    def draw(offset: float) -> torch.Tensor:
        return objective.draw_noise(torch.zeros(2, 3, 8, 8), offset, torch.Generator().manual_seed(4))

    added = draw(0.5) - draw(0.0)
    torch.testing.assert_close(added, added[..., :1, :1].expand_as(added), rtol=0, atol=1e-6)
    assert added[..., 0, 0].unique().numel() == 6


def test_times() -> None:
    generator = torch.Generator().manual_seed(0)
    t = objective.draw_times(4000, "epsilon", 10, generator)
    assert t.dtype == torch.int64 and torch.bincount(t).min() > 300 and t.max() == 9
    s = objective.draw_times(4000, "flow", 1000, generator) / 1000
    assert 0 < s.min() and s.max() < 1 and abs(float(s.logit().std()) - 1) < 0.05
