"""LoRA in both towers of open_clip against Hugging Face peft: the MLPs, and `in_proj` of the attention.

peft adapts `in_proj_weight` whole, by one A and a B of three times the rows, and `out_proj` with it, whose delta it
adds twice: there its B stays zero.
"""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_clip import tiny
from torch import nn

import visionpeft as vp

peft = pytest.importorskip("peft")


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    text = torch.randint(1, 40, (2, 32))
    text[:, 5] = 49_407  # the end of text
    return torch.randn(2, 3, 16, 16, dtype=torch.float64), text


def features(model, image, text) -> torch.Tensor:
    return torch.cat([model.encode_image(image), model.encode_text(text)])


def pair(targets: list[str], roles: str, alpha: int):
    model = tiny({"layers": 2}, {"layers": 2}, dtype=torch.float64)
    ours = copy.deepcopy(model)
    config = peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=targets)
    theirs = peft.get_peft_model(model, config).double().base_model.model
    return theirs, ours, vp.attach(ours, vp.LoRA(rank=2, alpha=alpha, targets=roles))


def assert_same_outputs(theirs, ours) -> None:
    image, text = batch()
    expected, found = features(theirs, image, text), features(ours, image, text)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    expected.square().sum().backward()
    found.square().sum().backward()


def test_mlps():
    theirs, ours, tuner = pair(["c_fc", "c_proj"], "mlp_in mlp_out", 6)
    layers = [theirs.get_submodule(site.path) for site in tuner.sites]
    assert len(layers) == 8
    with torch.no_grad():
        for layer, adapter in zip(layers, tuner.adapters.values(), strict=True):
            layer.lora_B["default"].weight.normal_(std=0.3)
            adapter.a.copy_(layer.lora_A["default"].weight)
            adapter.b.copy_(layer.lora_B["default"].weight)
    assert_same_outputs(theirs, ours)
    for layer, adapter in zip(layers, tuner.adapters.values(), strict=True):
        for mine, other in ((adapter.a, layer.lora_A), (adapter.b, layer.lora_B)):
            torch.testing.assert_close(mine.grad, other["default"].weight.grad, rtol=0, atol=1e-11)


def test_in_proj():
    """One A for query, key and value: its gradient is the sum of theirs."""
    theirs, ours, tuner = pair(["attn"], "query key value", 6)
    blocks: dict[str, list[vp.adapter.Adapter]] = {}
    for site, adapter in tuner.adapters.items():
        blocks.setdefault(site.path, []).append(adapter)
    assert len(blocks) == 4 and all(len(three) == 3 for three in blocks.values())
    attention = {path: theirs.get_submodule(path) for path in blocks}
    with torch.no_grad():
        for path, three in blocks.items():
            a, b = (attention[path].__getattr__(n)["default"].weight for n in ("lora_A", "lora_B"))
            nn.init.normal_(b, std=0.3)
            for adapter, rows in zip(three, b.chunk(3), strict=True):
                adapter.a.copy_(a)
                adapter.b.copy_(rows)
    assert_same_outputs(theirs, ours)
    for path, three in blocks.items():
        layer = attention[path]
        grads = torch.cat([adapter.b.grad for adapter in three]), torch.stack([x.a.grad for x in three]).sum(0)
        torch.testing.assert_close(grads[0], layer.lora_B["default"].weight.grad, rtol=0, atol=1e-11)
        torch.testing.assert_close(grads[1], layer.lora_A["default"].weight.grad, rtol=0, atol=1e-11)
