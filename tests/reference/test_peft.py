"""LoRA and LN-tuning against Hugging Face peft, weights copied over: same outputs and same gradients.

peft has bugs that are not tested against: its LoRA on `nn.MultiheadAttention` counts out_proj twice, merges
weight-standardised convs wrongly, forgets the dilation of a conv, and never acts where timm bypasses qkv.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import visionpeft as vp

peft = pytest.importorskip("peft")
timm = pytest.importorskip("timm")


class Net(nn.Module):
    """A conv and two Linears, as their users call them."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv, self.act = conv, nn.GELU()
        self.fc1, self.norm, self.fc2 = nn.Linear(6, 10), nn.LayerNorm(10), nn.Linear(10, 4, bias=False)

    def forward(self, x):
        h = self.act(self.conv(x)).flatten(2).transpose(1, 2)
        return self.fc2(self.norm(self.fc1(h)))


CONVS = {
    "3x3": nn.Conv2d(3, 6, 3, stride=2, padding=1),
    "1x1": nn.Conv2d(3, 6, 1, bias=False),
    "patch": nn.Conv2d(3, 6, 4, stride=4),
}


def theirs(model: nn.Module, targets: list[str], **kwargs) -> nn.Module:
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, **kwargs)).double()


@torch.no_grad()
def copy_over(adapted: nn.Module, tuner: vp.Tuner) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Random weights into peft's layers and ours; name -> (theirs, ours)."""
    pairs = {}
    modules = dict(adapted.named_modules())
    for site, adapter in tuner.adapters.items():
        layer = modules[f"base_model.model.{site.path}"]
        for name, own, other in (("a", adapter.a, layer.lora_A), ("b", adapter.b, layer.lora_B)):
            weight = other["default"].weight
            weight.normal_(std=0.3)
            own.copy_(weight.view_as(own))
            pairs[f"{site.path}.{name}"] = (weight, own)
    return pairs


def assert_equal(adapted: nn.Module, model: nn.Module, pairs: dict, x: torch.Tensor) -> None:
    y, z = adapted(x), model(x)
    assert pairs and (y - z).abs().max() < 1e-12 * y.abs().max()
    y.square().sum().backward()
    z.square().sum().backward()
    for name, (a, b) in pairs.items():
        assert a.grad is not None and a.grad.abs().max() > 0, name
        assert (a.grad.view_as(b.grad) - b.grad).abs().max() < 1e-10 * a.grad.abs().max(), name


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("settings", [{}, {"lora_alpha": 5}, {"lora_alpha": 5, "use_rslora": True}], ids=str)
@pytest.mark.parametrize("conv", CONVS)
def test_lora_on_linears_and_convs(conv, settings, fused):
    net = Net(copy.deepcopy(CONVS[conv])).double()
    ours = copy.deepcopy(net)
    method = vp.LoRA(rank=2, alpha=settings.get("lora_alpha", 8), rslora=settings.get("use_rslora", False),
                     targets="conv fc1 fc2")  # fmt: skip
    adapted = theirs(net, ["conv", "fc1", "fc2"], **{"lora_alpha": 8, **settings})
    tuner = vp.attach(ours, method)
    tuner.fused = fused
    assert len(tuner.adapters) == 3
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert_equal(adapted, ours, copy_over(adapted, tuner), x)
    merged = adapted.merge_and_unload()
    tuner.merge()
    for name in ("conv", "fc1", "fc2"):
        pair = merged.get_submodule(name).weight, ours.get_submodule(name).weight
        torch.testing.assert_close(*pair, rtol=0, atol=1e-14)


def test_lora_on_a_whole_fused_qkv():
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
    net = timm.create_model("vit_tiny_patch16_224", **small).double().eval()
    ours = copy.deepcopy(net)
    adapted = theirs(net, ["qkv"], lora_alpha=2)
    tuner = vp.attach(ours, vp.LoRA(rank=2, targets="blocks.*.attn.qkv"))
    assert [s.part for s in tuner.sites] == ["", ""]
    assert_equal(adapted, ours, copy_over(adapted, tuner), torch.randn(2, 3, 32, 32, dtype=torch.float64))


def test_lora_starts_as_theirs():
    """A uniform within 1 / sqrt(in), B zero."""
    net = nn.Sequential(nn.Linear(400, 300))
    adapted = theirs(copy.deepcopy(net), ["0"], lora_alpha=8)
    tuner = vp.attach(net, vp.LoRA(rank=2, targets="0"))
    mine, other = next(iter(tuner.adapters.values())), adapted.base_model.model[0]
    bound = 1 / math.sqrt(400)
    for a in (mine.a, other.lora_A["default"].weight):
        assert 0.9 * bound < a.abs().max() <= bound
        assert abs(float(a.double().std()) / (bound / math.sqrt(3)) - 1) < 0.1
    assert mine.b.abs().max() == 0


def test_gaussian_start():
    net = nn.Sequential(nn.Linear(4000, 30))
    tuner = vp.attach(net, vp.LoRA(rank=4, targets="0", init="gaussian"))
    a = next(iter(tuner.adapters.values())).a
    assert abs(float(a.std()) * 4 - 1) < 0.05


def test_ln_tuning():
    net = Net(CONVS["3x3"]).double()
    ours = copy.deepcopy(net)
    adapted = peft.get_peft_model(net, peft.LNTuningConfig(target_modules=["norm"])).double()
    vp.attach(ours, "ln_tuning")
    tensors = dict(adapted.named_parameters())
    pairs = {}
    with torch.no_grad():
        for name in ("weight", "bias"):
            theirs_ = tensors[f"base_model.model.norm.ln_tuning_layers.default.{name}"]
            own = getattr(ours.norm, name)
            theirs_.normal_()
            own.copy_(theirs_)
            pairs[name] = (theirs_, own)
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {"norm.weight", "norm.bias"}
    assert_equal(adapted, ours, pairs, torch.randn(2, 3, 8, 8, dtype=torch.float64))
