"""Numbers of parameters on ViT-B/16 as the papers have them, and by closed formulas on ViT-L/16. Models are meta."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

import visionpeft as vp

timm = pytest.importorskip("timm")
M = vp.methods


@functools.cache
def meta(name: str, classes: int = 0) -> torch.nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, num_classes=classes)


def count(method: object, name: str = "vit_base_patch16_224") -> int:
    tuner = vp.attach(meta(name), method, probe=False)
    found = tuner.num_parameters
    tuner.detach()
    return found


SIX = "query key value attn_out mlp_in mlp_out"
FUSED = "blocks.*.attn.qkv blocks.*.attn.proj mlp_in mlp_out"

BASE = {  # ViT-B/16, without head
    "ssf": (M.SSF(), 205_824),
    "lora r8 qv": (M.LoRA(rank=8, targets="query value"), 294_912),
    "lora r8 default": (M.LoRA(rank=8), 294_912),
    "lora r8 qkv": (M.LoRA(rank=8, targets="query key value"), 442_368),
    "lora r8 fused qkv": (M.LoRA(rank=8, targets="blocks.*.attn.qkv"), 294_912),
    "lora r8 six": (M.LoRA(rank=8, targets=SIX), 1_327_104),
    "lora r8 all fused": (M.LoRA(rank=8, targets=FUSED), 1_179_648),
    "lora r16 qv": (M.LoRA(rank=16), 589_824),
    "adaptformer 1": (M.AdaptFormer(hidden=1), 27_660),
    "adaptformer 4": (M.AdaptFormer(hidden=4), 82_992),
    "adaptformer 8": (M.AdaptFormer(hidden=8), 156_768),
    "adaptformer 16": (M.AdaptFormer(hidden=16), 304_320),
    "adaptformer 32": (M.AdaptFormer(hidden=32), 599_424),
    "adaptformer 64": (M.AdaptFormer(), 1_189_632),
    "pfeiffer 8": (M.Pfeiffer(), 156_768),
    "houlsby 8": (M.Houlsby(hidden=8), 313_536),
    "bitfit": (M.BitFit(), 102_912),
    "difffit": (M.DiffFit(), 102_912 + 25 * 768 + 12 * 2 * 768),  # biases, norm weights, gammas
    "orthogonal 4": (M.OrthogonalAdaptation(rank=4, targets="query key value attn_out"), 12 * 4 * 4 * 768),
    "svfit": (M.SVFit(), 12 * 4 * 768),
    "shira 8": (M.SHiRA(), 12 * 4 * 8 * 2 * 768),
    "krona 4 64": (M.KronA(), 122_880),
    "ln": (M.LNTuning(), 38_400),
    "vpt shallow 10": (M.VPT(tokens=10, deep=False), 7_680),
    "vpt shallow 50": (M.VPT(tokens=50, deep=False), 38_400),
    "vpt deep 10": (M.VPT(tokens=10), 92_160),
    "vpt deep 50": (M.VPT(tokens=50), 460_800),
    "vpt deep 100": (M.VPT(tokens=100), 921_600),
    "full": (M.FullFineTuning(), 85_798_656),
}

L, D, R, H = 24, 1024, 8, 8  # ViT-L/16
LARGE = {
    "ssf": (M.SSF(), 2 * (D + L * (D + 3 * D + D + D + 4 * D + D) + D)),
    "lora qv": (M.LoRA(rank=R), L * 2 * R * (D + D)),
    "lora six": (M.LoRA(rank=R, targets=SIX), L * R * (4 * 2 * D + 2 * 5 * D)),
    "adaptformer": (M.AdaptFormer(hidden=H), L * (2 * D * H + H + D)),
    "pfeiffer": (M.Pfeiffer(hidden=H), L * (2 * D * H + H + D)),
    "houlsby": (M.Houlsby(hidden=H), 2 * L * (2 * D * H + H + D)),
    "bitfit": (M.BitFit(), D + L * 11 * D + D),
    "ln": (M.LNTuning(), 2 * D * (2 * L + 1)),
    "vpt deep": (M.VPT(tokens=10), L * 10 * D),
    "vpt shallow": (M.VPT(tokens=10, deep=False), 10 * D),
    "full": (M.FullFineTuning(), 303_301_632),
}


@pytest.mark.parametrize("label", BASE)
def test_vit_base(label):
    method, expected = BASE[label]
    assert count(method) == expected


@pytest.mark.parametrize("label", LARGE)
def test_vit_large(label):
    method, expected = LARGE[label]
    assert count(method, "vit_large_patch16_224") == expected


def test_ssf_has_74_sites():
    tuner = vp.attach(meta("vit_base_patch16_224"), "ssf", probe=False)
    assert len(tuner.sites) == 74
    tuner.detach()


def test_ln_tuning_has_25_norms():
    tuner = vp.attach(meta("vit_base_patch16_224"), "ln_tuning", probe=False)
    assert len({site.path for site in tuner.sites}) == 25
    tuner.detach()


@pytest.mark.parametrize("key", ["ssf", "lora", "adaptformer", "bitfit", "ln_tuning", "vpt"])
def test_the_head_is_not_counted_but_trains(key):
    model = meta("vit_base_patch16_224", 100)
    alone = count(vp.METHODS[key]())
    tuner = vp.attach(model, key, train="head", probe=False)
    assert tuner.num_parameters == alone
    assert sum(p.numel() for p in tuner.parameters()) == alone + 769 * 100
    tuner.detach()


def test_the_baselines():
    model = meta("vit_base_patch16_224", 100)
    tuner = vp.attach(model, "linear", probe=False)
    assert tuner.num_parameters == 0 and sum(p.numel() for p in tuner.parameters()) == 76_900
    tuner.detach()
    tuner = vp.attach(model, "full", train="head", probe=False)
    assert tuner.num_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad) == 85_875_556
    tuner.detach()


def test_every_method_has_a_count_in_this_folder():
    """A new method brings its published count: add it above, or in a file beside this one."""
    text = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py"))
    assert [m.__name__ for m in vp.METHODS.values() if f"{m.__name__}(" not in text] in ([], ["LinearProbe"])
