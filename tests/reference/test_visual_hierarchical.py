"""Swin, ConvNeXt and Hiera: every visual adapter acts there, or refuses by name what its formula does not allow."""

from __future__ import annotations

import functools
import warnings

import pytest
import timm
import torch
from torch import nn

import visionpeft as vp

M = vp.methods

MAKERS = {
    "swin": functools.partial(timm.create_model, "swin_tiny_patch4_window7_224", img_size=32, window_size=4,
                              embed_dim=24, depths=(1, 1), num_heads=(2, 2), num_classes=3),
    "convnext": functools.partial(timm.create_model, "convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16),
                                  num_classes=3),
    "hiera": functools.partial(timm.create_model, "hiera_tiny_224", img_size=64, embed_dim=24, stages=(1, 1, 1, 1),
                               num_classes=3),
}  # fmt: skip
SIZES = {"swin": 32, "convnext": 64, "hiera": 64}
METHODS = {
    "fact_tt": M.FacTTT(rank=2), "fact_tk": M.FacTTK(rank=2), "convpass": M.Convpass(hidden=4),
    "parallel": M.ParallelAdapter(hidden=4), "repadapter": M.RepAdapter(hidden=4), "hydra": M.Hydra(),
    "prefix": M.PrefixTuning(tokens=2), "compacter": M.Compacter(hidden=4), "mosa": M.MoSA(hidden=4),
    "binary_adaptformer": M.BinaryAdaptFormer(hidden=4), "binary_lora": M.BinaryLoRA(rank=2),
    "linear_adapter": M.LinearAdapter(hidden=4), "noah": M.NOAH(), "rein": M.Rein(tokens=4, rank=2),
}  # fmt: skip
BRANCHES = {"convpass", "parallel", "compacter", "mosa", "binary_adaptformer"}
BLOCKS = {"prefix", "noah", "rein"}
REFUSED = {  # what the error says
    **{(m, b): "block" for m in BLOCKS for b in MAKERS},
    **{(m, "convnext"): "attention|mlp" for m in BRANCHES},
    ("binary_lora", "convnext"): "query value",
    ("convpass", "hiera"): "attention", ("compacter", "hiera"): "attention",  # its attention's input is rearranged
}  # fmt: skip


def see(model: nn.Module, size: int) -> torch.Tensor:
    return model(torch.linspace(-1, 1, 2 * 3 * size * size).view(2, 3, size, size))


@pytest.mark.parametrize("backbone", MAKERS)
@pytest.mark.parametrize("key", METHODS)
@pytest.mark.filterwarnings("ignore:the classifier")
def test_acts_or_refuses_by_name(key, backbone):
    torch.manual_seed(0)
    model = MAKERS[backbone]().eval()
    with torch.no_grad():  # nothing stays at zero, where adapters would not show
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    y = see(model, SIZES[backbone]).detach()
    if (why := REFUSED.get((key, backbone))) is not None:
        with pytest.raises(vp.errors.SiteError, match=why):
            vp.attach(model, METHODS[key])
        assert torch.equal(see(model, SIZES[backbone]), y)
        return
    tuner = vp.attach(model, METHODS[key])
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
