"""Where a method cannot act it says so by name, and the model is as if nothing had been tried."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import nn

import visionpeft as vp
from visionpeft.errors import DeadAdapterError, SiteError, VisionPEFTError


@pytest.mark.parametrize("backbone", zoo.MAKERS)
def test_the_zoo_offers_what_its_table_says(backbone):
    sites = vp.inspect(zoo.plain(backbone))
    found = {s.role if s.kind in ("branch", "stage") else s.kind for s in sites if s.role != "head"}
    found |= {s.role for s in sites if s.role == "head"}
    assert found == zoo.OFFERS[backbone]


@pytest.mark.parametrize("case", zoo.REFUSED, ids=str)
def test_refusal_names_what_is_missing_and_leaves_no_trace(case):
    model = zoo.plain(case.backbone)
    before = zoo.snapshot(model)
    if case.method == "linear":  # counts on models without a classifier are wanted: a warning
        with pytest.warns(UserWarning, match="no classifier: nothing learns"):
            vp.attach(model, zoo.method(case.method)).detach()
        zoo.assert_same(before, zoo.snapshot(model))
        return
    missing = set().union(*(need for need in zoo.needs(case.method) if not need & zoo.OFFERS[case.backbone]))
    with pytest.raises(SiteError) as error:
        vp.attach(model, zoo.method(case.method))
    assert any(word in str(error.value) for word in missing), str(error.value)
    zoo.assert_same(before, zoo.snapshot(model))
    assert vp.tuners(model) == {}


@pytest.mark.parametrize("case", zoo.CASES, ids=str)
def test_a_failure_half_way_leaves_no_trace(case, monkeypatch):
    model = zoo.plain(case.backbone)
    base = zoo.see(model, zoo.inputs(case.backbone))
    before = zoo.snapshot(model)
    from visionpeft import attaching

    calls = []
    for step in ("_place", "_copy"):  # whichever way the method binds, the third binding fails
        real = getattr(attaching, step)

        def failing(*args, real=real):
            calls.append(args)
            if len(calls) == 3:
                raise RuntimeError("disk on fire")
            return real(*args)

        monkeypatch.setattr(attaching, step, failing)
    with pytest.raises(RuntimeError, match="disk on fire"):
        vp.attach(model, zoo.method(case.method), train="*")
    zoo.assert_same(before, zoo.snapshot(model))
    assert torch.equal(base, zoo.see(model, zoo.inputs(case.backbone)))


@pytest.mark.parametrize("case", zoo.CASES, ids=str)
def test_every_adapter_is_alive(case):
    """The probe that attach runs by itself where it can, and here with an input of ours everywhere."""
    model, tuner = zoo.tune(case)
    before = zoo.snapshot(model)
    tuner.probe(*zoo.inputs(case.backbone))
    zoo.assert_same(before, zoo.snapshot(model))


def test_a_dead_adapter_is_named():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    model = Lazy()
    tuner = vp.attach(model, vp.LoRA(rank=1, targets="linear"))
    with pytest.raises(DeadAdapterError, match="idle") as error:
        tuner.probe(torch.randn(2, 4))
    assert "used" not in str(error.value).replace("never", "")


def test_an_adapter_that_is_dead_in_eval_only_is_named():
    class Fast(nn.Module):
        def __init__(self):
            super().__init__()
            self.slow = nn.Linear(4, 4)

        def forward(self, x):
            return self.slow(x) if self.training else x @ self.slow.weight

    tuner = vp.attach(Fast(), vp.LoRA(rank=1, targets="linear"))
    with pytest.raises(DeadAdapterError, match=r"slow \(in eval\)"):
        tuner.probe(torch.randn(2, 4))


@pytest.mark.parametrize("key", vp.METHODS)
def test_a_name_twice_is_refused_and_the_first_one_works_on(key):
    case = zoo.home(key)
    model, tuner = zoo.tune(case)
    x = zoo.inputs(case.backbone)
    y = zoo.see(model, x)
    with pytest.raises(VisionPEFTError, match="default"):
        zoo.tune(case, model)
    assert torch.equal(y, zoo.see(model, x)) and list(vp.tuners(model)) == ["default"]


@pytest.mark.parametrize("key", vp.METHODS)
def test_an_instance_level_forward_is_refused_or_acts_all_the_same(key):
    """accelerate and LyCORIS leave a `forward` on the instance, which would shadow the binding."""
    case = zoo.home(key)
    plain, _ = zoo.tune(case)
    model = zoo.plain(case.backbone)
    for module in model.modules():
        if not list(module.children()):
            module.forward = module.forward
    before = zoo.snapshot(model)
    try:
        zoo.tune(case, model)
    except SiteError as error:
        assert "forward" in str(error)
        zoo.assert_same(before, zoo.snapshot(model))
    else:
        x = zoo.inputs(case.backbone)
        assert torch.equal(zoo.see(plain, x), zoo.see(model, x))


def test_targets_that_match_nothing_are_named():
    with pytest.raises(SiteError, match="qurey"):
        vp.attach(zoo.plain("vit"), vp.LoRA(rank=2, targets="qurey value"))


def test_a_rank_above_the_matrix_is_named():
    with pytest.raises(SiteError, match=r"blocks\.0\.attn\.qkv:query.*rank 25"):
        vp.attach(zoo.plain("vit"), vp.LoRA(rank=25))


def test_lora_refuses_sparse_gradients():
    model = nn.Sequential(nn.Embedding(6, 4, sparse=True), nn.Linear(4, 2))
    with pytest.raises(SiteError, match="cannot act at 0 .*sparse=False"):
        vp.attach(model, vp.LoRA(rank=2, targets="embed"), probe=False)
