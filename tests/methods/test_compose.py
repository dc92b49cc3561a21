"""Methods that the papers put together: SSF with all that merges, LoRA with prompts."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import zoo

import visionpeft as vp

VIT64 = ("vit", torch.float64)
MERGING = ("lora", "block_lora", "fact_tt", "fact_tk", "repadapter", "hydra", "binary_lora", "krona", "orthogonal",
           "svfit", "shira")  # fmt: skip
IN_PLACE = ("bitfit", "ln_tuning", "difffit", "spt")


def put(model: torch.nn.Module, keys: tuple[str, ...]) -> list[vp.Tuner]:
    """One method after the other, all acting, none at its start."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuners = [vp.attach(model, zoo.method(key), name=key) for key in keys]
    for seed, tuner in enumerate(tuners):
        zoo.disturb(tuner, seed)
    return tuners


@pytest.mark.parametrize("first", [True, False], ids=["after ssf", "before ssf"])
@pytest.mark.parametrize("key", MERGING)
def test_ssf_with_what_merges(key, first):
    """Both act; merged one by one in their order they give the same; unmerged the same bits; gone the base."""
    model, x = zoo.plain(*VIT64), zoo.inputs(*VIT64)
    tuners = put(model, ("ssf", key) if first else (key, "ssf"))
    y = zoo.see(model, x)
    for tuner in tuners:
        with tuner.disabled():
            assert zoo.distance(zoo.see(model, x), y) > 1e-3
    with pytest.raises(vp.errors.MergeError, match=f"{tuners[0].name!r} first"):
        tuners[1].merge()
    for tuner in tuners:
        tuner.merge()
        assert zoo.distance(zoo.see(model, x), y) < 1e-10
    fresh = zoo.plain(*VIT64)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert zoo.distance(zoo.see(fresh, x), y) < 1e-10
    for tuner in reversed(tuners):
        tuner.unmerge()
    assert torch.equal(zoo.see(model, x), y)
    for tuner in tuners:
        tuner.detach()
    assert torch.equal(zoo.see(model, x), zoo.base(*VIT64))


@pytest.mark.parametrize("first", [True, False], ids=["after ssf", "before ssf"])
@pytest.mark.parametrize("key", IN_PLACE)
def test_ssf_does_not_merge_into_what_another_learns(key, first):
    """Both act; but a tensor that an adapter of the other's file is must not be written to: said by name."""
    model, x = zoo.plain(*VIT64), zoo.inputs(*VIT64)
    tuners = put(model, ("ssf", key) if first else (key, "ssf"))
    y = zoo.see(model, x)
    for tuner in tuners:
        with tuner.disabled():
            assert zoo.distance(zoo.see(model, x), y) > 1e-3
    if not first:
        tuners[0].merge()
    before = zoo.snapshot(model)
    with pytest.raises(vp.errors.MergeError, match=f"'{key}''s own trainable copy"):
        vp.tuners(model)["ssf"].merge()
    zoo.assert_same(before, zoo.snapshot(model))
    assert zoo.distance(zoo.see(model, x), y) < 1e-12


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
def test_lora_with_vpt(deep, tmp_path):
    """The prompts run through W + B A: the same as prompts on a model of those weights, merged or not, learnt together
    and each from its own file."""
    model, x = zoo.plain(*VIT64), zoo.inputs(*VIT64)
    lora = vp.attach(model, zoo.method("lora", alpha=8), name="lora", probe=False)
    prompts = vp.attach(model, zoo.method("vpt", deep=deep), name="vpt", train="head")
    for seed, tuner in enumerate((lora, prompts)):
        zoo.disturb(tuner, seed)
        tuner.save(tmp_path / f"{tuner.name}.safetensors")
    y = zoo.see(model, x)

    by_hand = zoo.plain(*VIT64)
    with torch.no_grad():
        for site, adapter in lora.adapters.items():
            rows = by_hand.get_submodule(site.path).weight[slice(*site.rows)]
            rows += adapter.b @ adapter.a * 4  # alpha 8 over rank 2
    vp.attach(by_hand, zoo.method("vpt", deep=deep), name="vpt", train="head").load_state_dict(prompts.state_dict())
    assert zoo.distance(zoo.see(by_hand, x), y) < 1e-12

    zoo.loss(zoo.run(model, x)).backward()
    assert all(p.grad is not None and p.grad.any() for t in (lora, prompts) for p in t.parameters())
    again = copy.deepcopy(model)
    vp.tuners(again)["lora"].merge()
    assert zoo.distance(zoo.see(again, x), y) < 1e-10

    other = zoo.plain(*VIT64)
    for name in ("vpt", "lora"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            vp.load(other, tmp_path / f"{name}.safetensors", name=name)
    vp.activate(other, {"lora": 1.0, "vpt": 1.0})
    assert zoo.distance(zoo.see(other, x), y) < 1e-6  # files hold what was trained, in double precision here
