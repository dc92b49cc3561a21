"""Every timm family: the sites it has, adapters that live at them, and a model that is untouched afterwards."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from timm_zoo import ATTENTION, CONVS, ZOO
from torch import Tensor, nn
from traces import assert_same, snapshot

import visionpeft as vp

LORA = {
    "default": vp.LoRA(rank=1),
    "linear": vp.LoRA(rank=1, targets="linear"),
    "conv": vp.LoRA(rank=1, targets="conv"),
}


def first(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def attach(model: nn.Module, method: vp.methods.Method, x: Tensor, **more: object) -> vp.Tuner:
    """With a probe on an input that the model takes: the families built by their classes carry no config."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuner = vp.attach(model, method, **more)
    tuner.probe(x)
    return tuner


@pytest.mark.parametrize("name", ZOO)
def test_roles_and_numbers_of_sites(name):
    member = ZOO[name]
    model = member.build()
    sites = vp.inspect(model)
    found = Counter(site.role for site in sites if site.role not in ("", "norm", "conv"))
    assert dict(found) == member.counts()
    assert sum(not site.called for site in sites) == member.bypassed
    backbone = vp.sites.Backbone(model)
    assert backbone.heads() == member.heads.split()
    assert len(LORA["default"].choose(backbone)) == member.default
    assert len(vp.SSF().choose(backbone)) == member.ssf
    if member.linear:
        assert len(LORA["linear"].choose(backbone)) == member.linear


@pytest.mark.parametrize("targets", ["default", "linear"])
@pytest.mark.parametrize("name", ZOO)
def test_lora_starts_as_the_identity_lives_everywhere_and_leaves_no_trace(name, targets):
    member = ZOO[name]
    targets = "conv" if name in CONVS and targets == "linear" else targets
    model, x = member.build(), member.input()
    before = snapshot(model)
    with torch.no_grad():
        plain = first(model(x))
    tuner = attach(model, LORA[targets], x)
    with torch.no_grad():
        if member.exact:
            assert torch.equal(first(model(x)), plain)
        torch.testing.assert_close(first(model(x)), plain, rtol=0, atol=1e-6 * plain.abs().max().item())
    assert_lives(model, tuner, x)
    tuner.detach()
    assert_same(before, model)
    with torch.no_grad():
        assert torch.equal(first(model(x)), plain)


def assert_lives(model: nn.Module, tuner: vp.Tuner, x: Tensor) -> None:
    """Independently of the probe: every up matrix gets a gradient that is not zero."""
    (first(model(x)) * torch.linspace(-1, 1, first(model(x)).shape[-1])).sum().backward()
    dead = [str(site) for site, adapter in tuner.adapters.items() if adapter.b.grad is None or not adapter.b.grad.any()]
    assert not dead
    for p in tuner.parameters():
        p.grad = None


@pytest.mark.parametrize("name", ZOO)
def test_ssf_of_neutral_values_is_the_identity_and_leaves_no_trace(name):
    member = ZOO[name]
    model, x = member.build(), member.input()
    before = snapshot(model)
    with torch.no_grad():
        plain = first(model(x))
    tuner = attach(model, vp.SSF(), x, train="head")
    with torch.no_grad():
        assert not torch.allclose(first(model(x)), plain, rtol=1e-4, atol=1e-4)
        for adapter in tuner.adapters.values():
            adapter.gamma.fill_(1)
            adapter.beta.zero_()
        torch.testing.assert_close(first(model(x)), plain, rtol=0, atol=2e-6 * plain.abs().max().item())
    tuner.detach()
    assert_same(before, model)


@pytest.mark.parametrize("name", ZOO)
def test_train_head_means_every_classifier_and_nothing_else(name):
    member = ZOO[name]
    model = member.build()
    tuner = vp.attach(model, "linear")
    heads = member.heads.split()
    wanted = sum(p.numel() for head in heads for p in model.get_submodule(head).parameters())
    assert sum(p.numel() for p in tuner.parameters()) == wanted
    assert {path.split(".")[0] for path, _ in tuner.trained} == {head.split(".")[0] for head in heads}


# ---- which rows are whose ------------------------------------------------------------------------------------------


def captured(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Query, key and value of every call of scaled dot-product attention."""
    calls, real = [], F.scaled_dot_product_attention
    for module in model.modules():
        if hasattr(module, "fused_attn"):  # Swin has it off by default
            module.fused_attn = True

    def spy(q: Tensor, k: Tensor, v: Tensor, *args: object, **kwargs: object) -> Tensor:
        calls.append((q, k, v))
        return real(q, k, v, *args, **kwargs)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(F, "scaled_dot_product_attention", spy)
        model(x)
    return calls


BY_SDPA = [n for n in ATTENTION if n not in ("swinv2", "xcit", "cait", "davit", "mvitv2")]


@pytest.mark.parametrize("part", ["query", "key", "value"])
@pytest.mark.parametrize("name", BY_SDPA)
def test_a_part_of_qkv_reaches_that_argument_of_attention_and_no_other(name, part, monkeypatch):
    member = ZOO[name]
    model, x = member.build(), member.input()
    site = next(s for s in vp.inspect(model) if s.part == part)
    plain = captured(model, x, monkeypatch)[0]
    tuner = attach(model, vp.LoRA(rank=2, targets=lambda s: s == site), x)
    torch.nn.init.normal_(tuner.adapters[site].b)
    now = captured(model, x, monkeypatch)[0]
    changed = [not torch.allclose(a, b, atol=1e-4) for a, b in zip(plain, now, strict=True)]
    assert changed == [part == p for p in ("query", "key", "value")]


@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_parts_of_mvitv2_reach_their_own_pooling(part):
    """It has no fused attention, but a norm for each of q, k and v behind their pooling."""
    model, x = ZOO["mvitv2"].build(), ZOO["mvitv2"].input()
    attention, seen = model.stages[0].blocks[0].attn, {}
    for letter in "qkv":
        getattr(attention, f"norm_{letter}").register_forward_hook(lambda m, i, o, at=letter: seen.update({at: o}))
    model(x)
    plain = dict(seen)
    tuner = attach(model, vp.LoRA(rank=2, targets=lambda s: s.part == part and s.path.startswith("stages.0.")), x)
    torch.nn.init.normal_(next(iter(tuner.adapters.values())).b)
    model(x)
    assert [letter for letter in "qkv" if not torch.allclose(seen[letter], plain[letter], atol=1e-4)] == [part[0]]


SOFTMAX_OVER_KEYS = ["vit", "deit3", "beitv2", "swin", "samvit", "naflexvit", "cait", "hiera", "maxvit"]


@pytest.mark.parametrize("name", SOFTMAX_OVER_KEYS)
def test_attention_does_not_see_a_constant_added_to_all_keys(name):
    member = ZOO[name]
    model, x = member.build().double(), member.input().double()
    with torch.no_grad():
        plain = first(model(x))
    effects = {}
    for part in ("query", "key", "value"):
        tuner = attach(model, vp.SSF(targets=part), x)
        for adapter in tuner.adapters.values():
            torch.nn.init.ones_(adapter.gamma)
            torch.nn.init.normal_(adapter.beta)
        with torch.no_grad():
            effects[part] = (first(model(x)) - plain).abs().max().item()
        tuner.detach()
    # beta of the query reweights the keys, and value's goes straight through: only the key's may vanish
    assert effects["key"] < 1e-10 < 1e-4 < min(effects["query"], effects["value"])


def test_cross_covariance_attention_takes_its_rows_apart_as_we_do():
    """XCA of XCiT: softmax(q k^T) over channels with normalised q and k, written out from hand-sliced weights."""
    model = ZOO["xcit"].build().double()
    xca, x = model.blocks[0].attn, torch.randn(2, 4, 48, dtype=torch.float64)
    sites = {s.part: s for s in vp.inspect(model) if s.path == "blocks.0.attn.qkv" and s.part}
    w, b = xca.qkv.weight, xca.qkv.bias
    q, k, v = (
        F.linear(x, w[slice(*s.rows)], b[slice(*s.rows)]).view(2, 4, 3, 16).permute(0, 2, 3, 1)
        for s in (sites["query"], sites["key"], sites["value"])
    )
    attention = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * xca.temperature).softmax(-1)
    y = xca.proj((attention @ v).permute(0, 3, 1, 2).reshape(2, 4, 48))
    torch.testing.assert_close(xca(x), y, rtol=0, atol=1e-12)


def test_channel_attention_of_davit_takes_its_rows_apart_as_we_do():
    model = ZOO["davit"].build().double()
    path, attention = next((p, m) for p, m in model.named_modules() if type(m).__name__.startswith("ChannelAttention"))
    width, heads = attention.qkv.in_features, attention.num_heads
    sites = {s.part: s for s in vp.inspect(model) if s.path == f"{path}.qkv" and s.part}
    x, (w, b) = torch.randn(2, 5, width, dtype=torch.float64), (attention.qkv.weight, attention.qkv.bias)
    q, k, v = (
        F.linear(x, w[slice(*s.rows)], b[slice(*s.rows)]).view(2, 5, heads, -1).transpose(1, 2)
        for s in (sites["query"], sites["key"], sites["value"])
    )
    scores = ((k * (width // heads) ** -0.5).mT @ v).softmax(-1)
    y = attention.proj((scores @ q.mT).mT.transpose(1, 2).reshape(2, 5, width))
    torch.testing.assert_close(attention(x), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["levit", "maxvit_head_first"])
def test_interleaved_rows_are_one_site(name):
    """There "rows 0 to D are the query" is false: each head has its own q, k and v rows in turn."""
    sites = vp.inspect(ZOO[name].build())
    assert not [s for s in sites if s.part in ("query", "key", "value")]
    with pytest.raises(vp.VisionPEFTError, match="qkv"):
        vp.attach(ZOO[name].build(), vp.LoRA(rank=1, targets="value"))


def test_the_mlp_of_a_relative_position_bias_has_no_role():
    sites = [s for s in vp.inspect(ZOO["maxvit_head_first"].build()) if "rel_pos" in s.path]
    assert len(sites) == 8 and {s.role for s in sites} == {""}


# ---- reading around a weight ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["eva02", "beitv2", "swinv2"])
def test_bypassed_qkv_acts_as_the_merged_weight_would(name):
    member = ZOO[name]
    model, x = member.build().double(), member.input().double()
    tuner = attach(model, vp.LoRA(rank=2, targets="query key value"), x)
    for adapter in tuner.adapters.values():
        torch.nn.init.normal_(adapter.b)
    with torch.no_grad():
        adapted = model(x)
    deltas = {site: adapter.scale * adapter.b @ adapter.a for site, adapter in tuner.adapters.items()}
    tuner.detach()
    with torch.no_grad():
        plain = model(x)
        for site, delta in deltas.items():
            model.get_submodule(site.path).weight[slice(*site.rows)] += delta
        torch.testing.assert_close(adapted, model(x), rtol=0, atol=1e-10)
    assert (adapted - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["eva02", "beitv2", "swinv2"])
def test_the_switch_is_thrown_while_bound_and_put_back(name):
    model, x = ZOO[name].build(), ZOO[name].input()
    owners = [m for m in model.modules() if hasattr(m, "qkv_bias_separate")]
    assert owners and not any(m.qkv_bias_separate for m in owners)
    one = attach(model, vp.LoRA(rank=1, targets="query"), x, name="one")
    two = attach(model, vp.LoRA(rank=1, targets="value"), x, name="two")
    assert all(m.qkv_bias_separate for m in owners)
    with one.disabled():
        assert all(m.qkv_bias_separate for m in owners)
        with two.disabled():
            assert not any(m.qkv_bias_separate for m in owners)
    one.detach()
    assert all(m.qkv_bias_separate for m in owners)
    two.detach()
    assert not any(m.qkv_bias_separate for m in owners)


# ---- convs that treat their weight ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bit", "nfnet", "efficientnet", "regnet", "resnet", "convnext_of_convs"])
def test_merged_convs_do_what_adapted_convs_do(name):
    """Weight-standardised, grouped and depthwise ones too."""
    member = ZOO[name]
    model, x = member.build().double(), member.input().double()
    tuner = attach(model, LORA["default"], x)
    for adapter in tuner.adapters.values():
        torch.nn.init.normal_(adapter.b, std=0.05)
    before = snapshot(model)
    with torch.no_grad():
        adapted = model(x)
        tuner.merge()
        merged = model(x)
        tuner.unmerge()
        assert torch.equal(model(x), adapted)
        with tuner.disabled():
            plain = model(x)
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-9 * adapted.abs().max().item())
    assert (plain - adapted).abs().max() > 1e-3 * plain.abs().max()
    assert_same(before, model)


def test_caches_of_levit_do_not_outlive_the_adapter():
    """In eval its attention keeps a table made from `attention_biases`, which full fine-tuning changes."""
    model, x = ZOO["levit"].build(), ZOO["levit"].input()
    with torch.no_grad():
        plain = first(model(x))
        tuner = vp.attach(model, "full")
        for p in tuner.parameters():
            p.add_(0.1)
        assert not torch.allclose(first(model(x)), plain)
        tuner.detach()
        assert torch.equal(first(model(x)), plain)
