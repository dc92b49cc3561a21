"""Methods of whole attentions, branches and blocks by their formulas in float64: prefix tuning, Compacter, MoSA, Rein
and NOAH's sub-networks."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from test_formulas import HEADS, D, assert_equal, compare, gelu, image, shake, vit
from test_visual_formulas import by_site, walk
from torch import Tensor

import visionpeft as vp
from visionpeft.methods.mosa import consistency

M = vp.methods


# ---- prefix tuning --------------------------------------------------------------------------------------------------


def gated(q: Tensor, k: Tensor, v: Tensor, own: dict[str, Tensor]) -> Tensor:
    """(1 - l) attention(q, k, v) + l attention(q, P_k, P_v), l the prefix's share of the exponentials."""

    def heads(t: Tensor) -> Tensor:
        return t.unflatten(-1, (HEADS, -1)).transpose(-3, -2)

    q, k, v, pk, pv = (heads(t) for t in (q, k, v, own["key"], own["value"]))
    tokens, prefix = (torch.exp(q @ t.transpose(-1, -2) / math.sqrt(q.shape[-1])) for t in (k, pk))
    share = prefix.sum(-1, keepdim=True) / (prefix.sum(-1, keepdim=True) + tokens.sum(-1, keepdim=True))
    one, two = (e / e.sum(-1, keepdim=True) @ t for e, t in ((tokens, v), (prefix, pv)))
    return ((1 - share) * one + share * two).transpose(-3, -2).flatten(-2)


def test_prefix_is_the_unified_views_gate():
    model, x = vit(), image()
    tuner = shake(vp.attach(model, M.PrefixTuning(tokens=3)))
    own = by_site(tuner)
    pairs = [{part: own[f"blocks.{i}.attn.qkv", part]["prefix"] for part in ("key", "value")} for i in (0, 1)]
    turn = iter(pairs)
    compare(model, walk(model, x, attend=lambda q, k, v: gated(q, k, v, next(turn))), x, tuner)
    assert model.forward_features(x).shape == (2, 17, D)


def test_prefix_beside_prompts_and_convpass_in_either_order():
    """Each counts its own tokens only: the same output whatever came first."""
    methods = {"a": M.PrefixTuning(tokens=3), "b": M.VPT(tokens=2), "c": M.Convpass(hidden=4)}
    outputs, x = [], image()
    torch.manual_seed(3)
    state = None
    for order in ("abc", "cba", "bac"):
        torch.manual_seed(5)
        model = vit()
        tuners = {name: vp.attach(model, methods[name], name=name) for name in order}
        state = state or {name: shake(t).state_dict() for name, t in tuners.items()}
        for name, tuner in tuners.items():
            tuner.load_state_dict(state[name])
        outputs.append(model(x).detach())
    assert_equal(outputs[0], outputs[1])
    assert_equal(outputs[0], outputs[2])


def test_prefix_refuses_attention_that_counts_its_tokens():
    small = dict(img_size=32, window_size=4, embed_dim=8, depths=(1, 1), num_heads=(2, 2), num_classes=0)
    swin = timm.create_model("swin_tiny_patch4_window7_224", **small)
    beit = timm.create_model("beit_base_patch16_224", img_size=32, embed_dim=D, depth=1, num_heads=2)
    for model in (swin, beit):
        with pytest.raises(vp.errors.SiteError, match="block"):
            vp.attach(model, M.PrefixTuning())
    with pytest.raises(vp.errors.SiteError, match=r"blocks\.0\.attn.*both key and value"):
        vp.attach(vit(), M.PrefixTuning(targets="key"))


# ---- Compacter ------------------------------------------------------------------------------------------------------


def test_compacter():
    """x + z + Up gelu(Down z), Down = sum_i A_i kron s_i t_i^T; the rule A once for the network."""
    model, x = vit(), image()
    tuner = shake(vp.attach(model, M.Compacter(hidden=8, n=4)))
    own = by_site(tuner)
    rule = own["", "rule"]["rule"]

    def matrix(s: Tensor, t: Tensor) -> Tensor:
        return sum(torch.kron(rule[i], torch.outer(s[i], t[i])) for i in range(4))

    def behind(part: str):
        def branch(p: str, h: Tensor, u: Tensor, z: Tensor) -> Tensor:
            t = own[p, part]
            hidden = z @ matrix(t["down_s"], t["down_t"]) + t["down_bias"]
            tanh = torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3))
            return z + (hidden * 0.5 * (1 + tanh)) @ matrix(t["up_s"], t["up_t"]) + t["up_bias"]

        return branch

    compare(model, walk(model, x, attn=behind("attention"), mlp=behind("mlp")), x, tuner)


def test_compacter_needs_widths_that_n_divides():
    with pytest.raises(vp.errors.MethodError, match="n=5 must divide hidden=32"):
        M.Compacter(n=5)
    with pytest.raises(vp.errors.SiteError, match=rf"n=5 does not divide its width {D}"):
        vp.attach(vit(), M.Compacter(hidden=5, n=5))


# ---- MoSA -----------------------------------------------------------------------------------------------------------


def mosa(t: dict[str, Tensor], h: Tensor, own: Tensor | None = None) -> Tensor:
    """Up gelu(Down LN(x)); `own` marks the entries of one expert."""
    centred = h - h.mean(-1, keepdim=True)
    u = centred / (h.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt() * t["norm_weight"] + t["norm_bias"]
    weight, bias = t["up_weight"], t["up_bias"]
    if own is not None:
        weight, bias = weight * own[:, :-1], bias * own[:, -1]
    return gelu(u @ t["down_weight"].T + t["down_bias"]) @ weight.T + bias


def test_mosa_outside_training_is_all_experts_whole():
    model, x = vit(), image()
    tuner = shake(vp.attach(model, M.MoSA(hidden=4)))
    own = by_site(tuner)
    compare(model, walk(model, x, mlp=lambda p, h, u, z: z + 0.1 * mosa(own[p, "mlp"], h)), x, tuner)


def test_mosa_trains_one_expert_at_a_time():
    """Each forward in training is that of one part, four times; only its entries get gradients; parts split Up evenly.

    On average over the parts it is what acts outside training.
    """
    model = vit()
    tuner = shake(vp.attach(model, M.MoSA(hidden=4, dropout=0), probe=False))
    site, adapter = next(iter(tuner.adapters.items()))
    t = dict(adapter.named_parameters())
    assert adapter.expert.unique(return_counts=True)[1].tolist() == [D * 5 // 4] * 4
    x, z = torch.randn(2, 5, D, dtype=torch.float64), torch.zeros(2, 5, D, dtype=torch.float64)
    expected = [4 * 0.1 * mosa(t, x, adapter.expert == i) for i in range(4)]
    adapter.train()
    seen = set()
    for _ in range(40):
        y = adapter(x, z)
        (i,) = [i for i, e in enumerate(expected) if float((y - e).abs().max()) < 1e-12]
        grad = torch.autograd.grad(y.square().sum(), adapter.up_weight)[0]
        assert torch.equal(grad != 0, adapter.expert[:, :-1] == i)
        seen.add(i)
    assert seen == {0, 1, 2, 3}
    assert_equal(torch.stack(expected).mean(0), adapter.eval()(x, z))
    assert_equal(adapter(x, z), 0.1 * mosa(t, x))


def test_mosas_split_follows_the_seed_and_differs_between_blocks():
    def split(seed: int) -> list[Tensor]:
        return [a.expert for a in vp.attach(vit(), M.MoSA(seed=seed)).adapters.values()]

    one, again, other = split(1), split(1), split(7)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0], one[1]) and not torch.equal(one[0], other[0])


@pytest.mark.parametrize("pixels", [(), (4, 2)], ids=["classes", "masks"])
def test_mosas_consistency_is_the_symmetric_kl(pixels):
    a, b = torch.randn(2, 3, 5, *pixels, dtype=torch.float64)
    p, q = a.softmax(1), b.softmax(1)
    apart = ((p * (p / q).log()).sum(1) + (q * (q / p).log()).sum(1)) / 2
    assert_equal(consistency(a, b), apart.mean((1, 2)) if pixels else apart)
    assert not consistency(a, a).any()


# ---- Rein -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_rein(name):
    """f + s M_d(att[:, 1:] M_T(T[1:]) + f) on the patch tokens, att = softmax(f T^T / sqrt(D)), T = A B."""
    model = vit(name)
    tuner = shake(vp.attach(model, M.Rein(tokens=5, rank=2)))
    own = by_site(tuner)
    shared, t = own["", f"maps{D}"], own["blocks.1", ""]
    plain, found = [], []
    model.blocks[1].drop_path2.register_forward_hook(lambda m, i, z: plain.append(z))
    model.blocks[1].norm2.register_forward_hook(lambda m, i, u: plain.append(i[0]))
    model.norm.register_forward_pre_hook(lambda m, i: found.append(i[0]))
    model(image())
    y, front = plain[0] + plain[1], model.num_prefix_tokens
    f, tokens = y[:, front:], t["a"] @ t["b"]
    attention = (f @ tokens.T / math.sqrt(D)).softmax(-1)
    mixed = attention[..., 1:] @ (tokens[1:] @ shared["token_weight"].T + shared["token_bias"]) + f
    f = f + shared["scale"] * (mixed @ shared["delta_weight"].T + shared["delta_bias"])
    assert_equal(found[0].detach(), torch.cat([y[:, :front], f], 1).detach())
    assert sum(".scale" in k for k in model.state_dict()) == 1


MAPS = {  # a small model, a block of it, a feature of that block's stage
    "convnext": (lambda: timm.create_model("convnext_tiny", depths=(1, 1, 1, 2), dims=(8, 8, 8, 12), num_classes=3),
                 "stages.3.blocks.1", (2, 12, 3, 5)),
    "swin": (lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=8,
                                       depths=(1, 2), num_heads=(2, 2), num_classes=3),
             "layers.1.blocks.0", (2, 4, 4, 16)),
    "hiera": (lambda: timm.create_model("hiera_tiny_224", img_size=64, embed_dim=24, stages=(1, 1, 1, 1),
                                        num_classes=3), "blocks.1", (2, 256, 24)),
    "eva": (lambda: timm.create_model("eva02_tiny_patch14_224", img_size=32, patch_size=8, embed_dim=D, depth=2,
                                      num_heads=2, num_classes=3), "blocks.1", (2, 17, D)),
    "beit": (lambda: timm.create_model("beit_base_patch16_224", img_size=32, patch_size=8, embed_dim=D, depth=2,
                                       num_heads=2, num_classes=3), "blocks.1", (2, 17, D)),
    "sam": (lambda: timm.create_model("samvit_base_patch16", img_size=32, patch_size=8, embed_dim=16, depth=2,
                                      num_heads=2, neck_chans=8, window_size=2, global_attn_indexes=(1,),
                                      num_classes=3), "blocks.0", (2, 4, 4, 16)),
}  # fmt: skip


@pytest.mark.parametrize("name", MAPS)
def test_rein_behind_blocks_that_care_for_places(name):
    """The same formula on every place of what the block gives; M_T, M_d and s are one for each width."""
    make, path, shape = MAPS[name]
    model = make().double().eval()
    tuner = shake(vp.attach(model, M.Rein(tokens=5, rank=2)))
    own, block = by_site(tuner), model.get_submodule(path)
    x = torch.randn(shape, dtype=torch.float64)
    with tuner.disabled():
        y = block(x)
    front, axis = int(name in ("eva", "beit")), 1 if name == "convnext" else -1
    f, t = y.movedim(axis, -1)[:, front:], own[path, ""]
    shared, tokens = own["", f"maps{f.shape[-1]}"], t["a"] @ t["b"]
    attention = (f @ tokens.T / math.sqrt(f.shape[-1])).softmax(-1)
    mixed = attention[..., 1:] @ (tokens[1:] @ shared["token_weight"].T + shared["token_bias"]) + f
    f = f + shared["scale"] * (mixed @ shared["delta_weight"].T + shared["delta_bias"])
    expected = torch.cat([y.movedim(axis, -1)[:, :front], f], 1).movedim(-1, axis)
    assert_equal(block(x).detach(), expected.detach())
    widths = {s.shape[0] for s in tuner.adapters if s.kind == "stage"}
    assert {part for at, part in own if not at} == {f"maps{width}" for width in widths}


# ---- NOAH -----------------------------------------------------------------------------------------------------------


def test_noah_is_the_three_methods_block_by_block():
    """Widths (2, 0), (0, 3) and 4: the same as LoRA, Pfeiffer and VPT at those blocks, with the same tensors."""
    x = image()
    torch.manual_seed(0)
    model = vit()
    tuner = shake(vp.attach(model, M.NOAH(lora=(2, 0), adapter=(0, 3), prompts=4)))
    assert [str(s) for s in tuner.adapters] == ["blocks.0", "blocks.0.attn.qkv", "blocks.1:mlp", "blocks.1"]
    y = model(x)
    values = {str(site): dict(a.state_dict()) for site, a in tuner.adapters.items()}
    tuner.detach()
    parts = {"v": M.VPT(tokens=4), "l": vp.LoRA(rank=2, targets="blocks.0.attn.qkv"),
             "p": M.Pfeiffer(hidden=3, targets=lambda s: s.part == "mlp" and s.path == "blocks.1")}  # fmt: skip
    for name, method in parts.items():
        for site, adapter in vp.attach(model, method, name=name).adapters.items():
            adapter.load_state_dict(values.pop(str(site)))
    assert not values
    assert_equal(model(x), y)


def test_noah_comes_back_from_a_file(tmp_path):
    x, model = image(), vit()
    tuner = shake(vp.attach(model, M.NOAH(lora=(2, 0), adapter=(0, 3), prompts=(4, 1)), train="head"))
    tuner.save(tmp_path / "noah.safetensors")
    y = model(x).detach()
    tuner.detach()
    loaded = vp.load(model, tmp_path / "noah.safetensors")
    assert loaded.method.lora == (2, 0) and torch.equal(model(x).detach().float(), y.float())


def test_noah_wants_a_width_for_each_block():
    with pytest.raises(vp.errors.MethodError, match="3 widths.*2 blocks"):
        vp.attach(vit(), M.NOAH(lora=(1, 2, 3)))
    with pytest.raises(vp.errors.SiteError, match="no width"):
        vp.attach(vit(), M.NOAH(lora=0, adapter=0, prompts=0))
    with pytest.raises(vp.errors.MethodError, match="adapter="):
        M.NOAH(adapter=(1, -1))
