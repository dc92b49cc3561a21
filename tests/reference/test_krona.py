"""KronA against W + kron(A, B) built in full, in float64; counts of the paper and of official shapes on meta."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import visionpeft as vp
from visionpeft.errors import MethodError, SiteError
from visionpeft.methods import krona

# (a1, a2) of a 12 x 8 Linear: both orders of contraction, and the ends
SHAPES = [(1, 1), (1, 8), (12, 1), (12, 8), (2, 4), (4, 2), (3, 8), (6, 2), (4, 4)]


def adapted(a1: int, a2: int, bias: bool = True) -> tuple[nn.Linear, vp.Tuner, krona.KronAdapter]:
    torch.manual_seed(0)
    layer = nn.Linear(8, 12, bias=bias).double()
    tuner = vp.attach(layer, vp.KronA(a1=a1, a2=a2, targets="linear"), probe=False)
    adapter = next(iter(tuner.adapters.values()))
    nn.init.normal_(adapter.b)
    return layer, tuner, adapter


def full_kron(a, b):
    """The definition, entry by entry."""
    (a1, a2), (b1, b2) = a.shape, b.shape
    rows = [torch.cat([a[i, j] * b for j in range(a2)], 1) for i in range(a1)]
    return torch.cat(rows) if b1 and b2 else None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("before", ["input", "norm"])
@pytest.mark.parametrize("fused", [True, False])
def test_output_and_every_gradient(shape, before, fused):
    layer, tuner, adapter = adapted(*shape)
    tuner.fused = fused
    assert adapter.a.shape == shape and adapter.b.shape == (12 // shape[0], 8 // shape[1])
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    h = x if before == "input" else nn.functional.layer_norm(x, (8,))
    w = layer.weight + full_kron(adapter.a, adapter.b)
    leaves = [x, adapter.a, adapter.b]
    out, expected = layer(h), h @ w.T + layer.bias
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    found, wanted = (torch.autograd.grad(y.cos().sum(), leaves, retain_graph=True) for y in (out, expected))
    for g, e in zip(found, wanted, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-11, atol=1e-11)


def test_both_orders_are_taken_and_the_cheaper_one_wins():
    def operations(a, b, left: bool) -> int:
        (a1, a2), (b1, b2) = a.shape, b.shape
        return a1 * a2 * b2 + a1 * b2 * b1 if left else a2 * b2 * b1 + a1 * a2 * b1

    taken = set()
    for a1, a2 in [*SHAPES, (64, 4), (4, 64)]:
        a, b = torch.empty(a1, a2), torch.empty(1280 // a1, 1280 // a2)
        left = krona._left_first(a, b)
        taken.add(left)
        assert operations(a, b, left) <= operations(a, b, not left)
    assert taken == {True, False}


def test_the_product_is_never_built(monkeypatch):
    layer, _, adapter = adapted(4, 2)
    monkeypatch.setattr(torch, "kron", lambda *args: pytest.fail("built"))
    layer(torch.randn(2, 8, dtype=torch.float64, requires_grad=True)).sum().backward()
    assert adapter.a.grad is not None and adapter.b.grad is not None


def test_merged_is_the_formula_and_unmerging_gives_the_same_bits():
    layer, tuner, adapter = adapted(4, 2)
    before = layer.weight
    expected = before + full_kron(adapter.a, adapter.b)
    tuner.merge()
    torch.testing.assert_close(layer.weight, expected.detach(), rtol=1e-14, atol=1e-14)
    tuner.unmerge()
    assert layer.weight is before


def test_double_backward_in_plain_torch_and_a_named_error_when_fused():
    layer, tuner, adapter = adapted(4, 2)
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)

    def curvature():
        (g,) = torch.autograd.grad(layer(x).cos().sum(), adapter.b, create_graph=True)
        return torch.autograd.grad(g.square().sum(), adapter.a)[0]

    with pytest.raises(vp.VisionPEFTError, match="tuner.fused = False"):
        curvature()
    tuner.fused = False
    assert curvature().abs().max() > 0


def test_the_start():
    torch.manual_seed(0)
    tuner = vp.attach(nn.Linear(1280, 1280), vp.KronA(a1=64, a2=16, targets="linear"), probe=False)
    adapter = next(iter(tuner.adapters.values()))
    assert not adapter.b.any() and abs(float(adapter.a.detach().std()) * 64 - 1) < 0.05
    tuner = vp.attach(nn.Linear(1280, 1280), vp.KronA(a1=64, a2=16, init="kaiming", targets="linear"), probe=False)
    a = next(iter(tuner.adapters.values())).a
    assert 0.99 * 16**-0.5 < float(a.detach().abs().max()) <= 16**-0.5


def test_the_official_order_of_rows():
    """Official: A (X B^T) with x as (a2, b2), its result read column by column."""
    a, b, x = torch.randn(3, 2).double(), torch.randn(4, 5).double(), torch.randn(7, 10).double()
    official = torch.stack([(a @ row.view(2, 5) @ b.T).T.flatten() for row in x])
    torch.testing.assert_close(x @ krona.from_official(a, b).T, official)


def test_sides_that_are_not_divided_are_named():
    with pytest.raises(SiteError, match=r"a1=5 must divide its 12 rows and a2=64 its 8 columns: a1=1, a2=8 would do"):
        vp.attach(nn.Linear(8, 12), vp.KronA(a1=5, a2=64, targets="linear"))
    for wrong in ({"a1": 0}, {"a2": -1}, {"init": "zeros"}):
        with pytest.raises(MethodError):
            vp.KronA(**wrong)


# ---- counts ---------------------------------------------------------------------------------------------------------

COUNTS = {  # (a1, a2) -> SD1.5, SD2.1, SDXL; 128 does not divide SD's 320
    (2, 2): (23_378_432, 24_975_872, 238_799_040),
    (4, 2): (11_689_984, 12_488_704, 119_402_880),
    (4, 4): (5_846_528, 6_245_888, 59_708_160),
    (8, 4): (2_926_336, 3_126_016, 29_867_520),
    (8, 8): (1_469_312, 1_569_152, 14_960_640),
    (16, 8): (746_944, 796_864, 7_534_080),
    (16, 16): (398_048, 423_008, 3_874_560),
    (4, 64): (398_048, 423_008, 3_874_560),
    (64, 4): (398_048, 423_008, 3_874_560),
    (32, 8): (398_048, 423_008, 3_874_560),
    (64, 8): (248_176, 260_656, 2_152_320),
    (32, 32): (222_392, 228_632, 1_506_240),
    (64, 16): (222_392, 228_632, 1_506_240),
    (64, 32): (307_804, 310_924, 1_613_280),
    (64, 64): (547_118, 548_678, 2_526_960),
    (64, 128): (None, None, 4_704_120),
    (128, 128): (None, None, 9_233_340),
}


@functools.cache
def sites(name: str) -> list[tuple[int, ...]]:
    """Shapes of the default sites of a meta UNet: the model is walked through once."""
    big = pytest.importorskip("big_diffusers")
    return [s.shape for s in vp.KronA(a1=1, a2=1).choose(vp.sites.Backbone(big.meta(name)))]


@pytest.mark.parametrize("shape", COUNTS, ids=str)
def test_counts_of_the_formula_on_the_default_sites(shape):
    a1, a2 = shape
    for name, expected in zip(("sd15", "sd21", "sdxl"), COUNTS[shape], strict=True):
        if expected is None:
            assert any(out % a1 or width % a2 for out, width in sites(name))
        else:
            assert sum(a1 * a2 + (out // a1) * (width // a2) for out, width in sites(name)) == expected


@pytest.mark.parametrize("name,shape,expected", [("sd15", (4, 64), 398_048), ("sdxl", (16, 16), 3_874_560),
                                                  ("sd21", (64, 8), 260_656)])  # fmt: skip
def test_counts_of_attached_adapters(name, shape, expected):
    big = pytest.importorskip("big_diffusers")
    tuner = vp.attach(big.meta(name), vp.KronA(a1=shape[0], a2=shape[1]), probe=False)
    assert tuner.num_parameters == expected
    tuner.detach()
