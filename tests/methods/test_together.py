"""Who acts and how strongly: disabling, scales, two adapters at once, a head for each."""

from __future__ import annotations

import warnings

import pytest
import torch
import zoo

import visionpeft as vp
from visionpeft.errors import VisionPEFTError

every = pytest.mark.parametrize("case", zoo.CASES, ids=str)


@every
def test_disabled_is_the_base_and_nests(case):
    x = zoo.inputs(case.backbone)
    base = zoo.base(case.backbone)
    model, tuner = zoo.tune(case)
    on = zoo.see(model, x)
    assert zoo.distance(on, base) > 1e-4
    ids = [id(p) for p in tuner.parameters()]
    with pytest.raises(ZeroDivisionError):
        with tuner.disabled():
            assert torch.equal(base, zoo.see(model, x))
            with tuner.disabled():
                assert torch.equal(base, zoo.see(model, x))
            assert torch.equal(base, zoo.see(model, x))
            raise ZeroDivisionError
    assert torch.equal(on, zoo.see(model, x))
    assert ids == [id(p) for p in tuner.parameters()]
    zoo.step(model, tuner, x)
    assert not torch.equal(on, zoo.see(model, x))


@pytest.mark.parametrize("case", zoo.on("eva02", "beit", "swinv2"), ids=str)
def test_disabled_is_the_base_in_every_precision(case):
    """Where qkv is bypassed a switch makes timm round otherwise: it must be off while nothing acts."""
    for dtype in (torch.float64, torch.bfloat16):
        model, tuner = zoo.tune(case, zoo.plain(case.backbone, dtype))
        with tuner.disabled():
            assert torch.equal(zoo.base(case.backbone, dtype), zoo.see(model, zoo.inputs(case.backbone, dtype)))


@every
def test_disabled_can_train_nothing_and_optimiser_state_survives(case):
    x = zoo.inputs(case.backbone)
    model, tuner = zoo.tune(case)
    with tuner.disabled():
        assert not zoo.run(model, x).requires_grad
    assert zoo.run(model, x).requires_grad


@every
def test_scale_goes_from_base_to_adapted(case):
    x = zoo.inputs(case.backbone)
    base = zoo.base(case.backbone)
    model, tuner = zoo.tune(case, train=False)
    if case.method == "linear":
        pytest.skip("train= tensors are taken whole")
    on = zoo.see(model, x)
    if case.method in zoo.WHOLE:
        with pytest.raises(VisionPEFTError, match="acts wholly"):
            tuner.scale = 0.5
        assert tuner.scale == 1 and torch.equal(on, zoo.see(model, x))
        return
    tuner.scale = 0.0
    far = zoo.distance(zoo.see(model, x), base)
    assert far == 0 if case.exact else far < 1e-5
    tuner.scale = 0.5
    assert isinstance(tuner.scale, float)
    half = zoo.see(model, x)
    assert not torch.equal(half, on) and zoo.distance(half, base) > 1e-5
    tuner.scale = 1.0
    assert torch.equal(on, zoo.see(model, x))


@every
def test_scale_of_a_train_tensor_is_left_alone(case):
    if "head" not in zoo.OFFERS[case.backbone] or case.method in {"full", *zoo.WHOLE}:
        pytest.skip("no head, or no scale")
    model, tuner = zoo.tune(case)
    head = model.get_submodule(vp.sites.Backbone(model).heads()[0])
    head = head[0] if isinstance(head, torch.nn.Sequential) else head
    before = head.weight.clone()
    tuner.scale = 0.25
    assert torch.equal(before, head.weight) and head.weight.requires_grad


@every
def test_two_at_once(case):
    """Both act; which is which is by name; each rests and leaves alone."""
    if case.method == "linear":
        pytest.skip("one head at a time")
    x = zoo.inputs(case.backbone)
    base = zoo.base(case.backbone)
    model, a = zoo.tune(case, zoo.plain(case.backbone).requires_grad_(False), name="a", train=False)
    only_a = zoo.see(model, x)
    _, b = zoo.tune(case, model, name="b", train=False, shake=False)
    zoo.disturb(b, seed=2)
    vp.activate(model, {"a": 1.0, "b": 1.0})
    assert list(vp.tuners(model)) == ["a", "b"]
    both = zoo.see(model, x)
    with b.disabled():
        assert torch.equal(only_a, zoo.see(model, x))
    with a.disabled():
        only_b = zoo.see(model, x)
    assert zoo.distance(only_b, only_a) > 1e-4 and zoo.distance(both, only_a) > 1e-4
    vp.activate(model, {"b": 1.0})
    assert torch.equal(only_b, zoo.see(model, x))
    vp.activate(model, {"a": 1.0, "b": 1.0})
    assert torch.equal(both, zoo.see(model, x))
    with a.disabled(), b.disabled():
        assert torch.equal(base, zoo.see(model, x))
    assert torch.equal(both, zoo.see(model, x))
    a.detach()
    assert torch.equal(only_b, zoo.see(model, x))
    b.detach()
    assert torch.equal(base, zoo.see(model, x))


@every
def test_two_at_once_learn_or_say_that_they_cannot(case):
    if case.method == "linear":
        pytest.skip("one head at a time")
    x = zoo.inputs(case.backbone)
    model, a = zoo.tune(case, name="a", train=False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        _, b = zoo.tune(case, model, name="b", train=False)
    if any("learns nothing" in str(warning.message) for warning in told):
        return  # two copies of one tensor stand blended
    out = zoo.run(model, x)
    assert out.requires_grad
    zoo.loss(out).backward()
    assert all(p.grad is not None for t in (a, b) for p in t.parameters())


@every
def test_at_half_strength_it_learns_or_says_that_it_cannot(case):
    if case.method in {"linear", *zoo.WHOLE}:
        pytest.skip("no scale")
    model, tuner = zoo.tune(case, train=False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        tuner.scale = 0.5
    if any("learns nothing" in str(warning.message) for warning in told):
        return
    out = zoo.run(model, zoo.inputs(case.backbone))
    assert out.requires_grad
    zoo.loss(out).backward()
    assert all(p.grad is not None for p in tuner.parameters())


@pytest.mark.parametrize("case", [c for c in zoo.CASES if "head" in zoo.OFFERS[c.backbone]], ids=str)
def test_each_brings_its_own_head(case):
    x = zoo.inputs(case.backbone)
    model, a = zoo.tune(case, name="a")
    with_a = zoo.see(model, x)
    _, b = zoo.tune(case, model, name="b", shake=False)
    zoo.disturb(b, seed=2)
    with_b = zoo.see(model, x)
    assert not a.active and b.active
    vp.activate(model, "a")
    assert torch.equal(with_a, zoo.see(model, x))
    vp.activate(model, "b")
    assert torch.equal(with_b, zoo.see(model, x))
    with pytest.raises(VisionPEFTError, match="'a' and 'b'"):
        vp.activate(model, {"a": 1.0, "b": 1.0})
    assert torch.equal(with_b, zoo.see(model, x))
    b.detach()
    vp.activate(model, "a")
    assert torch.equal(with_a, zoo.see(model, x))
