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
BLOCKS = {"prefix", "noah", "rein", "vpt"}
REFUSED = {  # what the error says
    **{(m, b): "block" for m in BLOCKS for b in MAKERS},
    **{(m, b): "stage" for m in POINTS for b in MAKERS},
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


def see(model: nn.Module, size: int) -> torch.Tensor:
    return model(torch.linspace(-1, 1, 2 * 3 * size * size).view(2, 3, size, size))


@pytest.mark.parametrize("backbone", MAKERS)
@pytest.mark.parametrize("key", vp.METHODS)
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
