"""What is frozen stays bit-identical, buffers included, through real training."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from traces import assert_same, snapshot

import visionpeft as vp

MODELS = {"resnet": "test_resnet", "efficientnet": "test_efficientnet", "regnet": "test_byobnet"}


def train(model: nn.Module, tuner: vp.Tuner, steps: int = 10) -> None:
    optimiser = torch.optim.AdamW(tuner.parameters(), 1e-2, weight_decay=0.1)
    for _ in range(steps):
        model.train()
        model(torch.randn(4, 3, 64, 64)).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
        model.eval()(torch.randn(1, 3, 64, 64))


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(MODELS.get(name, name), num_classes=5)


def regnet() -> nn.Module:
    from timm.models.regnet import RegNet, RegNetCfg

    return RegNet(RegNetCfg(w0=8, wa=8, wm=2, depth=6, group_size=8, se_ratio=0.25), num_classes=5)


@pytest.mark.parametrize("name", [*MODELS, "true regnet"])
@pytest.mark.parametrize("method", [vp.LoRA(rank=1), vp.SSF(), vp.methods.LNTuning(), vp.methods.LinearProbe()])
def test_frozen_tensors_and_statistics_after_ten_steps(name, method):
    model = regnet() if name == "true regnet" else build(name)
    model.train()
    before = snapshot(model)
    originals = dict(model.named_buffers()) | dict(model.named_parameters())
    tuner = vp.attach(model, method, train="head")
    assert any("running_mean" in n for n in originals)
    train(model, tuner)
    assert not [n for n, t in originals.items() if not torch.equal(t, before["bits"][n])]
    batchnorms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert batchnorms and not any(m.training for m in batchnorms)
    model.train()
    assert not any(m.training for m in batchnorms)
    tuner.detach()
    model.train()
    assert all(m.training for m in batchnorms)
    assert_same(before, model)


@pytest.mark.parametrize("name", MODELS)
def test_full_fine_tuning_updates_statistics_and_gives_them_back(name):
    model = build(name).train()
    before = snapshot(model)
    tuner = vp.attach(model, "full")
    train(model, tuner, 3)
    path, bn = next((p, m) for p, m in model.named_modules() if isinstance(m, nn.BatchNorm2d))
    assert bn.num_batches_tracked == 3
    assert not torch.equal(bn.running_mean, before["bits"][f"{path}.running_mean"])
    with tuner.disabled():
        assert torch.equal(bn.running_mean, before["bits"][f"{path}.running_mean"])
    assert bn.num_batches_tracked == 3
    tuner.detach()
    model.train()
    assert_same(before, model)


def test_statistics_travel_in_the_file_of_full_fine_tuning(tmp_path):
    model, x = build("resnet"), torch.randn(2, 3, 64, 64)
    tuner = vp.attach(model, "full")
    train(model, tuner, 3)
    tuner.save(tmp_path / "all.safetensors")
    other = timm.create_model("test_resnet", num_classes=5)
    vp.load(other, tmp_path / "all.safetensors")
    assert torch.equal(other.eval()(x), model.eval()(x))


def test_modes_of_single_batchnorms_come_back():
    model = build("resnet").train()
    model.bn1.eval()
    before = snapshot(model)
    tuner = vp.attach(model, vp.LoRA(rank=1), train="head")
    assert not model.layer1[0].bn1.training
    tuner.detach()
    assert_same(before, model)


def test_batchnorm_without_statistics_is_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).train()
    vp.attach(model, vp.LoRA(rank=1, targets="conv"))
    assert model.train()[1].training
