"""attach either succeeds or leaves no trace, and detach always leaves none."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from small import Net, image, vit
from torch import nn
from traces import assert_same, snapshot

import visionpeft as vp
from visionpeft import activation, attaching, binding, probing
from visionpeft.errors import SiteError

METHODS = ["lora", "ssf", "bitfit", "ln_tuning", "adaptformer", "vpt", "full", "linear"]


class Boom(Exception):
    pass


def boom(*args: object, **kwargs: object) -> None:
    raise Boom


STAGES = {
    "register": (attaching, "_register", 0),
    "freeze": (attaching, "_freeze_statistics", 0),
    "first site": (attaching, "_place", 0),
    "third site": (attaching, "_place", 2),
    "grip": (binding, "grip", 4),
    "first copy": (attaching, "_copy", 0),
    "second copy": (attaching, "_copy", 1),
    "activate": (activation, "set_active", 0),
    "settle": (activation, "_settle_all", 0),
    "probe": (probing, "probe_attached", 0),
}


@pytest.mark.parametrize("other", [False, True], ids=["alone", "beside another"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_failure_at_any_stage_leaves_no_trace(stage, other, monkeypatch):
    model, x = vit(), image()
    model.blocks[1].eval()  # modes that differ
    model.blocks[0].mlp.train()
    model.norm.weight.requires_grad_(False)
    model.register_forward_hook(lambda m, i, o: None)
    if other:
        first = vp.attach(model, vp.LoRA(rank=1, targets="linear"), name="first", train="head")
        for adapter in first.adapters.values():
            nn.init.normal_(adapter.b)
    before, plain = snapshot(model), model(x).detach()
    where, name, skip = STAGES[stage]
    real, calls = getattr(where, name), []

    def after_some(*args, **kwargs):
        calls.append(name)
        if len(calls) == skip + 1:
            raise Boom
        return real(*args, **kwargs)

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(where, name, after_some)
        with pytest.raises(Boom):
            vp.attach(model, vp.LoRA(rank=2, targets="linear"), name="second", train="head norm")
    assert_same(before, model)
    assert list(vp.tuners(model)) == (["first"] if other else [])
    assert torch.equal(model(x), plain)
    if other:
        assert first.active and sum(1 for _ in first.parameters()) == 18
        first.detach()


@pytest.mark.parametrize("method", METHODS)
def test_detach_leaves_no_trace_after_training(method):
    model, x = vit(), image()
    before, plain = snapshot(model), model(x).detach()
    tuner = vp.attach(model, method, train="head")
    optimiser = torch.optim.SGD(tuner.parameters(), 0.1)
    for _ in range(2):
        model.train()(x).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    model.eval()
    assert not torch.equal(model(x), plain)
    tuner.detach()
    assert_same(before, model)
    assert torch.equal(model(x), plain)
    tuner.detach()  # again: nothing to do


def test_detach_in_any_order():
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        model, x = vit(), image()
        before = snapshot(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tuners = [
                vp.attach(model, vp.LoRA(rank=1, targets="linear"), name="a", train="head"),
                vp.attach(model, "bitfit", name="b", train="head"),
                vp.attach(model, "adaptformer", name="c"),
            ]
        for i in order:
            tuners[i].detach()
            model(x)
        assert_same(before, model)


def test_the_adapter_is_the_same_with_and_without_probe_and_so_is_the_generator_after():
    states, adapters = [], []
    for probe in (True, False):
        torch.manual_seed(3)
        model = vit()
        tuner = vp.attach(model, vp.LoRA(rank=2, dropout=0.1, targets="linear"), train="head", probe=probe)
        states.append(torch.get_rng_state())
        adapters.append(tuner.state_dict())
    assert torch.equal(*states)
    assert all(torch.equal(adapters[0][k], adapters[1][k]) for k in adapters[0])


@pytest.mark.parametrize("method", [vp.LoRA(rank=1, dropout=0.5), vp.AdaptFormer(dropout=0.5), "vpt"])
def test_adapters_take_the_mode_of_the_module_they_join(method, tmp_path):
    model, x = vit(), image()
    tuner = vp.attach(model, method, train="head")
    assert not any(m.training for m in model.modules())
    with torch.no_grad():
        for p in tuner.parameters():
            nn.init.normal_(p)
    assert torch.equal(model(x), model(x))
    tuner.save(tmp_path / "a.safetensors")
    again = vit()
    vp.load(again, tmp_path / "a.safetensors")
    assert not any(m.training for m in again.modules())
    training = vit().train()
    tuner = vp.attach(training, method, train="head")
    assert all(a.training for a in tuner.adapters.values())


def test_names():
    model = vit()
    vp.attach(model, "linear")
    with pytest.raises(vp.VisionPEFTError, match="'default' is attached already"):
        vp.attach(model, "lora")
    for bad in ("a.b", ""):
        with pytest.raises(vp.VisionPEFTError, match="without dots"):
            vp.attach(model, "lora", name=bad)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("learnt", "whole", "two words", "0", "head", "weight"):
            vp.attach(model, vp.LoRA(rank=1), name=name, train="head")
    model.train()(image())
    assert len(vp.tuners(model)) == 7
    for tuner in vp.tuners(model).values():
        tuner.detach()


@pytest.mark.parametrize("name", ["training", "forward", "active", "registry", "tap", "users", "_modules"])
def test_a_name_that_torch_or_the_holder_uses_is_harmless_or_refused(name):
    model, x = vit(), image()
    before = snapshot(model)
    try:
        tuner = vp.attach(model, vp.LoRA(rank=1), name=name, train="head")
    except vp.VisionPEFTError as error:
        assert name in str(error)
    else:
        model.train()(x).sum().backward()
        tuner.merge()
        model.eval()(x)
        tuner.detach()
    assert_same(before, model)


def test_a_module_that_is_adapted_and_trains_as_well():
    model, x = vit(), image()
    tuner = vp.attach(model, vp.LoRA(rank=2, targets="linear"), train="blocks.0.mlp.fc1.bias head")
    model(x).sum().backward()
    assert tuner.learnt("blocks.0.mlp.fc1", "bias").grad is not None
    tuner.merge()
    tuner.unmerge()


def test_original_state_dict_loads_strictly_into_every_adapted_model():
    base = vit().state_dict()
    for method in ("lora", "ssf", "adaptformer", "vpt", "bitfit", "full"):
        model = vit()
        tuner = vp.attach(model, method, train="head")
        assert set(base) <= set(model.state_dict())
        adapters = {k: v.clone() for k, v in tuner.state_dict().items() if ":" in k or ".peft." in k}
        model.load_state_dict(base)
        assert all(torch.equal(tuner.state_dict()[k], v) for k, v in adapters.items())


def test_a_key_of_the_base_that_is_missing_is_still_an_error():
    model = vit()
    base = model.state_dict()
    vp.attach(model, vp.LoRA(rank=1), train="head")
    del base["blocks.0.attn.qkv.weight"]
    with pytest.raises(RuntimeError, match="blocks.0.attn.qkv.weight"):
        model.load_state_dict(base)


def test_an_incomplete_set_of_adapter_keys_is_still_an_error():
    model = vit()
    vp.attach(model, vp.LoRA(rank=1), train="head")
    state = model.state_dict()
    del state[next(k for k in state if k.endswith("query.a"))]
    with pytest.raises(RuntimeError, match="query.a"):
        model.load_state_dict(state)


@pytest.mark.parametrize("grad", [torch.no_grad, torch.enable_grad])
def test_the_ambient_grad_mode_does_not_matter(grad):
    model = vit()
    with grad():
        tuner = vp.attach(model, vp.LoRA(rank=1), train="head")
        tuner.probe(image())
    model(image()).sum().backward()
    assert all(p.grad is not None for p in tuner.parameters())


def test_inference_mode_works_or_is_refused_by_name():
    model = vit()
    before = snapshot(model)
    try:
        with torch.inference_mode():
            tuner = vp.attach(model, vp.LoRA(rank=1), train="head")
    except vp.VisionPEFTError as error:
        assert "inference" in str(error)
        assert_same(before, model)
    else:
        model(image()).sum().backward()
        assert all(p.grad is not None for p in tuner.parameters())


# ---- modules with a forward of their own -----------------------------------------------------------------------------


def lycoris_like(module: nn.Module) -> None:
    own = module.forward
    module.forward = lambda x: own(x) * 1.0


def accelerate_like(module: nn.Module) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(module, ModelHook())


@pytest.mark.parametrize("wrap", [lycoris_like, accelerate_like])
@pytest.mark.parametrize(("method", "path"), [("lora", "blocks.1.attn.qkv"), ("adaptformer", "blocks.1.norm2"),
                                              ("vpt", "blocks.1"), ("ssf", "norm")])  # fmt: skip
def test_a_forward_of_the_instance_that_would_shadow_the_adapter_is_refused_by_path(wrap, method, path):
    model, x = vit(), image()
    wrap(model.get_submodule(path))
    before, plain = snapshot(model), model(x).detach()
    with pytest.raises(SiteError, match=f"{path}.*forward"):
        vp.attach(model, method, train="head")
    assert_same(before, model)
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("wrap", [lycoris_like, accelerate_like])
def test_a_forward_of_the_instance_elsewhere_is_no_obstacle(wrap):
    model, x = vit(), image()
    wrap(model)
    wrap(model.blocks[0].mlp.fc1)
    tuner = vp.attach(model, vp.LoRA(rank=1), train="head")
    tuner.probe(x)
    tuner.detach()


@pytest.mark.parametrize("wrap", [lycoris_like, accelerate_like])
def test_a_wrapped_batchnorm_can_still_be_frozen(wrap):
    """Freezing its statistics overrides `train`, not `forward`: nothing is shadowed."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    wrap(model[1])
    vp.attach(model, vp.LoRA(rank=1, targets="conv"))
    model.train()
    mean = model[1].running_mean.clone()
    model(image())
    assert torch.equal(model[1].running_mean, mean)


@pytest.mark.parametrize("wrap", [lycoris_like, accelerate_like])
def test_wrapping_after_attaching_acts_and_survives_detach(wrap):
    model, x = Net(), torch.randn(2, 8)
    plain = model(x)
    tuner = vp.attach(model, vp.LoRA(rank=1, targets="fc1"), train="head")
    nn.init.normal_(next(iter(tuner.adapters.values())).b)
    wrap(model.fc1)
    assert not torch.allclose(model(x), plain)
    tuner.probe(x)
    try:
        tuner.detach()
    except vp.VisionPEFTError as error:
        assert "forward" in str(error)
    else:
        assert torch.equal(model(x), plain)


def test_foreign_hooks_survive_and_fire():
    model, x, seen = vit(), image(), []
    model.blocks[0].attn.qkv.register_forward_hook(lambda m, i, o: seen.append("forward"))
    model.blocks[0].attn.qkv.register_full_backward_hook(lambda m, i, o: seen.append("backward"))
    tuner = vp.attach(model, vp.LoRA(rank=1), train="head")
    seen.clear()
    model(x).sum().backward()
    assert seen == ["forward", "backward"]
    tuner.detach()
    seen.clear()
    model(x).sum().backward()
    assert seen == ["forward", "backward"]


def test_a_module_with_an_attribute_of_our_name_is_refused():
    model = Net()
    model.fc1.peft = 3
    before = snapshot(model)
    with pytest.raises(SiteError, match="peft"):
        vp.attach(model, vp.LoRA(rank=1, targets="linear"), train="head")
    assert_same(before, model)


def test_copies_of_adapted_models_are_independent_and_detach():
    model, x = vit(), image()
    before, plain = snapshot(model), model(x).detach()
    tuner = vp.attach(model, vp.LoRA(rank=1, targets="linear"), train="head")
    clone = copy.deepcopy(model)
    for p in tuner.parameters():
        nn.init.normal_(p)
    assert torch.equal(clone(x), plain) and not torch.equal(model(x), plain)
    other = vp.tuners(clone)["default"]
    assert other is not tuner and other.model is clone
    other.detach()
    assert list(clone.state_dict()) == before["keys"] and torch.equal(clone(x), plain)
    assert list(vp.tuners(model)) == ["default"]
    tuner.detach()
    assert_same(before, model)


def test_what_comes_after_data_parallelism_is_refused(tmp_path):
    """DDP and FSDP2 keep alike what they saw: adapters that come later would learn apart from each other, silently."""
    from torch.distributed.fsdp import fully_shard

    def small() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))

    method = vp.LoRA(rank=1, targets="linear")
    vp.attach(small(), method, probe=False).save(tmp_path / "a.safetensors")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        sharded = small()
        fully_shard(sharded[0])
        ddp = nn.parallel.DistributedDataParallel(small())
        with pytest.raises(vp.errors.VisionPEFTError, match="in DistributedDataParallel already.*first"):
            vp.attach({"net": ddp}, method, probe=False)
        for wrapped, name in ((ddp, "DistributedDataParallel"), (sharded, "FSDPLinear")):
            for put in (lambda m: vp.attach(m, method, probe=False), lambda m: vp.load(m, tmp_path / "a.safetensors")):
                with pytest.raises(vp.errors.VisionPEFTError, match=f"in {name} already.*first"):
                    put(wrapped)
            assert not vp.tuners(wrapped)
        model = small()
        tuner = vp.attach(model, method, probe=False)
        assert list(vp.tuners(nn.parallel.DistributedDataParallel(model)).values()) == [tuner]
    finally:
        torch.distributed.destroy_process_group()
