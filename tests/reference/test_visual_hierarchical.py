"""Swin, ConvNeXt and Hiera: every method acts there, or refuses by name what its formula does not allow."""

from __future__ import annotations

import dataclasses
import functools
import warnings

import pytest
import timm
import torch
from torch import nn

import visionpeft as vp
from visionpeft.methods import spt

MAKERS = {
    "swin": functools.partial(timm.create_model, "swin_tiny_patch4_window7_224", img_size=32, window_size=4,
                              embed_dim=24, depths=(1, 1), num_heads=(2, 2), num_classes=3),
    "convnext": functools.partial(timm.create_model, "convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16),
                                  num_classes=3),
    "hiera": functools.partial(timm.create_model, "hiera_tiny_224", img_size=64, embed_dim=24, stages=(1, 1, 1, 1),
                               num_classes=3),
}  # fmt: skip
SIZES = {"swin": 32, "convnext": 64, "hiera": 64}
POINTS = {"pointgst", "idpt", "dapt", "ppt", "point_peft"}
BRANCHES = {"convpass", "parallel", "compacter", "mosa", "binary_adaptformer", "adaptformer", "houlsby", "pfeiffer"}
BLOCKS = {"prefix", "noah", "vpt"}
REFUSED = {  # what the error says
    **{(m, b): "block" for m in BLOCKS for b in MAKERS},
    **{(m, b): "grouping" for m in POINTS for b in MAKERS},
    **{("textual_inversion", b): "embed" for b in MAKERS},
    **{(m, "convnext"): "attention|mlp" for m in BRANCHES},
    ("binary_lora", "convnext"): "query value",
    # Hiera's attention is given rearranged tokens
    **{(m, "hiera"): "attention" for m in ("convpass", "compacter", "houlsby")},
}  # fmt: skip


def method(key: str) -> vp.methods.LoRA:
    """Small enough for these widths."""
    small = {"rank": 2, "hidden": 4, "tokens": 2, "a1": 2, "a2": 4}
    own = {f.name for f in dataclasses.fields(vp.METHODS[key])}
    return vp.METHODS[key](**{name: value for name, value in small.items() if name in own})


def made(backbone: str) -> nn.Module:
    """In eval, nothing at zero, where adapters would not show."""
    model = MAKERS[backbone]().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


def see(model: nn.Module, size: int) -> torch.Tensor:
    return model(torch.linspace(-1, 1, 2 * 3 * size * size).view(2, 3, size, size))


@pytest.mark.parametrize("backbone", MAKERS)
@pytest.mark.parametrize("key", vp.METHODS)
@pytest.mark.filterwarnings("ignore:the classifier")
def test_acts_or_refuses_by_name(key, backbone):
    torch.manual_seed(0)
    model = made(backbone)
    y = see(model, SIZES[backbone]).detach()
    if (why := REFUSED.get((key, backbone))) is not None:
        with pytest.raises(vp.errors.SiteError, match=why):
            vp.attach(model, method(key))
        assert torch.equal(see(model, SIZES[backbone]), y)
        return
    tuner = vp.attach(model, method(key))
    with torch.no_grad():
        for p in tuner.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    adapted = see(model, SIZES[backbone])
    assert not torch.equal(adapted, y)
    adapted.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tuner.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuner.detach()
    assert torch.equal(see(model, SIZES[backbone]), y)


@pytest.mark.parametrize("inner", [vp.LoRA(rank=2), None], ids=["lora", "sparse"])
@pytest.mark.parametrize("backbone", MAKERS)
def test_spt_spends_its_budget_there(backbone, inner):
    """Adapters, sparse entries and whole vectors all act (attach probes them), learn and merge."""
    model = made(backbone).double()
    x = torch.randn(2, 3, SIZES[backbone], SIZES[backbone], dtype=torch.float64)
    scores = spt.sensitivity(model, [(x, torch.tensor([0, 2]))])
    plan = spt.allocate(model, scores, inner, budget=2000, taus=range(50, 4001, 50))
    assert bool(plan.structured) == (inner is not None) and plan.sparse and plan.vectors
    tuner = vp.attach(model, plan, train="head")
    assert abs(tuner.num_parameters - 2000) < 100
    with torch.no_grad():
        for p in tuner.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    y = model(x)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tuner.parameters())
    tuner.merge()
    assert float((model(x) - y).detach().abs().max()) < 1e-10 * float(y.detach().abs().max())


def test_spt_spends_on_whole_blocks_there():
    model = made("swin").double()
    scores = spt.sensitivity(model, [(torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 2]))])
    plan = spt.allocate(model, scores, vp.methods.Rein(tokens=3, rank=2), budget=9000, alpha=20, taus=(500, 4000))
    assert set(plan.structured) & {"layers.0.blocks.0", "layers.1.blocks.0"}
    assert set(plan.structured) <= {str(s) for s in vp.attach(model, plan, train="head").adapters}


@pytest.mark.parametrize("method", [vp.methods.FacTTT(rank=2), vp.methods.Rein(tokens=3, rank=2)], ids=lambda m: m.key)
def test_spt_counts_only_the_factors_that_are_used(method):
    """Each width of a hierarchy has its own: a stage that gets nothing costs nothing."""
    model = made("swin")
    scores = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for module in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):  # the first stage alone matters
        scores[f"layers.0.blocks.0.{module}.weight"] += 1
    total, plan = spt.Ranking(vp.sites.Backbone(model), scores, method, 6000).plan(6000, alpha=10, beta=5)
    assert plan.structured and all(name.startswith("layers.0") for name in plan.structured)
    assert vp.attach(model, plan, train="head").num_parameters == total
