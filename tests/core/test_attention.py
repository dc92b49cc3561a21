"""Every backend gives torch's attention and its gradients; chunks keep no scores; the model is left as it was."""

from __future__ import annotations

import math

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import visionpeft as vp
from visionpeft import attention
from visionpeft.attention import AttentionError, Call
from visionpeft.memory import live_bytes

BACKENDS = ("auto", "sdpa", "chunked", "math")


def call(kind: str, dtype: torch.dtype = torch.float64) -> Call:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 4, dtype=dtype, requires_grad=True) for n in (37, 19, 19))
    if kind == "causal":
        return Call(q, k, v, causal=True)
    if kind == "boolean mask":
        return Call(q, k, v, mask=torch.rand(2, 1, 37, 19) < 0.8)
    if kind == "mask that learns":
        return Call(q, k, v, mask=torch.randn(3, 1, 19, dtype=dtype, requires_grad=True))
    if kind == "wide values":
        return Call(q, k, torch.randn(2, 3, 19, 7, dtype=dtype, requires_grad=True), scale=0.3)
    if kind == "grouped":
        return Call(torch.randn(2, 6, 37, 4, dtype=dtype, requires_grad=True), k, v, grouped=True)
    return Call(q, k, v)


def gradients(c: Call, y: Tensor) -> list[Tensor]:
    leaves = [t for t in c[:4] if isinstance(t, Tensor) and t.requires_grad]
    return list(torch.autograd.grad((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum(), leaves))


@pytest.mark.parametrize("kind", ["plain", "causal", "boolean mask", "mask that learns", "wide values", "grouped"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_gives_torchs_output_and_gradients(backend, kind, monkeypatch):
    monkeypatch.setattr(attention, "SCORES", 500)  # several chunks, the last one shorter
    monkeypatch.setattr(attention, "WORTH", 0)
    c = call(kind)
    expected = F.scaled_dot_product_attention(c.q, c.k, c.v, c.mask, 0.0, c.causal, scale=c.scale, enable_gqa=c.grouped)
    y = attention.BACKENDS[backend](c)
    assert torch.allclose(y, expected, rtol=0, atol=1e-13)
    for found, right in zip(gradients(c, y), gradients(c, expected), strict=True):
        assert torch.allclose(found, right, rtol=0, atol=1e-12)


def test_chunked_dropout_has_the_gradient_of_what_it_computed(monkeypatch):
    monkeypatch.setattr(attention, "SCORES", 500)
    c = call("plain")._replace(dropout=0.4)

    def with_seed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(3)
        return attention.BACKENDS["chunked"](c._replace(q=q, k=k, v=v))

    assert torch.autograd.gradcheck(with_seed, (c.q[:1, :1, :20], c.k[:1, :1], c.v[:1, :1]))
    values = torch.ones_like(c.v)
    mean = torch.stack([attention.BACKENDS["chunked"](c._replace(v=values)) for _ in range(200)]).mean()
    assert abs(float(mean) - 1) < 0.02


@pytest.mark.parametrize("kind", ["dropout", "mask that learns"])
def test_chunks_keep_less_than_torch_where_it_has_no_fused_kernel(kind):
    def alive(backend: str) -> int:
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, 2, 1024, 16, requires_grad=True) for _ in range(3))
        mask = torch.zeros(1, 2, 1024, 1024, requires_grad=True) if kind == "mask that learns" else None
        c = Call(q, k, v, mask, 0.1 if kind == "dropout" else 0.0)
        return live_bytes(lambda: attention.BACKENDS[backend](c))

    assert alive("chunked") < 0.05 * alive("sdpa")


def test_auto_says_what_it_takes_and_why():
    big = [torch.empty(1, 8, 4096, 64, device="meta") for _ in range(3)]
    assert attention.explain(Call(*big)) == ("sdpa", "torch has a fused kernel that keeps no scores")
    name, why = attention.explain(Call(*big, dropout=0.1))
    assert name == "chunked" and "attention dropout" in why and f"{8 * 4096 * 4096:,}" in why
    small = [torch.empty(1, 1, 8, 64, device="meta") for _ in range(3)]
    assert attention.explain(Call(*small, dropout=0.1))[0] == "sdpa"


def vit() -> tuple[nn.Module, tuple[Tensor, ...]]:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=2, num_classes=3)
    return model.eval(), (torch.randn(2, 3, 32, 32),)


def clip() -> tuple[nn.Module, tuple[Tensor, ...]]:
    vision = {"layers": 2, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16}
    text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 2}
    model = open_clip.CLIP(8, vision, text)
    return model.eval(), (torch.randn(2, 3, 16, 16), torch.randint(1, 31, (2, 8)))


def unet() -> tuple[nn.Module, tuple[Tensor, ...]]:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
                                 down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=8,
                                 up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=4)  # fmt: skip
    return model.eval(), (torch.randn(1, 4, 8, 8), torch.tensor(3), torch.randn(1, 5, 8))


def outputs(model: nn.Module, x: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        found = model(*x)
    found = getattr(found, "sample", found)
    return [found] if isinstance(found, Tensor) else [t for t in found if isinstance(t, Tensor)]


@pytest.mark.parametrize("make", [vit, clip, unet])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_whole_model_with_adapters(make, backend, monkeypatch):
    torch.manual_seed(0)
    model, x = make()
    keys, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    tuner = vp.attach(model, vp.LoRA(rank=2, targets="query value"), probe=False)
    for p in tuner.parameters():
        nn.init.normal_(p, std=0.3)
    expected = outputs(model, x)
    asked = []
    monkeypatch.setitem(attention.BACKENDS, backend, _spy(attention.BACKENDS[backend], asked))
    count = vp.set_attention(model, backend)
    for found, right in zip(outputs(model, x), expected, strict=True):
        assert torch.allclose(found, right, atol=1e-5)
    assert len(asked) == count > 0
    vp.set_attention(model, None)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, x), expected, strict=True))
    tuner.detach()
    assert list(model.state_dict()) == keys and [type(m) for m in model.modules()] == kinds


def _spy(backend, asked: list):
    def spied(c: Call) -> Tensor:
        asked.append(c)
        return backend(c)

    return spied


def test_the_switch_outlives_adapters_and_merges():
    model, x = vit()
    vp.set_attention(model, "math")
    tuner = vp.attach(model, vp.LoRA(rank=2))
    tuner.merge()
    assert type(model.blocks[0].attn)._mixins and model.blocks[0].attn.fused_attn
    tuner.unmerge()
    tuner.detach()
    asked: list = []
    before = attention.BACKENDS["math"]
    try:
        attention.BACKENDS["math"] = _spy(before, asked)
        outputs(model, x)
    finally:
        attention.BACKENDS["math"] = before
    assert len(asked) == 2


def encoder() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval(), (torch.randn(2, 5, 8),)


@pytest.mark.parametrize("grad", [True, False], ids=["gradients", "no gradients"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("make", [clip, encoder])
def test_torchs_attention_is_answered_without_adapters_too(make, train, grad, monkeypatch):
    """It dispatches itself past the switch, and its layers past it in eval; adapters and merging change nothing."""
    model, x = make()
    model.train(train)
    fields = [dict(vars(m)) for m in model.modules()]
    asked: list = []
    monkeypatch.setitem(attention.BACKENDS, "math", _spy(attention.BACKENDS["math"], asked))
    count = vp.set_attention(model, "math", trained_tokens=50)
    with torch.set_grad_enabled(grad):
        y = _tensors(model(*x))
        assert len(asked) == count > 0
        tuner = vp.attach(model, vp.LoRA(rank=2, targets="query value"), probe=False)
        for act in (lambda: None, tuner.merge, tuner.unmerge, tuner.detach):
            act()
            for a, b in zip(_tensors(model(*x)), y, strict=True):
                torch.testing.assert_close(a, b)
        assert len(asked) == 5 * count
        vp.set_attention(model, None)
        model(*x)
    assert len(asked) == 5 * count and [dict(vars(m)) for m in model.modules()] == fields


def _tensors(found) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else [t for t in found if isinstance(t, Tensor)]


def test_all_is_put_back_while_adapters_stay():
    model, _ = vit()
    model.blocks[0].attn.fused_attn = False
    tuner = vp.attach(model, vp.methods.PrefixTuning(tokens=2))
    vp.set_attention(model, "sdpa")
    assert all(block.attn.fused_attn for block in model.blocks)
    vp.set_attention(model, None)
    assert [block.attn.fused_attn for block in model.blocks] == [False, True]
    tuner.detach()
    assert [block.attn.fused_attn for block in model.blocks] == [False, True]


def test_a_forward_of_its_own_is_refused_before_anything_changes():
    model, _ = vit()
    kinds = [type(m) for m in model.modules()]
    plain = model.blocks[1].attn.forward
    model.blocks[1].attn.forward = lambda *args, **kwargs: plain(*args, **kwargs)
    with pytest.raises(vp.errors.SiteError, match="instance-level"):
        vp.set_attention(model, "math")
    assert [type(m) for m in model.modules()] == kinds


@pytest.mark.parametrize("backend", BACKENDS)
def test_under_autocast_the_types_are_torchs(backend, monkeypatch):
    """Normed queries and keys are wider than the values."""
    from diffusers.models.attention_processor import Attention

    monkeypatch.setattr(attention, "WORTH", 0)
    torch.manual_seed(0)
    model, x = Attention(8, heads=2, dim_head=4, qk_norm="rms_norm", eps=1e-5), torch.randn(2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        vp.set_attention(model, backend)
        y = model(x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    y.float().sum().backward()
    assert all(p.grad is not None for p in model.to_v.parameters())


def test_the_scale_for_other_resolutions_keeps_the_entropy():
    """Random queries and keys (arXiv 2306.08645): plainly the entropy grows with the tokens, scaled much less so."""

    def entropy(n: int, factor: float) -> float:
        torch.manual_seed(0)
        q, k = torch.randn(64, 64), torch.randn(n, 64)
        p = (3.5 * factor * q @ k.T / 8).softmax(-1)
        return float(-(p * p.log()).sum(-1).mean())

    few, many = 32**2, 96**2
    factor = math.sqrt(math.log(many) / math.log(few))
    assert abs(entropy(many, factor) - entropy(few, 1)) < 0.6 * abs(entropy(many, 1) - entropy(few, 1))
    model, x = vit()
    scales: list[float | None] = []
    before = attention.BACKENDS["sdpa"]
    try:
        attention.BACKENDS["sdpa"] = lambda c: (scales.append(c.scale), before(c))[1]
        vp.set_attention(model, "sdpa", trained_tokens=17)
        outputs(model, x)
    finally:
        attention.BACKENDS["sdpa"] = before
    assert scales == [pytest.approx(math.sqrt(math.log(5) / math.log(17)) / math.sqrt(12))] * 2


def test_what_cannot_run_is_said():
    model, _ = vit()
    with pytest.raises(AttentionError, match="unknown attention backend 'flash'.*chunked"):
        vp.set_attention(model, "flash")
    with pytest.raises(AttentionError, match="no attention module"):
        vp.set_attention(nn.Linear(2, 2), "math")
    with pytest.raises(vp.VisionPEFTError, match="xformers"):
        vp.set_attention(model, "xformers")
