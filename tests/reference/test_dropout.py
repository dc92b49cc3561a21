"""LoRA's dropout: gradients by finite differences, the mask of the forward used again in backward, right statistics."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import visionpeft as vp
from visionpeft import lowrank


def part(lo: int, hi: int, dropout: float, rank: int = 2, width: int = 4) -> lowrank.Part:
    a = torch.randn(rank, width, dtype=torch.float64, requires_grad=True)
    b = torch.randn(hi - lo, rank, dtype=torch.float64, requires_grad=True)
    return lowrank.Part(lo, hi, 0.7, a, b, dropout)


@pytest.mark.parametrize("dropouts", [(0.0, 0.0), (0.5, 0.5), (0.0, 0.3)], ids=str)
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "fused"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("learns", [True, False], ids=["base learns", "base frozen"])
def test_gradcheck(dropouts, plain, bias, learns):
    """Two parts on overlapping rows; the same seed for every evaluation."""
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(6, 4, dtype=torch.float64, requires_grad=learns)
    b = torch.randn(6, dtype=torch.float64, requires_grad=learns) if bias else None
    parts = [part(0, 4, dropouts[0]), part(2, 6, dropouts[1])]

    def run(x, w, b, a1, b1, a2, b2):
        torch.manual_seed(5)
        now = [parts[0]._replace(a=a1, b=b1), parts[1]._replace(a=a2, b=b2)]
        return lowrank.linear(x, w, b, now, route="plain" if plain else "rebuild")

    inputs = (x, w, b, parts[0].a, parts[0].b, parts[1].a, parts[1].b)
    assert torch.autograd.gradcheck(run, inputs)


def test_gradcheck_of_a_whole_adapter_with_dropout():
    layer = nn.Linear(4, 5).double()
    tuner = vp.attach(nn.Sequential(layer), vp.LoRA(rank=2, targets="0", dropout=0.5))
    with torch.no_grad():
        for p in tuner.parameters():
            p.normal_()
    tuner.model.train()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def run(x):
        torch.manual_seed(5)
        return layer(x)

    assert torch.autograd.gradcheck(run, (x,))
    assert not torch.equal(layer(x), layer(x)), "every forward draws a mask of its own"
    tuner.model.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_the_mean_over_masks_is_the_output_without_dropout(fused):
    layer = nn.Linear(8, 6).double()
    tuner = vp.attach(nn.Sequential(layer), vp.LoRA(rank=4, targets="0", dropout=0.25))
    with torch.no_grad():
        for p in tuner.parameters():
            p.normal_()
    tuner.fused = fused
    x = torch.randn(1, 8, dtype=torch.float64)
    tuner.model.eval()
    quiet = layer(x)
    tuner.model.train()
    many = layer(x.expand(40_000, 8))
    with tuner.disabled():
        base = layer(x)
    assert (many.mean(0) - quiet).abs().max() < 0.03 * (quiet - base).abs().max()
    assert many.std(0).min() > 0


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_only_the_adapters_input_is_dropped(fused):
    layer = nn.Linear(8, 6).double()
    tuner = vp.attach(nn.Sequential(layer), vp.LoRA(rank=4, targets="0", dropout=0.5))
    base = nn.functional.linear(x := torch.randn(5, 8, dtype=torch.float64), layer.weight, layer.bias)
    tuner.fused = fused
    tuner.model.train()
    assert torch.equal(layer(x), base)


def test_a_mask_each_for_query_and_value():
    """Each pair draws its own; the two masks of one layer are independent."""
    x = torch.ones(2000, 4, dtype=torch.float64)
    eye = torch.eye(4, dtype=torch.float64, requires_grad=True)
    parts = [lowrank.Part(0, 4, 1.0, eye, eye, 0.5), lowrank.Part(4, 8, 1.0, eye, eye, 0.5)]
    y = lowrank.linear(x, torch.zeros(8, 4, dtype=torch.float64), None, parts)
    q, v = (y > 0).double().split(4, 1)
    assert abs(float(q.mean()) - 0.5) < 0.03
    assert abs(float((q * v).mean()) - 0.25) < 0.03


def test_double_backward_is_refused_by_name_and_plain_torch_does_it():
    layer = nn.Linear(4, 5).double()
    tuner = vp.attach(nn.Sequential(layer), vp.LoRA(rank=2, targets="0"))
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    with pytest.raises(vp.VisionPEFTError, match="fused = False"):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    tuner.fused = False
    (g,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    g.square().sum().backward()
    assert all(p.grad is not None for p in tuner.parameters())


def test_checkpointing_draws_the_same_mask_again():
    from torch.utils.checkpoint import checkpoint

    layer = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 5)).double()
    tuner = vp.attach(layer, vp.LoRA(rank=2, targets="1", dropout=0.5))
    with torch.no_grad():
        for p in tuner.parameters():
            p.normal_()
    layer.train()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    grads = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(9)
        grads.append(torch.autograd.grad(run(x).square().sum(), [x, *tuner.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
