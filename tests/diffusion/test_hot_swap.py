"""Adapters of a compiled UNet take turns, come from files and go, without a new graph."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")
import tiny_diffusers as tiny
from torch._dynamo.testing import CompileCounter

import visionpeft as vp


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def other(model: torch.nn.Module, method: vp.Method, name: str, seed: int) -> vp.Tuner:
    tuner = vp.attach(model, method, name=name, probe=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in tuner.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return tuner


@pytest.mark.parametrize("method", [vp.LoRA(rank=2), vp.KronA(a1=2, a2=2)], ids=lambda m: m.key)
def test_adapters_of_a_compiled_unet_take_turns_without_a_new_graph(method, tmp_path):
    torch.manual_seed(0)
    model = tiny.stir(tiny.unet()).eval().requires_grad_(False)
    args = tiny.inputs("unet")
    for seed, name in enumerate("ab"):
        other(model, method, name, seed).save(tmp_path / f"{name}.safetensors")
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    seen = []
    with torch.no_grad():
        for name in "abab":
            vp.activate(model, name)
            seen.append(tiny.run(compiled, args))
            torch.testing.assert_close(seen[-1], tiny.run(model, args), rtol=1e-4, atol=1e-5)
        assert counter.frame_count == 1
        assert torch.equal(seen[0], seen[2]) and not torch.allclose(seen[0], seen[1])
        vp.tuners(model)["a"].load_state_dict(vp.tuners(model)["b"].state_dict())  # other numbers in its place
        vp.activate(model, "a")
        torch.testing.assert_close(tiny.run(compiled, args), seen[1])
    assert counter.frame_count == 1
