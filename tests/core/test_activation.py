"""Which adapters act, and how strongly."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import Net, image, vit
from torch import nn

import visionpeft as vp
from visionpeft import binding


def two() -> tuple[nn.Module, torch.Tensor, vp.Tuner, vp.Tuner]:
    torch.manual_seed(0)
    model = Net().double()
    tuners = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, targets in (("cat", "fc1 fc2"), ("ink", "fc2")):
            tuners.append(vp.attach(model, vp.LoRA(rank=2, targets=targets), name=name))
            for adapter in tuners[-1].adapters.values():
                nn.init.normal_(adapter.b)
    return model, torch.randn(3, 8, dtype=torch.float64), *tuners


def by_hand(model: Net, x: torch.Tensor, strengths: dict[str, float]) -> torch.Tensor:
    weights = {"fc1": model.fc1.weight, "fc2": model.fc2.weight}
    for name, strength in strengths.items():
        for site, adapter in vp.tuners(model)[name].adapters.items():
            weights[site.path] = weights[site.path] + strength * adapter.b @ adapter.a
    h = nn.functional.gelu(model.norm(x @ weights["fc1"].T + model.fc1.bias))
    return model.head(h @ weights["fc2"].T + model.fc2.bias)


strength = st.one_of(st.none(), st.floats(-2, 2))


@settings(max_examples=40, deadline=None)
@given(strength, strength, st.booleans())
def test_strengths_are_those_of_the_formula(cat, ink, reverse):
    model, x, *_ = two()
    wanted = {name: s for name, s in (("cat", cat), ("ink", ink)) if s is not None}
    if reverse:
        wanted = dict(reversed(wanted.items()))
    vp.activate(model, wanted)
    torch.testing.assert_close(model(x), by_hand(model, x, wanted), rtol=0, atol=1e-12)
    tuners = vp.tuners(model)
    assert {n for n, t in tuners.items() if t.active} == set(wanted)
    assert all(tuners[n].scale == s for n, s in wanted.items())


def test_a_name_alone_acts_as_trained():
    model, x, *_ = two()
    vp.activate(model, {"cat": 0.3, "ink": 2})
    vp.activate(model, "ink")
    torch.testing.assert_close(model(x), by_hand(model, x, {"ink": 1.0}), rtol=0, atol=1e-12)


def test_unknown_names_are_listed_and_change_nothing():
    model, x, *_ = two()
    before = model(x)
    with pytest.raises(vp.VisionPEFTError, match="no adapter named dog; there are: cat, ink"):
        vp.activate(model, {"cat": 0.1, "dog": 1})
    assert torch.equal(model(x), before)
    with pytest.raises(vp.VisionPEFTError, match="there are: none"):
        vp.activate(Net(), "cat")


def test_disabled_nests_and_restores_after_an_exception():
    model, x, cat, ink = two()
    vp.activate(model, {"ink": 0.5, "cat": 2})
    before = model(x)
    with pytest.raises(ZeroDivisionError), cat.disabled():
        torch.testing.assert_close(model(x), by_hand(model, x, {"ink": 0.5}), rtol=0, atol=1e-12)
        with ink.disabled(), cat.disabled():
            torch.testing.assert_close(model(x), by_hand(model, x, {}), rtol=0, atol=1e-12)
        torch.testing.assert_close(model(x), by_hand(model, x, {"ink": 0.5}), rtol=0, atol=1e-12)
        raise ZeroDivisionError
    assert torch.equal(model(x), before) and cat.scale == 2 and ink.scale == 0.5


def test_disabled_of_an_adapter_that_rests_wakes_nobody():
    model, x, cat, _ = two()
    vp.activate(model, "ink")
    before = model(x)
    with cat.disabled():
        assert torch.equal(model(x), before)
    assert not cat.active and torch.equal(model(x), before)


def test_scale_zero_is_the_base_to_the_bit():
    model, x = vit(), image()
    plain = model(x).detach()
    tuner = vp.attach(model, vp.LoRA(rank=2, targets="linear patch_embed"), train="norm head")
    for adapter in tuner.adapters.values():
        nn.init.normal_(adapter.b)
    tuner.scale = 0.0
    torch.testing.assert_close(model(x), plain, rtol=0, atol=0)


def test_what_acts_wholly_or_not_at_all_refuses_a_strength():
    model, x = vit(), image()
    tuner = vp.attach(model, "vpt", train="head")
    before = model(x)
    for change in (lambda: setattr(tuner, "scale", 0.5), lambda: vp.activate(model, {"default": 0.5})):
        with pytest.raises(vp.VisionPEFTError, match="VPT acts wholly or not at all"):
            change()
        assert tuner.scale == 1 and torch.equal(model(x), before)


def test_a_resting_adapter_gets_no_gradient_and_costs_nothing():
    model, x, cat, ink = two()
    vp.activate(model, "cat")
    model(x).sum().backward()
    assert all(p.grad is None for p in ink.parameters()) and all(p.grad is not None for p in cat.parameters())


def test_tuners_in_order_of_attaching():
    model, _, cat, ink = two()
    assert vp.tuners(model) == {"cat": cat, "ink": ink} and list(vp.tuners(model)) == ["cat", "ink"]
    cat.detach()
    assert vp.tuners(model) == {"ink": ink}
    with pytest.raises(vp.VisionPEFTError, match="no adapter named cat"):
        vp.activate(model, "cat")


def test_adapters_that_rest_are_not_walked_through():
    """Switching among a hundred is as quick as among two."""
    model = vit()
    vp.attach(model, vp.LoRA(rank=2), name="a", probe=False, train="head")
    before = [path for path, _ in binding.walk(model, "", set())], len(list(binding.holders(model)))
    assert before[1] == 2 + 1 and "blocks.0.attn.qkv" in before[0]
    vp.attach(model, vp.LoRA(rank=2), name="b", probe=False)
    assert before == ([path for path, _ in binding.walk(model, "", set())], len(list(binding.holders(model))))


def test_a_merged_adapter_acts_first():
    """SSF and LoRA at one site do not commute: the order that is asked for acts, or is refused."""
    torch.manual_seed(0)
    model, x = vit().double(), image().double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ssf = vp.attach(model, vp.SSF(targets="qkv"), name="ssf", probe=False)
        vp.attach(model, vp.LoRA(rank=2, targets="qkv"), name="lora", probe=False)
        vp.attach(model, vp.LoRA(rank=2, targets="attn_out"), name="elsewhere", probe=False)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, 1, 0.3)
    vp.activate(model, {"ssf": 1, "lora": 1, "elsewhere": 1})
    y = model(x)
    ssf.merge()
    torch.testing.assert_close(model(x), y)
    with pytest.raises(vp.VisionPEFTError, match="'ssf' is merged, so that it acts before 'lora' at blocks.0.attn.qkv"):
        vp.activate(model, {"lora": 1, "ssf": 1, "elsewhere": 1})
    vp.activate(model, {"elsewhere": 1, "ssf": 1, "lora": 1})
    torch.testing.assert_close(model(x), y)


def test_a_replaced_classifier_is_refused_before_anything_changes():
    model, x, cat, ink = two()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuner = vp.attach(model, vp.LoRA(rank=2, targets="fc1"), name="headed", train="head", probe=False)
    vp.activate(model, {"cat": 0.5})
    model.head = nn.Linear(model.head.in_features, 2).double()
    y = model(x)
    with pytest.raises(vp.VisionPEFTError, match="head was replaced since"):
        vp.activate(model, "headed")
    assert torch.equal(model(x), y) and not tuner.active and cat.active and cat.scale == 0.5
