"""Roots of every shape: several components, a pipeline, a Sequential, a single Linear."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
from small import Net, image, vit
from torch import nn
from traces import assert_same, snapshot

import visionpeft as vp
from visionpeft.errors import SiteError


class Pipeline:
    """What a diffusers pipeline shows of itself."""

    def __init__(self) -> None:
        self.unet, self.text_encoder = vit(), Net()

    @property
    def components(self) -> dict[str, object]:
        return {"unet": self.unet, "text_encoder": self.text_encoder, "tokenizer": SimpleNamespace(), "vae": None}


@pytest.mark.parametrize("kind", ["dict", "pipeline"])
def test_paths_begin_with_the_component_and_the_tuner_spans_them(kind, tmp_path):
    pipeline = Pipeline()
    model = pipeline if kind == "pipeline" else {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    before = snapshot(pipeline.unet), snapshot(pipeline.text_encoder)
    tuner = vp.attach(model, vp.LoRA(rank=2, targets="query text_encoder.fc*"), train="unet.norm head")
    assert [str(s) for s in tuner.sites] == [
        "unet.blocks.0.attn.qkv:query", "unet.blocks.1.attn.qkv:query", "text_encoder.fc1", "text_encoder.fc2"
    ]  # fmt: skip
    assert {p for p, _ in tuner.trained} == {"unet.norm", "unet.head", "text_encoder.head"}
    assert vp.tuners(model) == {"default": tuner}
    for p in tuner.parameters():
        nn.init.normal_(p)
    x, y = image(), torch.randn(2, 8)
    outs = pipeline.unet(x).detach(), pipeline.text_encoder(y).detach()
    tuner.save(tmp_path / "both.safetensors")
    tuner.merge()
    torch.testing.assert_close(pipeline.unet(x), outs[0], rtol=1e-3, atol=1e-3)
    tuner.unmerge()
    vp.activate(model, {})
    with pytest.raises(AssertionError):
        torch.testing.assert_close(pipeline.unet(x), outs[0])
    tuner.detach()
    assert_same(before[0], pipeline.unet)
    assert_same(before[1], pipeline.text_encoder)
    again = vp.load(model, tmp_path / "both.safetensors")
    assert torch.equal(pipeline.unet(x), outs[0]) and torch.equal(pipeline.text_encoder(y), outs[1])
    again.detach()
    assert_same(before[0], pipeline.unet)


def test_a_dict_of_modules_cannot_be_probed_as_a_whole():
    tuner = vp.attach({"a": Net(), "b": Net()}, vp.LoRA(rank=1, targets="linear"), train="head")
    with pytest.raises(vp.VisionPEFTError, match="cannot be called"):
        tuner.probe(torch.randn(2, 8))


def test_failure_in_the_second_component_leaves_no_trace_in_the_first():
    parts = {"a": Net(), "b": Net()}
    parts["b"].fc2.forward = functools.partial(nn.Linear.forward, parts["b"].fc2)
    before = [snapshot(m) for m in parts.values()]
    with pytest.raises(SiteError, match="b.fc2.*forward"):
        vp.attach(parts, vp.LoRA(rank=1, targets="linear"), train="head")
    for b, m in zip(before, parts.values(), strict=True):
        assert_same(b, m)


@pytest.mark.parametrize("wrong", [None, "model", {}, {"a": 3}, [nn.Linear(2, 2)], SimpleNamespace(components={})])
def test_what_is_no_model_is_refused(wrong):
    with pytest.raises(SiteError, match="expected an nn.Module"):
        vp.attach(wrong, "lora")


ROOTS = {
    "sequential": lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)),
    "linear": lambda: nn.Linear(8, 3),
    "module": Net,
    "list": lambda: Listed(),
    "encoder layer": lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
}


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.by_name = nn.ModuleDict({"x.y".replace(".", "_"): nn.Linear(8, 8)})

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.by_name["x_y"](x)


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("method", [vp.LoRA(rank=2, targets="linear"), vp.SSF(targets="linear"), vp.methods.BitFit(),
                                    vp.methods.FullFineTuning()])  # fmt: skip
def test_roots_of_every_shape(root, method, tmp_path):
    torch.manual_seed(0)
    model, x = ROOTS[root](), torch.randn(2, 4, 8)
    before, plain = snapshot(model), model(x).detach()
    train = "head" if root == "module" else None
    tuner = vp.attach(model, method, train=train)
    tuner.probe(x)
    for p in tuner.parameters():
        nn.init.normal_(p)
    adapted = model(x).detach()
    assert not torch.allclose(adapted, plain, atol=1e-3)
    tuner.save(tmp_path / "a.safetensors")
    tuner.merge()
    torch.testing.assert_close(model(x), adapted, rtol=1e-4, atol=1e-4)
    tuner.detach()
    assert_same(before, model)
    assert torch.equal(model(x), plain)
    vp.load(model, tmp_path / "a.safetensors")
    torch.testing.assert_close(model(x), adapted, rtol=0, atol=0)


def test_iteration_over_a_sequential_root_is_not_disturbed():
    """It holds our holder as a child: the identity, at its end."""
    model, x = ROOTS["sequential"](), torch.randn(2, 8)
    tuner = vp.attach(model, vp.LoRA(rank=1, targets="linear"))
    for adapter in tuner.adapters.values():
        nn.init.normal_(adapter.b)
    y = x
    for layer in model:
        y = layer(y)
    assert torch.equal(y, model(x))


def test_a_module_shared_by_two_components_is_adapted_once():
    shared = nn.Linear(8, 8)
    parts = {"a": nn.Sequential(shared), "b": nn.Sequential(shared, nn.Linear(8, 2))}
    before = [snapshot(m) for m in parts.values()]
    tuner = vp.attach(parts, vp.LoRA(rank=1, targets="linear"))
    assert [s.path for s in tuner.sites] == ["a.0", "b.1"]
    x = torch.randn(2, 8)
    for adapter in tuner.adapters.values():
        nn.init.normal_(adapter.b)
    site = next(s for s in tuner.sites if s.path == "a.0")
    a = tuner.adapters[site]
    want = shared.weight + a.b @ a.a
    torch.testing.assert_close(parts["a"](x), nn.functional.linear(x, want, shared.bias))
    tuner.detach()
    for b, m in zip(before, parts.values(), strict=True):
        assert_same(b, m)
