"""torch's own layers: `nn.MultiheadAttention` in every configuration, and transformer layers with their fast path."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from traces import assert_same, snapshot

import visionpeft as vp

E = 8
PARTS = ("query", "key", "value", "attn_out")


def merge_by_hand(m: nn.MultiheadAttention, deltas: dict[str, Tensor]) -> None:
    """Add the deltas to the weights of an attention without adapters."""
    with torch.no_grad():
        for i, part in enumerate(PARTS[:3]):
            if part in deltas and m._qkv_same_embed_dim:
                m.in_proj_weight[i * E : (i + 1) * E] += deltas[part]
            elif part in deltas:
                getattr(m, f"{part[0]}_proj_weight").add_(deltas[part])
        if "attn_out" in deltas:
            m.out_proj.weight += deltas["attn_out"]


def randomise(tuner: vp.Tuner) -> dict[str, Tensor]:
    """Give every adapter an effect; returns the deltas by part, scale included."""
    for adapter in tuner.adapters.values():
        nn.init.normal_(adapter.b)
    return {s.place: (a.scale * tuner.scale * a.b @ a.a).detach() for s, a in tuner.adapters.items()}


@st.composite
def cases(draw):
    own = draw(st.booleans())  # key and value of their own widths
    masks = draw(st.sampled_from(["", "float", "bool", "heads", "causal"]))
    return dict(
        kdim=5 if own else None,
        vdim=draw(st.sampled_from([6, E])) if own else None,
        bias=draw(st.booleans()),
        add_bias_kv=draw(st.booleans()),
        add_zero_attn=draw(st.booleans()),
        batch_first=draw(st.booleans()),
    ), dict(
        self_attention=not own and draw(st.booleans()),
        batched=draw(st.sampled_from([True, True, False])),
        masks=masks,
        padding=masks in ("", "float", "bool") and draw(st.booleans()),
        need_weights=draw(st.booleans()),
        average=draw(st.booleans()),
        train=draw(st.booleans()),
        parts=draw(st.lists(st.sampled_from(PARTS), min_size=1, unique=True)),
        scale=draw(st.sampled_from([1.0, 0.5])),
    )


def inputs(build: dict, call: dict) -> tuple[list[Tensor], dict]:
    n, lq, lk = 2, 3, 3 if call["self_attention"] else 4
    widths = (E, build["kdim"] or E, build["vdim"] or E)
    x = [torch.randn(n, length, w, dtype=torch.float64) for length, w in zip((lq, lk, lk), widths, strict=True)]
    if call["self_attention"]:
        x = [x[0]] * 3
    if not call["batched"]:
        x = [t[0] for t in x]
    elif not build["batch_first"]:
        x = [t.transpose(0, 1) for t in x] if not call["self_attention"] else [x[0].transpose(0, 1)] * 3
    kw = dict(need_weights=call["need_weights"], average_attn_weights=call["average"])
    if call["padding"]:
        padding = torch.zeros(n, lk, dtype=torch.bool)
        padding[:, -1] = True
        kw["key_padding_mask"] = padding if call["batched"] else padding[0]
    shape = (n * 2 if call["batched"] else 2, lq, lk) if call["masks"] == "heads" else (lq, lk)
    if call["masks"] in ("float", "heads"):
        kw["attn_mask"] = torch.randn(shape, dtype=torch.float64)
    elif call["masks"] == "bool":
        kw["attn_mask"] = torch.rand(shape) < 0.3
        kw["attn_mask"][:, 0] = False
    elif call["masks"] == "causal":
        kw["attn_mask"], kw["is_causal"] = torch.ones(shape, dtype=torch.bool).triu(1), True
    return x, kw


@settings(max_examples=120, deadline=None)
@given(cases())
def test_attention_with_lora_equals_merged_weights(case):
    build, call = case
    torch.manual_seed(0)
    m = nn.MultiheadAttention(E, 2, **build, dtype=torch.float64).train(call["train"])
    if m.in_proj_bias is not None:
        nn.init.normal_(m.in_proj_bias)
        nn.init.normal_(m.out_proj.bias)
    before = snapshot(m)
    tuner = vp.attach(m, vp.LoRA(rank=2, alpha=3, targets=" ".join(call["parts"])))
    tuner.scale = call["scale"]
    deltas = randomise(tuner)
    x, kw = inputs(build, call)
    outs = [m(*x, **kw)]
    with torch.no_grad():  # another path of torch's
        outs.append(m(*x, **kw))
    tuner.merge()
    outs.append(m(*x, **kw))
    tuner.detach()
    assert_same(before, m)
    merge_by_hand(m, deltas)
    y, weights = m(*x, **kw)
    for out, attention in outs:
        torch.testing.assert_close(out, y, rtol=0, atol=1e-12)
        assert (attention is None) == (weights is None)
        if weights is not None:
            torch.testing.assert_close(attention, weights, rtol=0, atol=1e-12)


@pytest.mark.parametrize("need_weights", [False, True])
def test_gradients_of_attention_equal_those_of_merged_weights(need_weights):
    """To A, B and the input, against autograd through W + s B A written out."""
    m = nn.MultiheadAttention(E, 2, batch_first=True, dtype=torch.float64)
    tuner = vp.attach(m, vp.LoRA(rank=2, targets="query key value attn_out"))
    randomise(tuner)
    x = torch.randn(2, 3, E, dtype=torch.float64, requires_grad=True)
    m(x, x, x, need_weights=need_weights)[0].square().sum().backward()
    at = {s.place: a for s, a in tuner.adapters.items()}
    got = [x.grad, *(at[p].a.grad for p in PARTS), *(at[p].b.grad for p in PARTS)]
    leaves = [(a.a.detach().requires_grad_(), a.b.detach().requires_grad_()) for a in (at[p] for p in PARTS)]
    z = x.detach().requires_grad_()
    w = m.in_proj_weight.detach() + torch.cat([b @ a for a, b in leaves[:3]])
    q, k, v = (t.view(2, 3, 2, 4).transpose(1, 2) for t in (z @ w.T + m.in_proj_bias.detach()).chunk(3, -1))
    y = ((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)
    a, b = leaves[3]
    (y @ (m.out_proj.weight.detach() + b @ a).T + m.out_proj.bias.detach()).square().sum().backward()
    want = [z.grad, *(a.grad for a, _ in leaves), *(b.grad for _, b in leaves)]
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_a_causal_hint_without_mask_is_refused_as_torch_does():
    m = nn.MultiheadAttention(E, 2, batch_first=True)
    x = torch.randn(2, 3, E)
    with pytest.raises(RuntimeError):
        m(x, x, x, is_causal=True, need_weights=False)
    vp.attach(m, vp.LoRA(rank=1, targets="query"))
    with pytest.raises((RuntimeError, vp.VisionPEFTError)):
        m(x, x, x, is_causal=True, need_weights=False)


@pytest.mark.parametrize("need_weights", [False, True])
def test_weights_go_back_after_an_error(need_weights):
    m = nn.MultiheadAttention(E, 2, batch_first=True)
    tuner = vp.attach(m, vp.LoRA(rank=1, targets="query attn_out"))
    held = [m.in_proj_weight, m.out_proj.weight]
    with pytest.raises(Exception):  # noqa: B017 - whatever torch says to a wrong width
        m(*[torch.randn(2, 3, E + 1)] * 3, need_weights=need_weights)
    assert m.in_proj_weight is held[0] and m.out_proj.weight is held[1]
    tuner.detach()


def test_adapter_dropout_in_the_lent_path_is_refused_by_name_not_skipped():
    m = nn.MultiheadAttention(E, 2, batch_first=True)
    vp.attach(m, vp.LoRA(rank=1, dropout=0.5, targets="query"))
    x = torch.randn(2, 3, E)
    m(x, x, x, need_weights=False)
    with pytest.raises(vp.VisionPEFTError, match="dropout"):
        m(x, x, x)
    m.eval()(x, x, x)


# ---- transformer layers ----------------------------------------------------------------------------------------------


def layer(**more: object) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(E, 2, 16, dropout=0.0, batch_first=True, **more)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("targets", ["query", "attn_out", "mlp_in", "mlp_out", "norm", "linear"])
def test_fast_path_of_an_encoder_layer_is_off_while_bound(targets, activation):
    model = layer(activation=activation).eval()
    before = snapshot(model)
    x = torch.randn(2, 3, E)
    with torch.no_grad():
        plain = model(x)
    tuner = vp.attach(model, vp.SSF(targets=targets) if targets == "norm" else vp.LoRA(rank=2, targets=targets))
    tuner.probe(x)
    for adapter in tuner.adapters.values():
        nn.init.normal_(adapter.beta if targets == "norm" else adapter.b)
    with torch.no_grad():
        fast = model(x)
    assert torch.equal(fast, model(x).detach()) and not torch.allclose(fast, plain, atol=1e-3)
    tuner.detach()
    assert_same(before, model)
    assert model.activation_relu_or_gelu == {"relu": 1, "gelu": 2}[activation]
    with torch.no_grad():
        assert torch.equal(model(x), plain)


@pytest.mark.parametrize("within", [None, "layers.0.*", "layers.1.*"])
@pytest.mark.parametrize("padded", [False, True])
def test_encoder_of_layers_with_adapters_in_some(within, padded):
    """With a padding mask the encoder packs its tokens for all layers if the first one would take the fast path."""
    model = nn.TransformerEncoder(layer(), 2).eval()
    x = torch.randn(2, 3, E)
    padding = torch.tensor([[False, False, False], [False, False, True]]) if padded else None
    tuner = vp.attach(model, vp.LoRA(rank=2, targets="linear", within=within))
    randomise(tuner)
    slow = model(x, src_key_padding_mask=padding)
    with torch.no_grad():
        fast = model(x, src_key_padding_mask=padding)
    kept = torch.ones(2, 3, dtype=torch.bool) if padding is None else ~padding
    torch.testing.assert_close(fast[kept], slow[kept], rtol=1e-5, atol=1e-5)


def test_decoder_layer_adapts_both_attentions():
    model = nn.TransformerDecoderLayer(E, 2, 16, dropout=0.0, batch_first=True)
    tuner = vp.attach(model, vp.LoRA(rank=2, targets="linear"))
    assert len(tuner.sites) == 10
    tuner.probe(torch.randn(2, 3, E), torch.randn(2, 4, E))


def test_torchvision_vit():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5).eval()
    x = torch.randn(2, 3, 32, 32)
    before = snapshot(model)
    with torch.no_grad():
        plain = model(x)
    tuner = vp.attach(model, vp.LoRA(rank=2, targets="linear"))
    tuner.probe(x)
    assert len([s for s in tuner.sites if s.path.startswith("encoder.")]) == 12
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain, rtol=0, atol=1e-6)
    randomise(tuner)
    with torch.no_grad():
        adapted = model(x)
        tuner.merge()
        torch.testing.assert_close(model(x), adapted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(adapted, plain, atol=1e-2)
    tuner.detach()
    assert_same(before, model)
