"""A scale and shift inside the fused function: right gradients from every source, and the memory it is there for."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import visionpeft as vp
from visionpeft import lowrank
from visionpeft.adapter import Method
from visionpeft.memory import live_bytes

SOURCES = ("output", "input", "kept")


def pieces(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"x": (2, 3, 6), "w": (5, 6), "b": (5,), "gamma": (5,), "beta": (5,), "a": (2, 6), "up": (5, 2)}
    tensors = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    tensors["gamma"] = 1 + 0.1 * tensors["gamma"]
    return {name: t.requires_grad_(name not in ("w", "b")) for name, t in tensors.items()}


def fused(t: dict[str, Tensor], source: str, parts: bool, norm: bool = True) -> Tensor:
    x = F.layer_norm(t["x"], (6,)) if norm else t["x"]
    low = [lowrank.Part(0, 5, 0.5, t["a"], t["up"])] if parts else []
    return lowrank.linear(x, t["w"], t["b"], low, lowrank.Rescale(t["gamma"], t["beta"], source))


def formula(t: dict[str, Tensor], parts: bool, norm: bool = True) -> Tensor:
    x = F.layer_norm(t["x"], (6,)) if norm else t["x"]
    z = x @ t["w"].T + t["b"] + (0.5 * x @ t["a"].T @ t["up"].T if parts else 0)
    return t["gamma"] * z + t["beta"]


def gradients(t: dict[str, Tensor], y: Tensor, twice: bool = False) -> dict[str, Tensor]:
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    for again in range(1 + twice):
        for leaf in t.values():
            leaf.grad = None
        (y * weights).sum().backward(retain_graph=twice and not again)
    return {name: leaf.grad for name, leaf in t.items() if leaf.grad is not None}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("parts", [False, True], ids=["alone", "low rank"])
@pytest.mark.parametrize("norm", [False, True], ids=["raw", "norm"])
@pytest.mark.parametrize("twice", [False, True], ids=["once", "retained"])
def test_the_gradients_are_those_of_the_formula(source, parts, norm, twice):
    t = pieces()
    y = fused(t, source, parts, norm)
    assert torch.allclose(y, formula(t, parts, norm), rtol=0, atol=1e-13)
    found, expected = gradients(t, y, twice), gradients(t, formula(t, parts, norm))
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.allclose(found[name], expected[name], rtol=0, atol=1e-12), name


def test_the_output_is_given_up_in_backward():
    t = pieces()
    y = fused(t, "output", parts=False)
    node = y.grad_fn
    assert node.y is not None and node.y.data_ptr() == y.data_ptr()
    y.sum().backward()
    assert node.y is None


@pytest.mark.parametrize("source", SOURCES)
def test_a_write_to_the_output_does_not_spoil_them(source):
    t = pieces()
    y = fused(t, source, parts=True).add_(3).mul_(2)
    found, expected = gradients(t, y), gradients(t, (formula(t, True) + 3) * 2)
    for name in expected:
        assert torch.allclose(found[name], expected[name], rtol=0, atol=1e-12), name


def test_a_scale_too_small_to_invert_is_not_inverted():
    """In single precision y - beta holds nothing of z where gamma is 1e-9."""
    for least, past_versions in ((1e-9, False), (0.0, False), (0.0, True)):
        model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 5)).requires_grad_(False)
        tuner = vp.attach(model, vp.SSF(targets="1"), probe=False)
        adapter = tuner.adapters["1"] if "1" in tuner.adapters else next(iter(tuner.adapters.values()))
        adapter.source = "output"
        x = torch.randn(4, 6, requires_grad=True)
        model(x)  # has looked at gamma
        (adapter.gamma.data if past_versions else adapter.gamma.detach())[0] = least
        model(x).square().sum().backward()
        z = model[1].weight @ model[0](x).T + model[1].bias[:, None]
        g = adapter.gamma.detach().clone().requires_grad_()
        model[3](F.gelu(g * z.T + adapter.beta.detach())).square().sum().backward()
        assert torch.allclose(adapter.gamma.grad, g.grad, rtol=1e-5, atol=1e-6)


def test_rows_side_by_side_are_one_rescaling():
    """query and value of a fused qkv, each with its own gamma: the keys stay as they are."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=1, num_heads=2, num_classes=3)
    model.requires_grad_(False)
    x = torch.randn(2, 5, 24)
    qkv = model.blocks[0].attn.qkv
    bare = qkv(x)
    tuner = vp.attach(model, vp.SSF(targets="query value"))
    q, v = (a for a in tuner.adapters.values())
    y = qkv(x)
    assert torch.equal(y[..., 24:48], bare[..., 24:48])
    assert torch.allclose(y[..., :24], bare[..., :24] * q.gamma + q.beta, atol=1e-6)
    assert torch.allclose(y[..., 48:], bare[..., 48:] * v.gamma + v.beta, atol=1e-6)


def share(method: Method) -> float:
    """Bytes alive after the forward of two blocks of ViT-S, against the same model where only the classifier learns."""
    alive = []
    for how in ("linear", method):
        torch.manual_seed(0)
        model = timm.create_model("vit_small_patch16_224", depth=2, num_classes=5).train()
        vp.attach(model, how, train="head")
        x = torch.randn(2, 3, 224, 224, requires_grad=True)
        model(x)
        alive.append(live_bytes(lambda model=model, x=x: model(x)))
    return alive[1] / alive[0]


@pytest.mark.parametrize("recompute, most", [("attn_out mlp_out", 1.01), ("attn_out", 1.11), ("", 1.21)])
def test_bytes_that_ssf_keeps(recompute, most):
    """A z of a block's width is about a tenth of what a block keeps; naively it is twice the frozen model."""
    assert share(vp.SSF(targets="linear norm", recompute=recompute)) <= most


@pytest.mark.parametrize("recompute, most", [("attn_out mlp_out", 1.01), ("attn_out", 1.11), ("", 1.21)])
def test_bytes_that_difffit_keeps(recompute, most):
    assert share(vp.DiffFit(recompute=recompute)) <= most


READERS = {"convpass": 1.05, "repadapter": 1.02, "mosa": 1.02, "hydra": 1.20}


@pytest.mark.parametrize("name", READERS)
def test_bytes_of_methods_that_make_their_input_again(name):
    """What norm and GELU give, that is. Hydra reads the output of two Linears too, which nobody else keeps."""
    assert share(vp.METHODS[name]()) <= READERS[name]
