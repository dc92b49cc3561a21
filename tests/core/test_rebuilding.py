"""What is rebuilt equals what would have been kept, to the bit, and where that is not sure nothing is rebuilt."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import visionpeft as vp
from visionpeft import lowrank, memory
from visionpeft.memory import live_bytes, recipe


def norm(x: Tensor, kind: str) -> Tensor:
    w, b = torch.randn(2, x.shape[-1], dtype=x.dtype)
    weight, bias = (w if kind in ("affine", "weight") else None), (b if kind in ("affine", "bias") else None)
    return F.layer_norm(x, x.shape[-1:], weight, bias)


SOURCES = {
    "layer norm": lambda x: norm(x, "affine"),
    "layer norm, weight only": lambda x: norm(x, "weight"),
    "layer norm, bias only": lambda x: norm(x, "bias"),
    "layer norm, plain": lambda x: norm(x, ""),
    "gelu": F.gelu,
    "tanh gelu": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "product": lambda x: x * (x + 1),
    "gated": lambda x: F.silu(x) * torch.sin(x),
    "broadcast product": lambda x: x * torch.randn(x.shape[-1], dtype=x.dtype, requires_grad=True),
    "layer scale": lambda x: F.gelu(x) * torch.randn(x.shape[-1], dtype=x.dtype),
    "from the left": lambda x: torch.randn(x.shape[-1], dtype=x.dtype) * F.silu(x),
    "by a number": lambda x: F.gelu(x) * 0.3,
    "rms norm": lambda x: F.rms_norm(x, x.shape[-1:], torch.randn(x.shape[-1], dtype=x.dtype)),
    "batched product": lambda x: torch.bmm(x[None] if x.dim() == 2 else x, (x[None] if x.dim() == 2 else x).mT + 1),
    "relu": F.relu,
    "sum": lambda x: x + 1,
}
LAYOUTS = {
    "plain": lambda x: x,
    "permuted": lambda x: x.permute(0, 2, 1),
    "moved": lambda x: x.permute(1, 2, 0),
    "every other": lambda x: x[..., ::2],
    "slice": lambda x: x[:, 1:],
    "expanded": lambda x: x[:1].expand(3, -1, -1),
    "flat": lambda x: x.flatten(0, 1),
}
VIEWS = {
    "none": lambda y: y,
    "flatten": lambda y: y.flatten(),
    "transpose": lambda y: y.transpose(-1, -2),
    "unsqueeze": lambda y: y.unsqueeze(1),
    "view": lambda y: y.view(2, -1) if y.is_contiguous() and y.numel() % 2 == 0 else y.reshape(-1),
    "chain": lambda y: y.unsqueeze(0).transpose(0, 1).squeeze(1).permute(*range(y.dim())),
    "select": lambda y: y[..., 0],
    "chunk": lambda y: y.chunk(2, -1)[1],
} | (MOVED := {
    "copied": lambda y: y.transpose(0, -1).contiguous(),
    "cycled": lambda y: y.unflatten(-1, (1, -1)).permute(-1, *range(y.dim())).contiguous(),
    "rolled": lambda y: torch.roll(y, (1, -2), (0, -1)).view(-1, y.shape[-1]),
    "rolled flat": lambda y: torch.roll(y, 3),
    "windows": lambda y: y.unflatten(0, (1, -1)).transpose(0, 2).contiguous().flatten(0, 1),
    "heads": lambda y: torch.roll(y.transpose(0, 1).flatten(1), 1, 0).view(1, -1, y.shape[-1]).mT.contiguous(),
    "padded by nothing": lambda y: F.pad(y, (0, 0)).transpose(0, 1).contiguous(),
    "padded": lambda y: F.pad(y, (0, 1)).transpose(0, 1).contiguous(),
})
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@settings(max_examples=300, deadline=None)
@given(*map(st.sampled_from, (list(SOURCES), list(LAYOUTS), list(VIEWS), DTYPES)))
def test_what_is_rebuilt_is_bit_equal_in_value_and_layout(source, layout, view, dtype):
    torch.manual_seed(0)
    leaf = torch.randn(3, 4, 6, dtype=dtype, requires_grad=True)
    x = VIEWS[view](SOURCES[source](LAYOUTS[layout](leaf)))
    found = recipe(x)
    if found is None:
        return
    again = found.make(*found.tensors)
    assert again.dtype == x.dtype and again.shape == x.shape and again.stride() == x.stride()
    assert torch.equal(again, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source", [s for s in SOURCES if s not in ("relu", "sum")])
def test_the_usual_cases_are_rebuilt_from_what_the_graph_keeps(source, dtype):
    if dtype == torch.bfloat16 and "norm" in source:
        pytest.skip("in pure bf16 the statistics are rounded: keeping is allowed")
    leaf = torch.randn(3, 4, 6, dtype=dtype, requires_grad=True)
    x = SOURCES[source](leaf + 0)
    found = recipe(x.flatten(0, 1))
    assert found is not None
    assert x.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in found.tensors}


@pytest.mark.parametrize("move", MOVED)
@pytest.mark.parametrize("source", ["layer norm", "gelu", "batched product"])
def test_what_was_copied_and_moved_is_rebuilt(source, move):
    leaf = torch.randn(3, 4, 6, requires_grad=True)
    x = VIEWS[move](SOURCES[source](leaf + 0))
    found = recipe(x)
    assert (found is None) == (move == "padded")  # the graph does not tell by what
    if found is not None:
        assert x.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in found.tensors}
        assert torch.equal(found.make(*found.tensors), x)


@pytest.mark.parametrize("source", ["layer norm", "gelu", "silu", "product"])
@pytest.mark.parametrize("write", ["out", "no_grad", "view", "detached", "chained"])
def test_nothing_is_rebuilt_after_the_tensor_was_written(source, write):
    x = SOURCES[source](torch.randn(3, 4, 6, requires_grad=True) + 0)
    if write == "out":
        x.add_(1)
    elif write == "no_grad":
        with torch.no_grad():
            x.mul_(2)
    elif write == "view":
        with torch.no_grad():
            x.view(-1)[0] = 7
    elif write == "detached":
        x.detach().zero_()
    else:
        x = F.dropout(x, 0.5, inplace=True).flatten(1)
    assert recipe(x) is None


@pytest.mark.parametrize("source", ["layer norm", "gelu", "product"])
def test_nothing_is_rebuilt_from_a_source_that_was_written(source):
    held = torch.randn(3, 4, 6, requires_grad=True) + 0
    x = SOURCES[source](held)
    with torch.no_grad():
        held.add_(1)
    assert recipe(x) is None


@pytest.mark.parametrize("source", ["layer norm", "gelu", "product"])
def test_nothing_is_rebuilt_under_saved_tensor_hooks(source):
    unpacked = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: unpacked.append(1) or t):
        x = SOURCES[source](torch.randn(3, 4, 6, requires_grad=True))
        assert recipe(x) is None
    assert not unpacked  # looking did not undo the hook's work
    with torch.autograd.graph.save_on_cpu():
        assert recipe(SOURCES[source](torch.randn(3, 4, 6, requires_grad=True))) is None


def test_a_leaf_and_a_detached_tensor_are_kept():
    assert recipe(torch.randn(3, requires_grad=True)) is None
    assert recipe(F.gelu(torch.randn(3, requires_grad=True)).detach()) is None


# ---- in models -------------------------------------------------------------------------------------------------------


def convnext() -> nn.Module:
    return timm.create_model("convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=4)


MODELS = {
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=2, num_heads=3),
    "eva02": lambda: timm.create_model("eva02_tiny_patch14_224", img_size=28, embed_dim=48, depth=2, num_heads=3,
                                       num_classes=4),
    "swin": lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=24,
                                      depths=(1, 2), num_heads=(2, 4)),
    "convnext": convnext,
}  # fmt: skip


def gradients(model: nn.Module, tuner: vp.Tuner, x: Tensor, autocast: bool = False) -> list[Tensor]:
    for p in tuner.parameters():
        p.grad = None
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(x)
    out.float().square().sum().backward()
    return [p.grad for p in tuner.parameters()]


@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast", "dropout"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_do_not_depend_on_rebuilding(name, mode, monkeypatch):
    dtype = torch.bfloat16 if mode == "bf16" else torch.float32
    model = MODELS[name]().to(dtype)
    tuner = vp.attach(model, vp.LoRA(rank=2, dropout=0.3 * (mode == "dropout"), targets="linear"), train="head")
    for adapter in tuner.adapters.values():
        nn.init.normal_(adapter.b, std=0.1)
    x = torch.randn(2, 3, 28 if name == "eva02" else 32, 28 if name == "eva02" else 32, dtype=dtype)
    used = []

    def counted(t):
        found = memory.recipe(t)
        used.append(found is not None)
        return found

    grads = []
    for look in (counted, lambda t: None):
        monkeypatch.setattr(lowrank, "recipe", look)
        torch.manual_seed(1)
        grads.append(gradients(model, tuner, x, mode == "autocast"))
    assert sum(used) >= 3 if mode != "bf16" else used
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_gradients_equal_those_of_plain_torch():
    model = MODELS["vit"]().double()
    tuner = vp.attach(model, vp.LoRA(rank=2, targets="query value attn_out mlp_in mlp_out"), train="head norm")
    for adapter in tuner.adapters.values():
        nn.init.normal_(adapter.b)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    fused = gradients(model, tuner, x)
    tuner.fused = False
    for a, b in zip(fused, gradients(model, tuner, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_checkpointing_gives_the_same_gradients_and_keeps_its_saving():
    model, x = MODELS["vit"](), torch.randn(8, 3, 32, 32, requires_grad=True)
    tuner = vp.attach(model, vp.LoRA(rank=2, targets="linear"), train="head")
    for adapter in tuner.adapters.values():
        nn.init.normal_(adapter.b, std=0.1)
    plain, bytes_plain = gradients(model, tuner, x), live_bytes(lambda: model(x))
    inner = model.blocks.forward
    model.blocks.forward = lambda y: checkpoint(inner, y, use_reentrant=False)
    bytes_checkpointed = live_bytes(lambda: model(x))
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(model, tuner, x), strict=True))
    assert bytes_checkpointed < 0.4 * bytes_plain


def test_writing_after_the_site_is_no_harm():
    """Callers add to the output, and some write to the input once the Linear has read it."""
    lin = nn.Linear(6, 6).double()
    tuner = vp.attach(nn.Sequential(lin), vp.LoRA(rank=2, targets="linear"))
    adapter = next(iter(tuner.adapters.values()))
    nn.init.normal_(adapter.b)
    leaf = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    want = torch.autograd.grad((lin(F.gelu(leaf)) + 1).square().sum(), [adapter.a, adapter.b, leaf])
    out = lin(F.gelu(leaf))
    assert not out._is_view()
    out.add_(1)
    got = torch.autograd.grad(out.square().sum(), [adapter.a, adapter.b, leaf])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    h = F.gelu(leaf)
    out = lin(h)
    with torch.no_grad():
        h.zero_()
    got = torch.autograd.grad((out + 1).square().sum(), [adapter.a, adapter.b, leaf])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    held = leaf + 0
    out = lin(F.gelu(held))
    with torch.no_grad():
        held.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# ---- bytes -----------------------------------------------------------------------------------------------------------


def small_vit() -> nn.Module:
    return timm.create_model("vit_small_patch16_224", img_size=64, depth=3)


@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast"])
def test_live_bytes_of_lora_on_every_linear_are_those_of_the_frozen_model(mode):
    dtype = torch.bfloat16 if mode == "bf16" else torch.float32
    model = small_vit().to(dtype).train()
    x = torch.randn(4, 3, 64, 64, dtype=dtype, requires_grad=True)

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            return model(x)

    full = live_bytes(run)
    model.requires_grad_(False)
    model.head.requires_grad_(True)  # it trains in either case, and keeps the last norm's output
    frozen = live_bytes(run)
    assert live_bytes(run) == frozen  # deterministic
    tuner = vp.attach(model, vp.LoRA(rank=8, targets="linear"), train="head")
    assert len(tuner.sites) == 12 and next(tuner.parameters()).dtype == torch.float32
    adapted, tokens = live_bytes(run), 4 * 17
    if mode == "bf16":
        # LayerNorm has rounded its statistics there, so that qkv and fc1 keep their input; in bf16, not in fp32
        allowed = frozen + 2 * tokens * (6 * 384 + 12 * 8)
    else:
        allowed = 1.02 * frozen
    if mode == "fp32":
        assert full > 1.5 * frozen  # what there is to save
    assert adapted <= allowed, (adapted / frozen, full / frozen)


def test_live_bytes_counts_what_is_alive():
    leaf = torch.randn(1000, requires_grad=True)
    assert live_bytes(lambda: leaf.exp()) == 4000
    assert live_bytes(lambda: (leaf.exp(), torch.zeros(500))) == 6000
    assert live_bytes(lambda: leaf.exp().sum()) in range(4000, 4200)
    assert live_bytes(lambda: None) == 0
