"""Hugging Face vision models from tiny local configs."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from traces import assert_same, snapshot

import visionpeft as vp

_SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32,
              patch_size=8)  # fmt: skip
_LAYER = "query=2 key=2 value=2 attn_out=2 mlp_in=2 mlp_out=2"

# name -> (model, roles without norms, linear sites)
MODELS = {
    "vit": (
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**_SMALL, num_labels=5)),
        f"patch_embed=1 {_LAYER} mlp=2 block=2 head=1", 12,
    ),
    "dinov2": (
        lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**_SMALL, mlp_ratio=2, num_labels=5)),
        f"patch_embed=1 {_LAYER} attention=2 mlp=2 block=2 head=1", 12,
    ),
    "dinov2_registers": (
        lambda: hf.Dinov2WithRegistersForImageClassification(
            hf.Dinov2WithRegistersConfig(**_SMALL, mlp_ratio=2, num_labels=5)
        ),
        f"patch_embed=1 {_LAYER} attention=2 mlp=2 block=2 head=1", 12,
    ),
    "dinov3": (
        lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**_SMALL, num_register_tokens=2)),
        f"patch_embed=1 {_LAYER} attention=2 mlp=2", 12,
    ),
    "dinov3_gated": (
        lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**_SMALL, use_gated_mlp=True)),
        "patch_embed=1 query=2 key=2 value=2 attn_out=2 mlp_in=4 mlp_out=2 attention=2 mlp=2", 14,
    ),
    "clip": (lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**_SMALL)), f"patch_embed=1 embed=1 {_LAYER}", 12),
    "swin": (
        lambda: hf.SwinForImageClassification(
            hf.SwinConfig(image_size=32, embed_dim=24, depths=(1, 1), num_heads=(2, 2), window_size=4, num_labels=5)
        ),
        f"patch_embed=1 {_LAYER} head=1", 13,
    ),
}  # fmt: skip
CLASSIFIERS = [name for name, (_, roles, _) in MODELS.items() if "head=" in roles]


def build(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = MODELS[name][0]()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.1 + (1.0 if p.dim() == 1 and p.mean() > 0.5 else 0.0))
    return model.eval(), torch.randn(2, 3, 32, 32)


def still(model: nn.Module, x: Tensor) -> Tensor:
    """Without gradients: with a bias that needs one, attention itself takes another path."""
    with torch.no_grad():
        return run(model, x)


def run(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


@pytest.mark.parametrize("name", MODELS)
def test_roles(name):
    model, _ = build(name)
    roles = Counter(s.role for s in vp.inspect(model) if s.role not in ("", "norm"))
    assert dict(roles) == {r: int(n) for r, n in (word.split("=") for word in MODELS[name][1].split())}


@pytest.mark.parametrize("targets", [None, "linear"])
@pytest.mark.parametrize("name", MODELS)
def test_lora_is_the_identity_lives_everywhere_merges_and_leaves_no_trace(name, targets):
    model, x = build(name)
    before = snapshot(model)
    plain = still(model, x)
    train = "head" if name in CLASSIFIERS else None
    tuner = vp.attach(model, vp.LoRA(rank=2, targets=targets), train=train)
    assert len(tuner.sites) == (MODELS[name][2] if targets else 4)
    assert torch.equal(still(model, x), plain)
    run(model, x).square().sum().backward()
    assert all(a.b.grad is not None and a.b.grad.any() for a in tuner.adapters.values())
    for p in tuner.parameters():
        p.grad = None
    for adapter in tuner.adapters.values():
        nn.init.normal_(adapter.b, std=0.3)
    adapted = still(model, x)
    tuner.merge()
    torch.testing.assert_close(still(model, x), adapted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(adapted, plain, atol=1e-2)
    tuner.detach()
    assert_same(before, model)
    assert torch.equal(still(model, x), plain)


@pytest.mark.parametrize("name", MODELS)
def test_ssf_attaches_with_its_defaults(name):
    model, x = build(name)
    before = snapshot(model)
    tuner = vp.attach(model, vp.SSF(), train="head" if name in CLASSIFIERS else None)
    tuner.probe(x)
    tuner.detach()
    assert_same(before, model)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_head_trains_as_a_copy(name):
    model, x = build(name)
    base = model.classifier.weight
    tuner = vp.attach(model, "linear")
    assert tuner.trained == [("classifier", "weight"), ("classifier", "bias")]
    run(model, x).sum().backward()
    assert model.classifier.weight is not base and model.classifier.weight.grad is not None and base.grad is None
    tuner.detach()
    assert model.classifier.weight is base


def test_loss_and_keyword_input_work_as_before():
    model, x = build("vit")
    vp.attach(model, vp.LoRA(rank=2), train="head")
    out = model(pixel_values=x, labels=torch.tensor([0, 1]))
    out.loss.backward()
    assert out.loss.isfinite()


def test_gradient_checkpointing_of_the_library_gives_the_same_gradients():
    model, x = build("vit")
    tuner = vp.attach(model, vp.LoRA(rank=2, targets="linear"), train="head")
    for adapter in tuner.adapters.values():
        nn.init.normal_(adapter.b)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        run(model, x).square().sum().backward()
        grads.append([p.grad for p in tuner.parameters()])
        for p in tuner.parameters():
            p.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
