"""diffusers models from tiny configs: roles, adapters under every way of calling attention, presets, pipelines."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
import tiny_diffusers as tiny
import torch
from torch import nn
from traces import assert_same, snapshot

import visionpeft as vp
from visionpeft.errors import VisionPEFTError

pytest.importorskip("diffusers")
ATTENTION = "query key value attn_out"

ROLES = {
    "unet": "conv=33 embed=10 query=8 key=8 value=8 attn_out=8 mlp_in=4 mlp_out=4 attention=4 mlp=4",
    "sdxl": "conv=25 embed=12 query=8 key=8 value=8 attn_out=8 mlp_in=4 mlp_out=4 attention=4 mlp=4",
    "dit": "patch_embed=1 embed=6 query=2 key=2 value=2 attn_out=2 mlp_in=2 mlp_out=2",
    "pixart": "patch_embed=1 embed=4 query=4 key=4 value=4 attn_out=4 mlp_in=2 mlp_out=2",
    "sd3": "patch_embed=1 embed=5 query=4 key=4 value=4 attn_out=3 mlp_in=3 mlp_out=3",
    "flux": "patch_embed=1 embed=7 query=3 key=3 value=3 attn_out=2 mlp_in=3 mlp_out=3",
    "sana": "patch_embed=1 embed=4 query=4 key=4 value=4 attn_out=4 mlp_in=2 mlp_out=2 conv=2",
    "vae": "conv=30 query=2 key=2 value=2 attn_out=2",
    "text": "embed=2 query=2 key=2 value=2 attn_out=2 mlp_in=2 mlp_out=2",
}


def shake(tuner: vp.Tuner) -> vp.Tuner:
    with torch.no_grad():
        for p in tuner.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return tuner


def lora(model, targets: str = ATTENTION, **fields) -> vp.Tuner:
    torch.manual_seed(1)
    return shake(vp.attach(model, vp.LoRA(rank=2, targets=targets, **fields)))


def close(a, b, tolerance: float = 1e-5) -> bool:
    return float((a - b).abs().max()) <= tolerance * float(b.abs().max())


@pytest.mark.parametrize("name", tiny.MODELS)
def test_roles(name):
    found = Counter(s.role for s in vp.inspect(tiny.MODELS[name]()) if s.role not in ("", "norm"))
    assert dict(found) == {role: int(n) for role, n in (word.split("=") for word in ROLES[name].split())}


def test_globs_tell_self_from_cross_attention_and_added_from_own():
    paths = [s.path for s in vp.inspect(tiny.unet()) if s.role == "key"]
    assert sum(".attn1." in p for p in paths) == sum(".attn2." in p for p in paths) == 4
    tuner = vp.attach(tiny.unet(), vp.LoRA(rank=1, targets="key value", within="*.attn2.*"))
    assert [s.shape for s in tuner.sites][:2] == [(16, 16), (16, 16)] and len(tuner.sites) == 8
    tuner = vp.attach(tiny.sd3(), vp.LoRA(rank=1, targets="*.add_q_proj *.to_add_out"))
    assert len(tuner.sites) == 3


@pytest.mark.parametrize("name", tiny.MODELS)
def test_lora_lives_at_every_linear_and_conv_merges_and_leaves_no_trace(name):
    model, x = tiny.MODELS[name](), tiny.inputs(name)
    plain, before = tiny.see(model, x), snapshot(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "liveness is not checked")  # an input was found, and nothing was dead
        tuner = vp.attach(model, vp.LoRA(rank=1, targets=lambda s: s.kind in ("linear", "conv") and s.shape[0] > 1))
    assert torch.equal(tiny.see(model, x), plain)
    adapted = tiny.see(shake(tuner).model, x)
    assert not close(adapted, plain, 1e-3)
    tuner.merge()
    assert close(tiny.see(model, x), adapted, 1e-4)
    tuner.detach()
    assert_same(before, model)
    assert torch.equal(tiny.see(model, x), plain)


@pytest.mark.parametrize("name", [n for n in tiny.MODELS if n != "vae"])
def test_gradient_checkpointing(name):
    model, x = tiny.MODELS[name](), tiny.inputs(name)
    tuner = lora(model)

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(0)  # a DiT drops classes
        return list(torch.autograd.grad(tiny.run(model, x).square().sum(), list(tuner.parameters())))

    model.train()
    expected = gradients()
    model.gradient_checkpointing_enable() if name == "text" else model.enable_gradient_checkpointing()
    assert all(torch.equal(a, b) for a, b in zip(gradients(), expected, strict=True))


# ---- processors -----------------------------------------------------------------------------------------------------


def _eager(model):
    from diffusers.models.attention_processor import AttnProcessor

    model.set_attn_processor(AttnProcessor())


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", [_eager, lambda m: m.set_attention_slice(1), lambda m: m.fuse_qkv_projections()],
                         ids=["set_attn_processor", "slicing", "fused"])  # fmt: skip
def test_adapters_act_under_every_processor(change, when):
    model, x = tiny.unet(), tiny.inputs("unet")
    expected = tiny.see(lora(tiny.unet()).model, x)
    plain = tiny.see(model, x)
    if when == "before":
        change(model)
    tuner = lora(model)
    if when == "after":
        change(model)
    assert close(tiny.see(model, x), expected)
    tuner.merge()
    assert close(tiny.see(model, x), expected)
    tuner.unmerge()
    with tuner.disabled():
        assert close(tiny.see(model, x), plain)
    tuner.detach()
    assert close(tiny.see(model, x), plain)


@pytest.mark.parametrize("method", ["bitfit", "full", "ssf"])
@pytest.mark.parametrize("name", ["unet", "sd3", "flux"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_other_methods_on_fused_projections(name, method, when):
    def adapted(fused: str) -> torch.Tensor:
        model = tiny.MODELS[name]()
        if fused == "before":
            model.fuse_qkv_projections()
        torch.manual_seed(2)
        tuner = shake(vp.attach(model, method, probe=False))
        if fused == "after":
            vp.activate(model, {})
            model.fuse_qkv_projections()
            vp.activate(model, "default")
        y = tiny.see(model, x)
        tuner.detach()
        assert close(tiny.see(model, x), plain)
        return y

    x = tiny.inputs(name)
    plain = tiny.see(tiny.MODELS[name](), x)
    assert close(adapted(when), adapted("never"))


@pytest.mark.parametrize("name", ["unet", "sd3", "flux"])
def test_fusing_what_is_merged_is_refused(name):
    model, x = tiny.MODELS[name](), tiny.inputs(name)
    tuner = lora(model)
    tuner.merge()
    with pytest.raises(VisionPEFTError, match="merged or learns in place"):
        model.fuse_qkv_projections()
    tuner.unmerge()
    expected = tiny.see(model, x)
    model.fuse_qkv_projections()
    assert close(tiny.see(model, x), expected)


def test_fused_copies_are_no_sites_and_unfusing_works():
    model, x = tiny.flux(), tiny.inputs("flux")
    paths = [s.path for s in vp.inspect(model)]
    tuner = lora(model)
    expected = tiny.see(model, x)
    model.fuse_qkv_projections()
    assert "to_qkv" in dict(model.transformer_blocks[0].attn.named_children())
    assert [s.path for s in vp.inspect(model)] == paths
    model.unfuse_qkv_projections()
    assert not hasattr(model.transformer_blocks[0].attn, "to_qkv")
    assert torch.equal(tiny.see(model, x), expected)
    tuner.detach()


def test_an_offload_hook_on_the_root_wraps_the_adapted_model():
    accelerate = pytest.importorskip("accelerate")
    model, x = tiny.unet(), tiny.inputs("unet")
    tuner = lora(model)
    expected = tiny.see(model, x)
    _, hook = accelerate.cpu_offload_with_hook(model, execution_device="cpu")
    assert torch.equal(tiny.see(model, x), expected)
    tuner.detach()
    again = lora(model)  # the hook is on the root, no adapter is
    assert torch.equal(tiny.see(model, x), expected)
    hook.remove()
    assert torch.equal(tiny.see(again.model, x), expected)


@pytest.mark.parametrize("method", [vp.LoRA(rank=2), vp.KronA(a1=4, a2=4), vp.DiffFit(), vp.SSF(), vp.methods.SVFit(),
                                    vp.methods.SHiRA(rank=2)], ids=lambda m: m.key)  # fmt: skip
def test_offloading_module_by_module(method):
    """As `pipe.enable_sequential_cpu_offload` does: weights lie elsewhere until their module is called."""
    accelerate = pytest.importorskip("accelerate")
    model, x = tiny.unet(), tiny.inputs("unet")
    plain = tiny.see(model, x)
    tuner = shake(vp.attach(model, method, probe=False))
    expected = tiny.see(model, x)
    assert not close(expected, plain, 1e-3)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert all(p.is_meta for p in model.parameters())
    assert torch.equal(tiny.see(model, x), expected) and torch.equal(tiny.see(model, x), expected)
    if method.key == "difffit":  # accelerate would bring back what learnt in place
        with pytest.raises(VisionPEFTError, match="offloaded module by module.*remove_hook"), tuner.disabled():
            pass
        with pytest.raises(VisionPEFTError, match="offloaded module by module"):
            tuner.scale = 0.5
        assert tuner.scale == 1
    else:
        with tuner.disabled():
            assert torch.equal(tiny.see(model, x), plain)
    with pytest.raises(VisionPEFTError, match="remove that wrapper"):
        tuner.merge()
    assert torch.equal(tiny.see(model, x), expected)
    accelerate.hooks.remove_hook_from_submodules(model)
    tuner.detach()
    assert torch.equal(tiny.see(model, x), plain)


def test_what_is_offloaded_module_by_module_is_refused_by_name():
    accelerate = pytest.importorskip("accelerate")
    model = tiny.unet()
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(VisionPEFTError, match="to_q: a Linear carries an instance-level `forward`.*attach, then wrap"):
        vp.attach(model, vp.LoRA(rank=2))
    accelerate.hooks.remove_hook_from_submodules(model)  # leaves each class's own forward on the instance
    assert "forward" in model.conv_in.__dict__
    plain = tiny.see(model, tiny.inputs("unet"))
    tuner = lora(model)
    assert not close(tiny.see(model, tiny.inputs("unet")), plain, 1e-3)
    tuner.detach()
    assert torch.equal(tiny.see(model, tiny.inputs("unet")), plain)


# ---- presets and pipelines ------------------------------------------------------------------------------------------


def test_presets():
    model = {"unet": tiny.unet(), "text_encoder": tiny.text(), "vae": tiny.vae()}
    chosen = {
        word: Counter(s.path.split(".")[0] for s in vp.LoRA(rank=1, targets=word).choose(vp.sites.Backbone(model)))
        for word in ("diffusers", "kohya")
    }
    assert chosen == {"diffusers": {"unet": 32, "text_encoder": 8}, "kohya": {"unet": 48, "text_encoder": 12}}
    sites = vp.LoRA(rank=1, targets="diffusers").choose(vp.sites.Backbone(tiny.flux()))
    assert len(sites) == 8 + 4 + 3


def test_in_a_pipeline_only_the_denoiser_is_adapted_unless_told_otherwise():
    model = {"unet": tiny.unet(), "text_encoder": tiny.text(), "vae": tiny.vae()}
    for method in (vp.LoRA(rank=1), vp.SSF(), vp.methods.BitFit()):
        tuner = vp.attach(model, method, probe=False)
        assert {s.path.split(".")[0] for s in tuner.sites} == {"unet"}
        tuner.detach()
    tuner = vp.attach(model, vp.LoRA(rank=1, within="text_encoder.*"), probe=False)
    assert {s.path.split(".")[0] for s in tuner.sites} == {"text_encoder"}
    tuner.detach()
    tuner = vp.attach(model, vp.LoRA(rank=1, targets="query"), probe=False)
    assert {s.path.split(".")[0] for s in tuner.sites} == set(model)


def test_a_linear_of_the_users_own_beside_a_fused_name_stays_a_site():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_qkv = nn.Linear(4, 12)

    assert [s.path for s in vp.inspect(Own())] == ["to_qkv"]
