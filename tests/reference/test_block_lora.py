"""Block-LoRA: its formula, its counts on CLIP, and that it is LoRA of a smaller rank whose B learns n times as fast."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import visionpeft as vp
from visionpeft.methods import BlockLoRA


def net(method, seed: int = 0) -> tuple[nn.Module, vp.Tuner]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5)).double()
    return model, vp.attach(model, method, probe=False)


def test_the_delta_is_the_sum_of_the_blocks_times_the_shared_matrix():
    model, tuner = net(BlockLoRA(rank=4, blocks=2, alpha=3, targets="linear"))
    x = torch.randn(7, 6, dtype=torch.float64)
    hidden, found = x, []
    for adapter in tuner.adapters.values():
        nn.init.normal_(adapter.b)
    for layer, adapter in zip((model[0], model[2]), tuner.adapters.values(), strict=True):
        delta = 3 / 4 * sum(b @ adapter.a for b in adapter.b)
        hidden = hidden @ (layer.weight + delta).t() + layer.bias
        found.append(delta)
        hidden = nn.functional.gelu(hidden) if layer is model[0] else hidden
    torch.testing.assert_close(model(x), hidden, rtol=0, atol=1e-12)
    assert all(int(torch.linalg.matrix_rank(delta)) == 2 for delta in found)


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_the_blocks_stay_equal_and_it_learns_as_lora_of_the_smaller_rank_does(optimiser):
    """Under SGD the sum moves n times as far for one gradient; under Adam, whose step ignores its size, so too."""
    n, rank, lr = 4, 8, 1e-2
    model, tuner = net(BlockLoRA(rank=rank, blocks=n, alpha=rank, targets="linear"))
    other, plain = net(vp.LoRA(rank=rank // n, targets="linear"))
    for mine, theirs in zip(tuner.adapters.values(), plain.adapters.values(), strict=True):
        theirs.a.data.copy_(mine.a.data)
    fast = [{"params": [a.a for a in plain.adapters.values()], "lr": lr},
            {"params": [a.b for a in plain.adapters.values()], "lr": lr * n}]  # fmt: skip
    kind = torch.optim.SGD if optimiser == "sgd" else torch.optim.AdamW
    pair = kind(tuner.parameters(), lr=lr, weight_decay=0.0), kind(fast, lr=lr, weight_decay=0.0)
    for step in range(20):
        x = torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        for net_, opt in zip((model, other), pair, strict=True):
            opt.zero_grad()
            net_(x).sin().sum().backward()
            opt.step()
    for mine, theirs in zip(tuner.adapters.values(), plain.adapters.values(), strict=True):
        assert mine.b.abs().max() > 1e-2
        assert all(torch.equal(block, mine.b[0]) for block in mine.b)
        torch.testing.assert_close(mine.b.sum(0), theirs.b, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(mine.a, theirs.a, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name, rank, blocks, count", [
    ("ViT-B-16", 2, 2, 138_240), ("ViT-B-16", 4, 4, 230_400), ("ViT-B-16", 8, 8, 414_720),
    ("ViT-B-16", 8, 4, 460_800), ("ViT-L-14", 2, 2, 304_128)])  # fmt: skip
def test_counts_on_query_key_and_value_of_both_towers(name, rank, blocks, count):
    open_clip = pytest.importorskip("open_clip")
    logging.disable(logging.WARNING)
    try:
        with torch.device("meta"):
            model = open_clip.create_model(name, pretrained=None, device="meta")
    finally:
        logging.disable(logging.NOTSET)
    method = BlockLoRA(rank=rank, blocks=blocks, alpha=1, rslora=True, targets="query key value")
    assert vp.attach(model, method).num_parameters == count


def test_blocks_must_divide_the_rank():
    with pytest.raises(vp.VisionPEFTError, match="blocks=3: expected a divisor of rank=8"):
        BlockLoRA(rank=8, blocks=3)
