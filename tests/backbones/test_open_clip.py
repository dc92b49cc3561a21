"""open_clip: both towers around `nn.MultiheadAttention`, where others attach adapters that never act."""

from __future__ import annotations

from collections import Counter

import open_clip
import torch
from torch import Tensor, nn
from traces import assert_same, snapshot

import visionpeft as vp


def build() -> tuple[open_clip.CLIP, Tensor, Tensor]:
    torch.manual_seed(0)
    model = open_clip.model.CLIP(
        embed_dim=32,
        vision_cfg=dict(layers=2, width=32, head_width=16, patch_size=8, image_size=32),
        text_cfg=dict(context_length=12, vocab_size=64, width=48, heads=3, layers=2),
    ).eval()
    text = torch.randint(1, 60, (2, 12))
    text[:, -1] = 63
    return model, torch.randn(2, 3, 32, 32), text


def features(model: open_clip.CLIP, image: Tensor, text: Tensor) -> Tensor:
    return torch.cat([model.encode_image(image), model.encode_text(text)])


def test_roles_of_both_towers():
    model, *_ = build()
    sites = vp.inspect(model)
    roles = Counter(s.role for s in sites)
    assert roles == {
        "patch_embed": 1, "embed": 1, "norm": 11, "query": 4, "key": 4, "value": 4, "attn_out": 4, "mlp_in": 4,
        "mlp_out": 4, "attention": 4, "mlp": 4, "projection": 2,
    }  # fmt: skip
    assert sum(not s.called for s in sites) == 18
    assert len(vp.LoRA(within="visual.*").choose(vp.sites.Backbone(model))) == 4


def test_lora_acts_on_every_linear_as_hand_merged_weights_do():
    model, image, text = build()
    model = model.double()
    image = image.double()
    before = snapshot(model)
    with torch.no_grad():
        plain = features(model, image, text)
    tuner = vp.attach(model, vp.LoRA(rank=2, targets="linear"))
    assert len(tuner.sites) == 24
    with torch.no_grad():
        torch.testing.assert_close(features(model, image, text), plain, rtol=0, atol=1e-12)
    features(model, image, text).square().sum().backward()
    assert all(a.b.grad is not None and a.b.grad.any() for a in tuner.adapters.values())
    deltas = {}
    for site, adapter in tuner.adapters.items():
        adapter.b.grad = adapter.a.grad = None
        nn.init.normal_(adapter.b, std=0.3)
        deltas[site] = (adapter.b @ adapter.a).detach()
    with torch.no_grad():
        adapted = features(model, image, text)
        tuner.merge()
        torch.testing.assert_close(features(model, image, text), adapted, rtol=0, atol=1e-12)
        assert not any("peft" in key for key in model.state_dict())
        tuner.unmerge()
    tuner.detach()
    assert_same(before, model)
    with torch.no_grad():
        assert torch.equal(features(model, image, text), plain)
        for site, delta in deltas.items():
            module = model.get_submodule(site.path)
            (module.in_proj_weight[slice(*site.rows)] if site.part else module.weight).add_(delta)
        torch.testing.assert_close(features(model, image, text), adapted, rtol=0, atol=1e-12)
    assert (adapted - plain).abs().max() > 0.05


def test_whole_call_and_defaults():
    model, image, text = build()
    tuner = vp.attach(model, vp.LoRA())
    assert {s.role for s in tuner.sites} == {"query", "value"} and len(tuner.sites) == 8
    out = model(image, text)
    assert all(t.isfinite().all() for t in out)
    tuner.detach()
    ssf = vp.attach(model, vp.SSF())
    assert len(ssf.sites) == 24 + 1 + 11


def test_train_globs_reach_raw_parameters_of_the_root_on_every_entry_point():
    model, image, text = build()
    projection = model.visual.proj
    tuner = vp.attach(model, vp.LoRA(rank=2), train="visual.proj logit_scale")
    assert model.visual.proj is not projection and model.visual.proj.requires_grad
    model.encode_image(image).sum().backward()
    assert model.visual.proj.grad is not None and projection.grad is None
    tuner.detach()
    assert model.visual.proj is projection
