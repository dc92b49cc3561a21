"""The choices of `attach(memory=...)`: what each keeps, that gradients stay, and that it goes with the tuner."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
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
    tuner = vp.attach(model, vp.LoRA(rank=4, targets="linear", **fields), train="head", memory=memory, probe=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in tuner.parameters():
            p.normal_(0, 0.1, generator=generator)
    return model, tuner


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
