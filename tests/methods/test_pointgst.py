"""PointGST against its formulas in float64, with the spectrum from numpy; what a cloud's output depends on."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_points import TINY, points
from torch.utils.checkpoint import checkpoint

import visionpeft as vp
from visionpeft.errors import SiteError
from visionpeft.methods.pointgst import keep_spectra
from visionpeft.models import point_spectrum
from visionpeft.models.point_ops import PointError
from visionpeft.models.point_transformer import create


def adapted(dtype=torch.float64, shake: bool = True, name: str = "point_mae", **fields):
    torch.manual_seed(0)
    model = create(name, num_classes=5, **TINY).to(dtype).eval()
    tuner = vp.attach(model, vp.PointGST(rank=3, local=4, **fields), train="head")
    if shake:
        with torch.no_grad():
            for p in tuner.parameters():
                p.add_(torch.randn_like(p), alpha=0.3)
    return model.eval(), tuner


def by_hand(a, x, s, legacy: bool):
    """The branch, one cloud after the other."""
    out = []
    for b in range(len(x)):
        h = F.linear(x[b], a.down_weight, a.down_bias)
        patches, extra = h[-8:], torch.zeros_like(h)
        for basis, name, rows in [(s.whole[b], "whole", range(8)), *(
            (s.parts[b, i], "part", s.order[b, 4 * i : 4 * i + 4].tolist()) for i in range(2)
        )]:  # fmt: skip
            u = basis.mT if legacy else basis
            z = u.mT @ patches[list(rows)]
            weight, bias = getattr(a, f"{name}_norm_weight"), getattr(a, f"{name}_norm_bias")
            n = (z - z.mean(-1, keepdim=True)) / (z.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            t = (n * weight + bias) @ a.turn_weight.T + a.turn_bias
            back = u @ (z + t * torch.sigmoid(t))
            for row, value in zip(rows, back, strict=True):
                extra[len(h) - 8 + row] += value
        out.append((h * torch.sigmoid(h) + extra) @ a.up_weight.T + a.up_bias)
    return torch.stack(out)


@pytest.mark.parametrize("legacy", [False, True])
def test_the_branch_by_its_formula(legacy):
    model, tuner = adapted(legacy=legacy)
    centres = model.group_divider(points())[1]
    s = point_spectrum.spectrum(centres, 4, legacy)
    x = torch.randn(3, 11, 12, dtype=torch.float64)  # class token and two prompts before the patches
    for adapter in tuner.adapters.values():
        torch.testing.assert_close(adapter.branch(x, s), by_hand(adapter, x, s, legacy), rtol=1e-10, atol=1e-10)


def test_it_is_added_beside_the_mlp_from_the_stream_before_its_norm():
    model, tuner = adapted()
    block = model.blocks.blocks[0]
    centres = model.group_divider(points())[1]
    x = torch.randn(3, 9, 12, dtype=torch.float64)
    y = block(x, None, centres)
    with tuner.disabled():
        base = block(x, None, centres)
        middle = x + block.attn(block.norm1(x))
    adapter = next(iter(tuner.adapters.values()))
    expected = base + by_hand(adapter, middle, point_spectrum.spectrum(centres, 4), False)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("name", ["point_mae", "pointgpt_s"])
def test_nothing_changes_at_the_start(name):
    model, tuner = adapted(torch.float32, shake=False, name=name)
    assert next(tuner.parameters()).requires_grad
    y = model(points(dtype=torch.float32))
    with tuner.disabled():
        assert torch.equal(y, model(points(dtype=torch.float32)))
    for adapter in tuner.adapters.values():
        s = point_spectrum.spectrum(torch.randn(2, 8, 3), 4)
        assert torch.equal(adapter.branch(torch.randn(2, 9, 12), s), torch.zeros(2, 9, 12))


def test_a_cloud_does_not_see_the_others_unless_legacy_wants_it():
    model, _ = adapted()
    x = points() * torch.tensor([1, 0.01, 5], dtype=torch.float64)[:, None, None]
    together = model(x)
    alone = torch.cat([model(x[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)
    legacy, _ = adapted(legacy=True)
    assert not torch.allclose(legacy(x), torch.cat([legacy(x[i : i + 1]) for i in range(3)]), atol=1e-4)


def test_clouds_of_fewer_points_than_centres_and_of_one_place_are_safe():
    """Centres repeat: outputs and gradients are finite, and are those that a cloud has by itself."""
    model, tuner = adapted()
    x = torch.stack([points(1)[0, :5], torch.zeros(5, 3, dtype=torch.float64)])
    y = model(x)
    torch.testing.assert_close(y, torch.cat([model(x[:1]), model(x[1:])]), rtol=1e-10, atol=1e-12)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tuner.parameters())


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.floats(-3, 3))
def test_what_a_branch_adds_depends_on_its_cloud_alone(seed, size):
    """Not on the other clouds of the batch, whatever their size, nor on the order of the tokens."""
    adapter = next(iter(adapted()[1].adapters.values()))
    generator = torch.Generator().manual_seed(seed)
    centres, x = (torch.randn(3, n, d, generator=generator, dtype=torch.float64) for n, d in ((8, 3), (9, 12)))
    centres[1] *= 10**size

    def branch(x, centres):
        return adapter.branch(x, point_spectrum.spectrum(centres, 4))

    together = branch(x, centres)
    alone = torch.cat([branch(x[i : i + 1], centres[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-8, atol=1e-9)
    order = torch.randperm(8, generator=generator)
    tokens = torch.cat([torch.zeros(1, dtype=torch.long), 1 + order])
    torch.testing.assert_close(branch(x[:, tokens], centres[:, order]), together[:, tokens], rtol=1e-5, atol=1e-6)


def test_tokens_in_another_order_give_the_same_but_for_legacy():
    order = torch.tensor([3, 0, 7, 6, 1, 5, 2, 4])
    for legacy, holds in ((False, True), (True, False)):
        model, _ = adapted(legacy=legacy)
        block = model.blocks.blocks[0]
        centres = model.group_divider(points())[1]
        x = torch.randn(3, 9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        shuffled = torch.cat([x[:, :1], x[:, 1:][:, order]], 1)
        y, z = block(x, None, centres), block(shuffled, None, centres[:, order])
        same = torch.allclose(z, torch.cat([y[:, :1], y[:, 1:][:, order]], 1), atol=1e-6)
        assert same == holds


def test_the_spectrum_is_computed_once_a_forward(monkeypatch):
    calls = []
    real = point_spectrum.spectrum
    monkeypatch.setattr(point_spectrum, "spectrum", lambda *a: calls.append(1) or real(*a))
    model, tuner = adapted()
    calls.clear()
    model(points())
    model(points())
    assert len(calls) == 2 and len(tuner.adapters) == 2


def test_a_checkpointed_block_finds_its_own_spectrum_again():
    """Two forwards before the first backward: each block must be recomputed with the centres of its own."""
    model, tuner = adapted()
    x = points(2)

    def gradients(run):
        model.zero_grad(set_to_none=True)
        first, second = run(x[:1]), run(x[1:])
        first.backward()
        second.backward()
        return [p.grad.clone() for a in tuner.adapters.values() for p in a.parameters()]

    def plain(x):
        return model(x).square().sum()

    expected = gradients(plain)
    for block in model.blocks.blocks:
        real = block.forward
        block.__dict__["forward"] = lambda *a, real=real: checkpoint(real, *a, use_reentrant=False)
    for a, b in zip(expected, gradients(plain), strict=True):
        assert torch.equal(a, b)


def test_class_token_and_position_learn_and_go_with_the_adapter(tmp_path):
    model, tuner = adapted(torch.float32)
    assert {("", "cls_token"), ("", "cls_pos")} <= set(tuner.in_place)
    y = model(points(dtype=torch.float32))
    tuner.save(tmp_path / "a.safetensors")
    torch.manual_seed(0)
    other = create("point_mae", num_classes=5, **TINY).eval()
    base = other(points(dtype=torch.float32))
    loaded = vp.load(other, tmp_path / "a.safetensors")
    assert torch.equal(other.eval()(points(dtype=torch.float32)), y)
    loaded.detach()
    assert torch.equal(other(points(dtype=torch.float32)), base)


@pytest.mark.parametrize("legacy", [False, True])
def test_statistics_of_the_frozen_encoder_drift_only_if_legacy(legacy):
    model, tuner = adapted(torch.float32, legacy=legacy)
    norm = model.encoder.first_conv[1]
    tuner.detach()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tuner = vp.attach(model, vp.PointGST(rank=3, local=4, legacy=legacy), train="head")
    model.train()
    model(points(dtype=torch.float32)).sum().backward()
    assert torch.equal(norm.running_mean, before["encoder.first_conv.1.running_mean"]) is not legacy
    assert not torch.equal(model.cls_head_finetune[1].running_mean, before["cls_head_finetune.1.running_mean"])
    tuner.detach()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_where_it_cannot_act_it_says_so():
    import timm

    vit = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, embed_dim=24, num_heads=2)
    with pytest.raises(SiteError, match="point transformer"):
        vp.attach(vit, "pointgst")
    model = create("point_mae", 5, **(TINY | {"groups": 6}))
    with pytest.raises(PointError, match="6 centres do not divide into groups of 4"):
        vp.attach(model, vp.PointGST(rank=3, local=4), train="head")
    assert vp.tuners(model) == {}


def test_kept_spectra_are_the_same_bits_and_each_cloud_is_decomposed_once(monkeypatch):
    counted = []
    real = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda x: counted.append(x.shape) or real(x))
    batches = [torch.tensor(index) for index in ([0, 1, 2], [2, 0], [1, 1], [3, 4, 0])]
    x = points(5, torch.float32)

    def outputs(keep: int):
        model, tuner = adapted(torch.float32)
        model.eval()
        if keep:
            keep_spectra(tuner, keep)
        counted.clear()
        return [model(x[index]).detach() for index in batches], model

    plain, _ = outputs(0)
    assert sum(n for n, g, _ in counted if g == 8) == 10  # one of all centres for each cloud of each batch
    kept, model = outputs(9)
    assert all(map(torch.equal, plain, kept))
    assert [n for n, g, _ in counted if g == 8] == [3, 2] and [n for n, g, _ in counted if g == 4] == [6, 4]
    counted.clear()
    y = model(x)
    assert not counted and torch.equal(y, adapted(torch.float32)[0](x))
    few, model = outputs(2)
    assert all(map(torch.equal, plain, few))
    assert [n for n, g, _ in counted if g == 8] == [3, 1, 1, 2]  # [1, 2] stay; [2, 0]; [0, 1]; 3 and 4 are new
    spectra = next(a.spectra for a in vp.tuners(model)["default"].adapters.values())
    assert len(spectra._kept) == 2 and copy.deepcopy(spectra).keep == 2 and not copy.deepcopy(spectra)._kept


def test_what_has_no_spectra_to_keep_says_so():
    with pytest.raises(SiteError, match="no spectra that could be kept"):
        keep_spectra(adapted(legacy=True)[1], 4)
    model = create("point_mae", num_classes=5, **TINY)
    with pytest.raises(SiteError, match="LoRA"):
        keep_spectra(vp.attach(model, "lora"), 4)
