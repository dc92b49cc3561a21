"""The choices of `attach(memory=...)`: what each keeps, that gradients stay, and that it goes with the tuner."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from small import lora
from torch import nn
from torch.utils.checkpoint import checkpoint

import visionpeft as vp
from visionpeft import binding
from visionpeft.errors import SiteError, VisionPEFTError
from visionpeft.memory import live_bytes

X = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def vit() -> nn.Module:
    import timm

    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=96, depth=4, num_heads=4,
                             num_classes=5)  # fmt: skip


def attached(memory: str, **fields) -> tuple[nn.Module, vp.Tuner]:
    model = vit().train()
    return model, lora(model, memory, **fields)


def gradients(model: nn.Module, tuner: vp.Tuner) -> list[torch.Tensor]:
    torch.manual_seed(2)
    return list(torch.autograd.grad(model(X).square().sum(), list(tuner.parameters())))


def alive(model: nn.Module) -> int:
    x = X.clone().requires_grad_()
    model(x)
    return live_bytes(lambda: model(x))


@pytest.mark.parametrize("memory", ["keep", "checkpoint"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_those_of_rebuilding_to_the_bit(memory, dropout):
    expected = gradients(*attached("rebuild", dropout=dropout))
    found = gradients(*attached(memory, dropout=dropout))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_each_choice_keeps():
    model = vit().train().requires_grad_(False)
    frozen = alive(model)
    kept = {memory: alive(attached(memory)[0]) for memory in ("rebuild", "keep", "checkpoint")}
    stream = X.shape[0] * 65 * 96 * 4
    assert kept["rebuild"] <= 1.05 * frozen
    assert kept["keep"] >= 1.4 * frozen
    assert kept["checkpoint"] <= (4 + 4) * stream  # the inputs of four blocks; patches, the head's norm and its input


def test_detached_the_blocks_are_as_before():
    model = vit()
    classes = [type(m) for m in model.modules()]
    tuner = vp.attach(model, "lora", train="head", memory="checkpoint")
    assert [type(m) for m in model.modules()] != classes
    tuner.detach()
    assert [type(m) for m in model.modules()] == classes


def test_a_resting_tuner_checkpoints_nothing():
    model, tuner = attached("checkpoint")
    plain = alive(vit().train().requires_grad_(False))
    with tuner.disabled():
        assert alive(model) == plain


def test_the_choice_survives_copies_and_pickling():
    model, tuner = attached("checkpoint")
    x = X.clone().requires_grad_()
    expected = alive(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        assert alive(other) == expected


def test_merged_runs_without_it():
    model, tuner = attached("checkpoint")
    tuner.merge()
    assert not any(isinstance(m, binding.Mixin) for m in model.modules())


def test_compiles_whole():
    model, tuner = attached("checkpoint")
    expected = model.eval()(X)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), expected)


def test_an_unknown_choice_and_a_model_without_blocks():
    with pytest.raises(VisionPEFTError, match="memory='less': there are rebuild"):
        vp.attach(vit(), "lora", memory="less")
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(SiteError, match="no blocks are known"):
        vp.attach(model, vp.LoRA(rank=2, targets="linear"), memory="checkpoint", probe=False)
    assert type(model[0]) is nn.Linear


def test_reentrant_checkpointing_is_refused():
    """Frozen, with an input that needs no gradient, its adapters would silently learn nothing."""
    model, tuner = attached("rebuild")
    block = model.blocks[0]
    tokens = torch.randn(2, 65, 96)
    with pytest.raises(VisionPEFTError, match="use_reentrant=False"):
        checkpoint(block, tokens, use_reentrant=True)
    with torch.no_grad():
        block(tokens)  # evaluation in train mode is nobody's mistake
    checkpoint(block, tokens, use_reentrant=False).sum().backward()
    with tuner.disabled():
        checkpoint(block, tokens, use_reentrant=True)  # nothing could learn


def test_switching_between_forward_and_backward_is_an_error_where_blocks_run_again():
    model, tuner = attached("checkpoint")
    y = model(X).sum()
    tuner.scale = 0.5
    with pytest.raises(VisionPEFTError, match="switched or scaled between"):
        y.backward()


def test_keeping_lasts_as_long_as_its_tuner_and_a_failure_leaves_no_trace():
    model, tuner = attached("keep")
    tuner.fused = False
    with pytest.raises(SiteError):
        vp.attach(model, vp.LoRA(targets="nothing"), name="b")
    assert not tuner.fused
    tuner.fused = True
    other = vp.attach(model, vp.LoRA(), name="b", probe=False)
    other.detach()
    routes = {held.route for _, _, held in binding.holders(model)}
    assert routes == {"keep"}
    tuner.detach()
    vp.attach(model, "lora", train="head")
    assert {held.route for _, _, held in binding.holders(model)} == {"rebuild"}


def test_one_adapter_per_sample_cannot_be_run_again():
    model, tuner = attached("checkpoint")
    vp.activate(model, ["default", None, "default", None])
    with pytest.raises(VisionPEFTError, match="which sample is whose"):
        model(X)
    with torch.no_grad():
        assert model(X).shape == (4, 5)


def test_replicas_of_data_parallel_act_through_their_own_adapters():
    model, tuner = attached("rebuild")
    held = binding.holder(model.blocks[0].attn.qkv)
    replica = held._replicate_for_data_parallel()
    replica._modules["default"] = copy.deepcopy(held._modules["default"])
    (found,) = replica.acting()
    (own,) = held.acting()
    assert found in list(replica._modules["default"].children()) and found is not own
