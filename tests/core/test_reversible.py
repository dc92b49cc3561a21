"""Blocks that are undone in backward: states to the bit, gradients against float64, no memory in the depth."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from small import lora
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

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
    return model, lora(model, memory, **fields)


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
    states: list[torch.Tensor] = []
    do, undo = reversible.Stream.do, reversible.Stream.undo

    def doing(stream, y, call):
        states.append(stream.before.clone())
        return do(stream, y, call)

    def undoing(stream):
        found = undo(stream)
        assert torch.equal(stream.before, states.pop())
        return found

    monkeypatch.setattr(reversible.Stream, "do", doing)
    monkeypatch.setattr(reversible.Stream, "undo", undoing)
    model, tuner = attached(24)
    y = model(X)
    assert len(states) == 24
    gradients(tuner, y)
    assert not states


def test_nothing_outlives_its_step(monkeypatch):
    """Also where there was no backward, where the loss is kept, and where the model stopped half-way."""
    alive: list[weakref.ref] = []
    start = reversible.Stream.__init__
    monkeypatch.setattr(reversible.Stream, "__init__", lambda s, x: (alive.append(weakref.ref(s)), start(s, x))[1])
    model, tuner = attached()
    gradients(tuner, model(X))
    model(X)
    assert [ref() for ref in alive] == [None, None]
    loss = model(X).sum()
    loss.backward()
    assert alive[2]().now.numel() == 0 and not alive[2]().calls
    features = model.forward_intermediates(X, indices=[1], stop_early=True)
    assert alive[3]() is not None
    del features
    assert alive[3]() is None


def test_what_changes_between_forward_and_backward_is_an_error():
    model, tuner = attached()
    y = model(X)
    with torch.no_grad():
        next(tuner.parameters()).add_(1)
    with pytest.raises(VisionPEFTError, match="gave other numbers in backward"):
        gradients(tuner, y)
    other = vp.attach(model, vp.LoRA(rank=4), name="other", memory="reversible", probe=False)
    vp.activate(model, "default")
    y = model(X)
    vp.activate(model, "other")
    with pytest.raises(VisionPEFTError, match=r"other tensors learn now|gave other numbers"):
        gradients(tuner, y)
    other.detach()
    vp.activate(model, "default")
    y = torch.func.functional_call(model, {n: p.detach().clone().requires_grad_() for n, p in
                                           model.named_parameters()}, (X,))  # fmt: skip
    with pytest.raises(VisionPEFTError, match="other tensors learn now"):
        y.sum().backward()


def test_frozen_trunks_and_inference_mode():
    """Blocks without gradients before and behind those that take them."""
    model, tuner = attached()
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(X)))

    def run(grad: list[bool]) -> list[torch.Tensor]:
        h, seen = tokens, []
        for block, on in zip(model.blocks, grad, strict=True):
            with torch.set_grad_enabled(on):
                h = block(h)
            seen.append(h)
        return seen

    params = [p for n, p in model.named_parameters() if p.requires_grad and n.startswith("blocks.3")]
    whole = torch.autograd.grad(run([True] * 4)[3].square().sum(), params)
    late = torch.autograd.grad(run([False, False, False, True])[3].square().sum(), params)
    assert all(torch.equal(a, b) for a, b in zip(whole, late, strict=True))
    run([True, True, False, False])[1].square().sum().backward()
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(X), model(X.clone()))


def test_only_where_the_tuner_acts():
    import open_clip

    text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 2}
    image = {"image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8}
    model = open_clip.CLIP(16, image, text).eval()
    tokens, images = torch.randint(1, 31, (2, 8)), torch.randn(2, 3, 16, 16)
    before = model.encode_text(tokens), model.encode_image(images)
    vp.attach(model, vp.LoRA(rank=2, tower="image"), memory="reversible", probe=False)
    torch.testing.assert_close(model.encode_text(tokens), before[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model.encode_image(images), before[1], atol=1e-3)


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


def test_compiled_block_by_block():
    model, tuner = attached()
    y = model(X)
    expected = gradients(tuner, y)
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    found = model(X)
    torch.testing.assert_close(found, y, rtol=1e-5, atol=1e-5)
    assert close(gradients(tuner, found), expected, 1e-4)
    model.blocks[2].compile(backend="aot_eager")
    model.blocks[3]._compiled_call_impl = None
    with pytest.raises(VisionPEFTError, match="compiled some of them alone"):
        model(X)


def test_fsdp2_may_shard_the_whole_and_no_block(tmp_path):
    """Around every block it hands on another tensor. One process: what more of them do is not tested."""

    def learnt(model: nn.Module, tuner: vp.Tuner) -> list[torch.Tensor]:
        model(X).square().sum().backward()
        return [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in tuner.parameters()]

    expected = learnt(*attached())
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model, tuner = attached()
        fully_shard(model)
        assert all(torch.equal(a, b) for a, b in zip(learnt(model, tuner), expected, strict=True))
        model, tuner = attached()
        for block in model.blocks:
            fully_shard(block)
        with pytest.raises(VisionPEFTError, match="FSDP2 that shards each"):
            model(X)
    finally:
        torch.distributed.destroy_process_group()


def test_overflow_and_nan_are_seen():
    model, tuner = attached(12)
    x = X.clone()
    x[0, 0, 0, 0] = torch.nan
    y = model(x)
    assert y[0].isnan().all() and not y[1].isnan().any()
    with torch.no_grad():
        model.blocks[1].mlp.fc2.bias[0] = torch.inf
    assert model(X).isnan().any()


def test_refusals():
    model, tuner = attached()
    with pytest.raises(MergeError, match="no change of weights"):
        tuner.merge()
    with pytest.raises(VisionPEFTError, match="acts wholly or not at all"):
        tuner.scale = 0.5
    with pytest.raises(vp.errors.FormatError, match="which no other format"):
        vp.formats.peft.save(tuner, "nowhere")
    with pytest.raises(VisionPEFTError, match="use_reentrant=False"):
        checkpoint(model.blocks, torch.randn(2, 17, 48), use_reentrant=True)
    y = model(X).square().sum()
    y.backward(retain_graph=True)
    with pytest.raises(VisionPEFTError, match="second backward"):
        y.backward()
    handle = model.blocks[0].register_forward_hook(lambda m, i, y: y + 0)
    with pytest.raises(VisionPEFTError, match="something between its blocks"):
        model(X)
    handle.remove()
    model(X)
    with pytest.raises(SiteError, match="no two blocks stand side by side"):
        attached(1)
