"""DiffFit: what it selects, where gamma acts (in float64, by hand), merging, and the counts of the paper."""

from __future__ import annotations

import math

import big_diffusers as big
import pytest
import tiny_diffusers as tiny
import torch
import torch.nn.functional as F

import visionpeft as vp
from visionpeft.errors import MethodError, SiteError, VisionPEFTError

pytest.importorskip("diffusers")


def shake(tuner: vp.Tuner, size: float = 0.3) -> vp.Tuner:
    with torch.no_grad():
        for p in tuner.parameters():
            p.add_(torch.randn_like(p), alpha=size)
    return tuner


def gammas(tuner: vp.Tuner) -> dict[str, torch.Tensor]:
    return {site.path: adapter.gamma.detach() for site, adapter in tuner.adapters.items()}


# ---- the formula ----------------------------------------------------------------------------------------------------


def linear(m, x):
    return x @ m.weight.T + m.bias


def dit_block(block, h, t, labels, gamma):
    """diffusers' block of a DiT by hand: adaptive norms, gated attention and MLP; `gamma(path)` scales a Linear."""
    emb = block.norm1.emb
    half = 128
    angles = t[:, None].float() * torch.exp(-math.log(10_000) * torch.arange(half).float() / (half - 1))  # in single
    e = linear(emb.timestep_embedder.linear_1, torch.cat([angles.cos(), angles.sin()], 1).double())
    e = linear(emb.timestep_embedder.linear_2, F.silu(e)) + emb.class_embedder.embedding_table.weight[labels]
    shift, scale, gate, shift2, scale2, gate2 = linear(block.norm1.linear, F.silu(e))[:, None].chunk(6, -1)
    u = F.layer_norm(h, h.shape[-1:], eps=block.norm1.norm.eps) * (1 + scale) + shift
    q, k, v = (linear(m, u) * gamma(m) for m in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v))
    q, k, v = (z.unflatten(-1, (2, -1)).transpose(1, 2) for z in (q, k, v))
    z = ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    h = h + gate * (linear(block.attn1.to_out[0], z) * gamma(block.attn1.to_out[0]))
    u = F.layer_norm(h, h.shape[-1:], eps=block.norm3.eps) * (1 + scale2) + shift2
    u = F.gelu(linear(block.ff.net[0].proj, u), approximate="tanh")
    return h + gate2 * (linear(block.ff.net[2], u) * gamma(block.ff.net[2]))


VECTORS = {"block": (0, 1, 1, 2), "thuml": (1, 2, 1, 1), "published": (1, 2, 2, 2)}  # q, k, v; out; MLP; blocks


@pytest.mark.parametrize("placement", VECTORS)
def test_gamma_acts_where_the_placement_says(placement):
    model = tiny.dit(activation_fn="gelu-approximate", attention_bias=True).double()
    tuner = shake(vp.attach(model, vp.DiffFit(placement=placement), probe=False))
    qkv, out, mlp, blocks = VECTORS[placement]
    own = {id(model.get_submodule(path)): g for path, g in gammas(tuner).items()}
    used = set()

    def gamma(module):
        if id(module) not in own:
            return 1.0
        used.add(id(module))
        return own[id(module)].prod(0)

    for i, block in enumerate(model.transformer_blocks):
        sizes = [len(own.get(id(m), ())) for m in (block.attn1.to_q, block.attn1.to_out[0], block.ff.net[2])]
        assert sizes == ([qkv, out, mlp] if i < blocks else [0, 0, 0])
        h, t, labels = torch.randn(2, 5, 16).double(), torch.tensor([3, 700]), torch.tensor([1, 7])
        expected = dit_block(block, h, t, labels, gamma)
        found = block(h, timestep=t, class_labels=labels)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    assert used == set(own)


@pytest.mark.parametrize("placement", VECTORS)
@pytest.mark.parametrize("name", ["unet", "dit", "sana", "sd3"])
def test_identity_at_the_start_merged_exactly_and_gone_without_a_trace(name, placement):
    model, x = tiny.MODELS[name]().double(), wide(tiny.inputs(name))
    before = {k: (p, p.detach().clone()) for k, p in model.named_parameters()}
    plain = tiny.see(model, x)
    tuner = vp.attach(model, vp.DiffFit(placement=placement), probe=False)
    torch.testing.assert_close(tiny.see(model, x), plain, rtol=1e-13, atol=1e-13)  # copies are aligned otherwise
    adapted = tiny.see(shake(tuner, 0.1).model, x)
    assert (adapted - plain).abs().max() > 1e-2
    learnt = {k: v.clone() for k, v in tuner.state_dict().items()}
    tuner.merge()
    torch.testing.assert_close(tiny.see(model, x), adapted, rtol=1e-9, atol=1e-9)
    assert all(
        torch.equal(v, learnt[k]) for k, v in tuner.state_dict().items()
    )  # saving a merged one saves what learnt
    assert not any("peft" in k for k in model.state_dict())
    tuner.unmerge()
    assert torch.equal(tiny.see(model, x), adapted)
    tuner.detach()
    assert all(p is before[k][0] and torch.equal(p, before[k][1]) for k, p in model.named_parameters())


def wide(args):
    return tuple(a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)


def test_merged_at_half_strength_is_what_acted():
    model, x = tiny.unet().double(), wide(tiny.inputs("unet"))
    tuner = shake(vp.attach(model, "difffit", probe=False))
    with pytest.warns(UserWarning, match="stands blended"):
        tuner.scale = 0.5
    with torch.no_grad():
        adapted = tiny.see(model, x)
        tuner.merge()
        merged = tiny.see(model, x)
        tuner.unmerge()
        torch.testing.assert_close(tiny.see(model, x), adapted, rtol=0, atol=0)
    # (W x + b) g blended in its output, against the weight and the bias blended one after the other: both exact
    torch.testing.assert_close(merged, adapted, rtol=1e-9, atol=1e-9)


def test_another_copy_of_a_merged_tensor_cannot_come_in():
    model = tiny.unet()
    first, second = vp.attach(model, "bitfit", name="b", probe=False), vp.attach(model, "difffit", probe=False)
    vp.activate(model, "default")
    second.merge()
    with pytest.raises(VisionPEFTError, match="'default' is merged into .*bias, of which 'b' brings a copy"):
        vp.activate(model, {"default": 1.0, "b": 1.0})
    second.unmerge()
    first.detach()


# ---- what learns ----------------------------------------------------------------------------------------------------


def test_names_with_norm_in_them_do_not_learn():
    tuner = vp.attach(tiny.dit(), "difffit", probe=False)
    learnt = {f"{path}.{name}" for path, name in tuner.in_place}
    assert "transformer_blocks.0.norm1.linear.weight" not in learnt
    assert "transformer_blocks.0.norm1.linear.bias" in learnt
    assert {k.split(".", 2)[2] for k in learnt if "embedding_table" in k} == {
        "norm1.emb.class_embedder.embedding_table.weight"
    }


def test_copies_of_the_class_table_learn_as_one_and_are_saved_once(tmp_path):
    model, x = tiny.dit(), tiny.inputs("dit")
    tuner = vp.attach(model, "difffit", probe=False)
    tables = [b.norm1.emb.class_embedder.embedding_table for b in model.transformer_blocks]
    assert tables[0].weight is tables[1].weight
    tiny.run(model, x).square().sum().backward()
    grad = tables[0].weight.grad.clone()
    tuner.detach()
    apart = vp.attach(model, vp.DiffFit(tied=False), probe=False)
    assert tables[0].weight is not tables[1].weight
    tiny.run(model, x).square().sum().backward()
    torch.testing.assert_close(grad, tables[0].weight.grad + tables[1].weight.grad)
    apart.detach()
    tuner = shake(vp.attach(model, "difffit", probe=False))
    y, size = tiny.see(model, x), tuner.num_parameters
    tuner.save(tmp_path / "a.safetensors")
    tuner.detach()
    import safetensors

    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert sum("embedding_table" in key for key in file.keys()) == 1  # noqa: SIM118
    again = vp.load(model, tmp_path / "a.safetensors")
    assert torch.equal(tiny.see(model, x), y) and tables[0].weight is tables[1].weight
    assert again.num_parameters == size


def test_copies_that_differ_cannot_learn_as_one():
    model = tiny.dit()
    with torch.no_grad():
        model.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight.add_(1)
    with pytest.raises(SiteError, match=r"transformer_blocks\.1\.norm1\.emb\.class_embedder.*tied=False"):
        vp.attach(model, "difffit", probe=False)
    vp.attach(model, vp.DiffFit(tied=False), probe=False).detach()


def test_wrong_placements_are_named():
    with pytest.raises(MethodError, match="block, thuml, published"):
        vp.DiffFit(placement="all")
    with pytest.raises(SiteError, match="has no half"):
        vp.attach(tiny.vae(), vp.DiffFit(placement="thuml"), probe=False)


# ---- counts ---------------------------------------------------------------------------------------------------------


def count(model, **fields) -> int:
    tuner = vp.attach(model, vp.DiffFit(**fields), probe=False)
    found = tuner.num_parameters
    tuner.detach()
    return found


@pytest.mark.parametrize("name,expected", [("sd15", 481_284), ("sdxl", 1_832_964)])
def test_counts_on_unets(name, expected):
    assert count(big.meta(name)) == expected


DIT = {  # placement -> classes -> scalars
    "block": {10: 566_816, 101: 671_648, 200: 785_696, 1000: 1_707_296},
    "thuml": {10: 599_072, 101: 703_904, 200: 817_952, 1000: 1_739_552},
    "published": {10: 728_096, 101: 832_928, 200: 946_976, 1000: 1_868_576},
}


@pytest.mark.parametrize("classes", [10, 101, 200, 1000])
def test_counts_on_dit_xl_2(classes):
    model = big.meta("dit", classes)
    assert {p: count(model, placement=p) for p in DIT} == {p: DIT[p][classes] for p in DIT}


def test_the_meta_models_are_the_published_ones():
    sizes = {"sd15": 859_520_964, "sd21": 865_910_724, "sdxl": 2_567_463_684, "dit": 749_826_464}
    assert {n: sum(p.numel() for p in big.meta(n).parameters()) for n in sizes} == sizes
