"""Blocks that are undone in backward: states to the bit, gradients against float64, no memory in the depth."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import visionpeft as vp
from visionpeft import reversible
from visionpeft.errors import MergeError, SiteError, VisionPEFTError
from visionpeft.memory import live_bytes

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def attached(depth: int = 4, memory: str = "reversible", **fields) -> tuple[nn.Module, vp.Tuner]:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=depth, num_heads=4,
                              num_classes=5).train()  # fmt: skip
    tuner = vp.attach(model, vp.LoRA(rank=4, targets="linear", **fields), train="head", memory=memory, probe=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in tuner.parameters():
            p.normal_(0, 0.1, generator=generator)
    return model, tuner


def oracle(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The formula in plain torch on a model that was attached without it."""
    last = h = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    for block in model.blocks:
        last, h = h, block(h) + reversible.LAMBDA * last
    return model.forward_head(model.norm((h + last) / 2))


def gradients(tuner: vp.Tuner, y: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(y.square().sum(), list(tuner.parameters())))


def close(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(float((a - b).abs().max()) <= tolerance * float(b.abs().max()) for a, b in pairs)


def test_output_and_gradients_against_the_formula_in_double_precision():
    model, tuner = attached(12)
    plain, other = attached(12, "keep")
    plain.double()
    expected = oracle(plain, X.double())
    y = model(X)
    torch.testing.assert_close(y, expected.float(), rtol=1e-5, atol=1e-5)
    assert close(gradients(tuner, y), gradients(other, expected), 1e-4)


def test_every_state_comes_back_to_the_bit(monkeypatch):
    """At depth 24 floating point would be off by 64 ** 24."""
    streams = []
    start = reversible.Stream.__init__

    def noted(stream: reversible.Stream, x: torch.Tensor) -> None:
        start(stream, x)
        streams.append((stream, stream.now.clone()))

    monkeypatch.setattr(reversible.Stream, "__init__", noted)
    model, tuner = attached(24)
    gradients(tuner, model(X))
    ((stream, first),) = streams
    assert stream.at == 0 and not stream.lost and not stream.calls
    assert torch.equal(stream.now, first) and torch.equal(stream.before, first)


@pytest.mark.parametrize("autocast", [False, True])
def test_dropout_is_drawn_again(autocast):
    def found(memory: str) -> list[torch.Tensor]:
        model, tuner = attached(4, memory, dropout=0.5)
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(X) if memory == "reversible" else oracle(model, X)
        return gradients(tuner, y.float())

    assert close(found("reversible"), found("keep"), 0.1 if autocast else 1e-4)


def test_memory_does_not_grow_with_the_depth():
    def alive(depth: int, memory: str) -> int:
        model, _ = attached(depth, memory)
        model(X)
        return live_bytes(lambda: model(X))

    stream = 2 * 17 * 48 * 4
    shallow, deep = alive(10, "reversible"), alive(20, "reversible")
    assert deep - shallow <= 2 * stream + 10 * 6000  # bits of ten blocks, and their random states
    assert alive(20, "checkpoint") - alive(10, "checkpoint") >= 10 * stream


def test_a_loss_on_a_block_in_the_middle():
    def found(memory: str) -> list[torch.Tensor]:
        model, tuner = attached(4, memory)
        seen = []
        model.blocks[1].register_forward_hook(lambda m, i, y: seen.append(y))
        model(X)
        params = [p for n, p in model.named_parameters() if p.requires_grad and n.startswith(("blocks.0", "blocks.1"))]
        y = seen[0]
        if memory != "reversible":
            h = model.norm_pre(model._pos_embed(model.patch_embed(X)))
            first = model.blocks[0](h) + reversible.LAMBDA * h
            y = model.blocks[1](first) + reversible.LAMBDA * h
        return list(torch.autograd.grad(y.square().sum(), params))

    assert close(found("reversible"), found("keep"), 1e-4)


def test_evaluation_is_as_training_and_the_file_restores_it(tmp_path):
    model, tuner = attached()
    y = model(X).detach()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(X), y, rtol=1e-5, atol=1e-5)
    tuner.save(tmp_path / "a.safetensors")
    other = attached(memory="rebuild")[0]
    vp.tuners(other)["default"].detach()
    loaded = vp.load(other, tmp_path / "a.safetensors")
    assert loaded.memory == "reversible" and torch.equal(other.eval()(X), model(X))
    with loaded.disabled():
        assert not torch.equal(other(X), model(X))


def test_compiled_and_copied_it_computes_the_same():
    model, tuner = attached()
    y = model(X).detach()
    assert torch.equal(copy.deepcopy(model)(X), y)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), y, rtol=1e-4, atol=1e-4)


def test_an_overflow_is_seen():
    model, tuner = attached()
    with torch.no_grad():
        model.blocks[1].mlp.fc2.bias[0] = torch.inf
    assert model(X).isnan().any()


def test_refusals():
    model, tuner = attached()
    with pytest.raises(MergeError, match="no change of weights"):
        tuner.merge()
    with pytest.raises(VisionPEFTError, match="acts wholly or not at all"):
        tuner.scale = 0.5
    y = model(X).square().sum()
    y.backward(retain_graph=True)
    with pytest.raises(VisionPEFTError, match="second backward"):
        y.backward()
    handle = model.blocks[0].register_forward_hook(lambda m, i, y: y + 0)
    with pytest.raises(VisionPEFTError, match="something between its blocks"):
        model(X)
    handle.remove()
    model(X)
    with pytest.raises(SiteError, match="no two blocks"):
        attached(1)
