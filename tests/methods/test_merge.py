"""Merged equals unmerged in double precision, or the refusal names the site; unmerging gives back the same bits."""

from __future__ import annotations

import pytest
import torch
import zoo

import visionpeft as vp
from visionpeft.errors import MergeError

every = pytest.mark.parametrize("case", zoo.CASES, ids=str)

# Methods of the weight that a backbone does not let merge, and what the refusal must say. All others merge.
REFUSED = {
    ("ssf", "eva02"): "no bias", ("ssf", "beit"): "no bias", ("ssf", "swinv2"): "no bias",
    ("ssf", "resnet"): "no bias", ("ssf", "efficientnet"): "no bias",
    ("ssf", "bit"): "standardises", ("ssf", "nfnet"): "standardises",
    ("ssf", "clip"): "no bias", ("ssf", "points"): "no bias",
}  # fmt: skip


def refusal(case: zoo.Case, tuner: vp.Tuner) -> str | None:
    """Why this must be refused: by the table, or because an adapter is no change of a weight."""
    if not all(a.overrides("weight") for a in tuner.adapters.values()):
        return "cannot be merged"
    return REFUSED.get((case.method, case.backbone))


def double(case: zoo.Case) -> tuple[torch.nn.Module, vp.Tuner, tuple[torch.Tensor, ...]]:
    model, tuner = zoo.tune(case, zoo.plain(case.backbone, torch.float64))
    return model, tuner, zoo.inputs(case.backbone, torch.float64)


@every
def test_merged_equals_unmerged_or_is_refused_by_name(case):
    model, tuner, x = double(case)
    y = zoo.see(model, x)
    assert zoo.distance(y, zoo.base(case.backbone, torch.float64)) > 1e-4
    if (why := refusal(case, tuner)) is not None:
        before = zoo.snapshot(model)
        with pytest.raises(MergeError, match=why) as error:
            tuner.merge()
        assert any(str(site) in str(error.value) for site in tuner.sites), str(error.value)
        zoo.assert_same(before, zoo.snapshot(model))
        assert torch.equal(y, zoo.see(model, x))
        return
    tuner.merge()
    tuner.merge()  # once is enough
    assert zoo.distance(zoo.see(model, x), y) < 1e-10


@every
def test_a_merged_model_is_a_plain_one(case):
    model, tuner, x = double(case)
    if refusal(case, tuner):
        pytest.skip("does not merge")
    tuner.merge()
    state = model.state_dict()
    fresh = zoo.plain(case.backbone, torch.float64)
    assert list(state) == list(fresh.state_dict())
    fresh.load_state_dict(state, strict=True)
    assert zoo.distance(zoo.see(fresh, x), zoo.see(model, x)) < 1e-12


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_unmerge_is_bit_exact(case, dtype):
    x = zoo.inputs(case.backbone, dtype)
    model, tuner = zoo.tune(case, zoo.plain(case.backbone, dtype))
    if refusal(case, tuner):
        pytest.skip("does not merge")
    y = zoo.see(model, x)
    before = zoo.snapshot(model, ours=False)
    for _ in range(2):
        tuner.merge()
        zoo.see(model, x)
        tuner.unmerge()
    zoo.assert_same(before, zoo.snapshot(model, ours=False))
    assert torch.equal(y, zoo.see(model, x))
    tuner.merge()
    tuner.detach()
    plain = zoo.plain(case.backbone, dtype)
    assert torch.equal(zoo.see(plain, x), zoo.see(model, x))
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in model.state_dict().items())


@every
def test_merged_to_half_strength(case):
    model, tuner, x = double(case)
    if refusal(case, tuner) or case.method in zoo.WHOLE:
        pytest.skip("does not merge")
    tuner.scale = 0.5
    y = zoo.see(model, x)
    tuner.merge()
    assert zoo.distance(zoo.see(model, x), y) < 1e-10


@every
def test_disabled_around_a_merged_adapter(case):
    model, tuner, x = double(case)
    if refusal(case, tuner):
        pytest.skip("does not merge")
    tuner.merge()
    y = zoo.see(model, x)
    with tuner.disabled():
        assert zoo.distance(zoo.see(model, x), zoo.base(case.backbone, torch.float64)) < 1e-14
    assert torch.equal(y, zoo.see(model, x)) and tuner.merged is not None


@every
def test_a_merged_weight_that_was_written_is_not_thrown_away(case):
    model, tuner, x = double(case)
    if refusal(case, tuner) or not tuner.adapters:
        pytest.skip("writes no weight")
    tuner.merge()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.01)
    y = zoo.see(model, x)
    with pytest.raises(MergeError, match="written"):
        tuner.unmerge()
    assert torch.equal(y, zoo.see(model, x))


@every
def test_two_merge_in_order(case):
    """The second acts on what the first made, so it merges after it and unmerges before it."""
    model, a = zoo.tune(case, zoo.plain(case.backbone, torch.float64), name="a", train=False)
    x = zoo.inputs(case.backbone, torch.float64)
    if refusal(case, a) or case.method == "linear":
        pytest.skip("does not merge, or one head at a time")
    _, b = zoo.tune(case, model, name="b", train=False, shake=False)
    zoo.disturb(b, seed=2)
    vp.activate(model, {"a": 1.0, "b": 1.0})
    y = zoo.see(model, x)
    if a.adapters:
        with pytest.raises(MergeError, match="'a'"):
            b.merge()
        assert torch.equal(y, zoo.see(model, x))
    a.merge()
    assert zoo.distance(zoo.see(model, x), y) < 1e-10
    b.merge()
    assert zoo.distance(zoo.see(model, x), y) < 1e-10
    b.unmerge()
    a.unmerge()
    assert torch.equal(y, zoo.see(model, x))
