"""The account of what each adapter keeps."""

from __future__ import annotations

import pytest
import torch

import visionpeft as vp
from visionpeft.errors import VisionPEFTError

X = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
STREAM = 4 * 65 * 96 * 4  # bytes of the tokens of 4 images


def vit() -> torch.nn.Module:
    import timm

    return timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=96, depth=2, num_heads=4,
                             num_classes=5)  # fmt: skip


def test_what_can_be_rebuilt_costs_nothing_and_what_is_kept_is_counted():
    """The input of attn.proj is kept by attention, all others are rebuilt; with "keep" each Linear keeps its x."""
    model = vit().train()
    tuner = vp.attach(model, vp.LoRA(rank=4, targets="linear", exclude="head*"), memory="rebuild")
    report = tuner.memory_report(X)
    assert [e.site for e in report] == list(tuner.adapters)
    assert all(e.kept < 0.05 * STREAM for e in report) and report.adapted < 1.02 * report.frozen
    tuner.detach()
    kept = {str(e.site): e.kept for e in vp.attach(model, vp.LoRA(rank=4, targets="linear", exclude="head*"),
                                                   memory="keep").memory_report(X)}  # fmt: skip
    assert STREAM <= kept["blocks.0.attn.qkv"] < 1.05 * STREAM
    assert 4 * STREAM <= kept["blocks.1.mlp.fc2"] < 4.05 * STREAM


def test_tensors_that_learn_in_place_and_blocks_that_cannot_be_missed():
    model = vit()
    report = vp.attach(model, "ln_tuning").memory_report(X)
    assert len(report) == 10 and all(e.kept == 0 for e in report)
    vp.tuners(model)["default"].detach()
    prompts = vp.attach(model, vp.METHODS["vpt"](tokens=3)).memory_report(X)
    assert prompts.adapted > prompts.frozen
    assert "alive after forward: frozen" in str(prompts)


def test_nothing_changes_by_it():
    model = vit().eval()
    tuner = vp.attach(model, vp.LoRA(rank=4), train="head")
    before, x, state = model(X), X.clone(), torch.get_rng_state()
    tuner.memory_report(X)
    assert not model.training and torch.equal(X, x) and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model(X), before) and all(p.requires_grad for p in tuner.parameters())


def test_a_resting_adapter_has_no_account():
    tuner = vp.attach(vit(), "lora", train="head")
    tuner.merge()
    with pytest.raises(VisionPEFTError, match="does not act now"):
        tuner.memory_report(X)
