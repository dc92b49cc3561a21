"""Which rows are query, key and value, shown without reading anybody's code.

A constant vector added to every key moves all scores of a query by the same amount, so softmax attention does not see
it; added to every query or value it does. So a bias on the `key` rows that changes the output is on the wrong rows.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import visionpeft as vp
from visionpeft.adapter import Adapter, Method

timm = pytest.importorskip("timm")

SMALL = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
MODELS = {
    "vit_tiny_patch16_224": {**SMALL, "patch_size": 8},
    "vit_small_patch14_reg4_dinov2": {**SMALL, "patch_size": 8},
    "deit3_small_patch16_224": {**SMALL, "patch_size": 8},
    "beit_base_patch16_224": {**SMALL, "patch_size": 8},
    "beitv2_base_patch16_224": {**SMALL, "patch_size": 8},
    "swin_tiny_patch4_window7_224": {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 2),
                                     "num_heads": (2, 2), "num_classes": 5},
    "cait_xxs24_224": {**SMALL, "patch_size": 8},
}  # fmt: skip


class Shift(Adapter):
    """y + v, one vector for every token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.randn(width, dtype=torch.float64))

    def forward(self, x, y):
        return y + self.v

    def weight(self, w, b):
        return w, b + self.v


class Shifts(Method):
    kinds = frozenset({"linear"})

    def build(self, site, module):
        return Shift(site.shape[0])


def moved(model: nn.Module, x: torch.Tensor, role: str) -> float:
    """How far the output moves when every site of a role is shifted, relative to its size."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        base = model(x)
        vp.attach(model, Shifts(targets=role), probe=False)
        return float((model(x) - base).abs().max() / base.abs().max())


def check(model: nn.Module, x: torch.Tensor) -> None:
    assert moved(model, x, "key") < 1e-12
    assert moved(model, x, "query") > 1e-6
    assert moved(model, x, "value") > 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_keys_of_timm(name):
    model = timm.create_model(name, **MODELS[name]).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    check(model, torch.randn(1, 3, 32, 32, dtype=torch.float64))


class Attend(nn.Module):
    """torch's attention with queries and keys from different places."""

    def __init__(self, **kwargs) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **kwargs)

    def forward(self, x, need_weights=False):
        return self.attn(x, x, x, need_weights=need_weights)[0]


@pytest.mark.parametrize("need_weights", [True, False])
def test_keys_of_torch(need_weights):
    model = Attend().double()
    with torch.no_grad():
        model.attn.in_proj_bias.normal_()

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = copy.deepcopy(model)

        def forward(self, x):
            return self.inner(x, need_weights)

    check(Whole().eval(), torch.randn(2, 5, 8, dtype=torch.float64))


def test_keys_of_open_clip():
    clip = pytest.importorskip("open_clip.model")
    vision = {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 2}
    model = clip.CLIP(16, vision, text).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    check(model.visual, torch.randn(1, 3, 32, 32, dtype=torch.float64))


def test_keys_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                                    image_size=32, patch_size=8)  # fmt: skip

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = transformers.ViTModel(config)

        def forward(self, x):
            return self.vit(x).last_hidden_state

    model = Logits().double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    check(model, torch.randn(1, 3, 32, 32, dtype=torch.float64))
