"""Merging at its edges; that merged equals unmerged is tested for every method elsewhere."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import Net, image, vit
from torch import nn
from traces import assert_same, snapshot

import visionpeft as vp
from visionpeft.errors import MergeError


def lora(model: nn.Module, targets: str = "linear", name: str = "default", **more: object) -> vp.Tuner:
    train = "head" if name == "default" else None
    tuner = vp.attach(model, vp.LoRA(rank=2, targets=targets, **more), name=name, train=train)
    for adapter in tuner.adapters.values():
        nn.init.normal_(adapter.b)
    return tuner


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(["merge", "keep", "unmerge", "forward", "disable", "scale"]), max_size=8))
def test_any_sequence_ends_where_it_began(steps):
    torch.manual_seed(0)
    model, x = Net(), torch.randn(2, 8)
    before = snapshot(model)
    tuner = lora(model)
    adapted = model(x).detach()
    for step in steps:
        if step in ("merge", "keep"):
            tuner.merge(keep=step == "keep")
        elif step == "unmerge":
            tuner.unmerge()
        elif step == "forward":
            torch.testing.assert_close(model(x), adapted, rtol=1e-5, atol=1e-5)
        elif step == "disable":
            with tuner.disabled():
                base = nn.functional.linear(x, before["bits"]["fc1.weight"], model.fc1.bias)
                torch.testing.assert_close(model.fc1(x), base)
        elif tuner.merged is None:
            tuner.scale = 0.5
            tuner.scale = 1.0
    tuner.unmerge()
    assert torch.equal(model(x), adapted)
    tuner.detach()
    assert_same(before, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unmerge_is_exact_in_every_dtype_and_gives_the_same_objects(dtype):
    model = vit().to(dtype)
    before = snapshot(model)
    tuner = lora(model)
    for _ in range(3):
        tuner.merge()
        assert not torch.equal(model.blocks[0].attn.qkv.weight, before["bits"]["blocks.0.attn.qkv.weight"])
        assert model.blocks[0].attn.qkv.weight.dtype == dtype
        tuner.unmerge()
    tuner.detach()
    assert_same(before, model)


def test_a_merged_model_has_only_the_keys_of_the_base_and_plain_classes():
    model, x = vit(), image()
    keys = list(model.state_dict())
    tuner = lora(model)
    adapted = model(x)
    tuner.merge()
    assert list(model.state_dict()) == keys
    assert type(model.blocks[0].attn.qkv) is nn.Linear
    plain = vit()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(x), adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("write", ["in place", "replaced", "loaded"])
def test_a_weight_written_while_merged_refuses_to_unmerge(write):
    model = vit()
    base = model.state_dict()
    tuner = lora(model)
    tuner.merge()
    linear = model.blocks[0].mlp.fc1
    if write == "in place":
        with torch.no_grad():
            linear.weight.add_(1)
    elif write == "replaced":
        linear.weight = nn.Parameter(torch.zeros_like(linear.weight))
    else:
        model.load_state_dict(base)
    held = snapshot(model)
    for undo in (tuner.unmerge, tuner.detach):
        with pytest.raises(MergeError, match="written or replaced"):
            undo()
        assert_same(held, model)


def test_a_merged_model_shares_no_storage_with_the_originals():
    model = vit()
    originals = {t.data_ptr(): n for n, t in model.named_parameters()}
    tuner = lora(model)
    tuner.merge()
    merged = {n: t for n, t in model.named_parameters() if any(t is w.merged for w in tuner.merged)}
    assert len(merged) >= 8
    assert not [n for n, t in merged.items() if t.data_ptr() in originals]


def test_moving_to_another_dtype_while_merged_keeps_the_original():
    model, x = vit(), image()
    base = {k: v.clone() for k, v in model.state_dict().items()}
    tuner = lora(model)
    adapted = model(x).detach()
    tuner.merge()
    model.double()
    torch.testing.assert_close(model(x.double()).float(), adapted, rtol=1e-4, atol=1e-4)
    tuner.unmerge()
    torch.testing.assert_close(model(x.double()).float(), adapted, rtol=1e-4, atol=1e-4)
    tuner.detach()
    assert all(torch.equal(v, base[k].double()) for k, v in model.state_dict().items())
    assert all(p.requires_grad and isinstance(p, nn.Parameter) for p in model.parameters())


def test_merging_a_resting_adapter_is_refused():
    model = vit()
    tuner = lora(model)
    with tuner.disabled(), pytest.raises(MergeError, match="resting"):
        tuner.merge()


def test_detach_while_merged():
    model, x = vit(), image()
    before, plain = snapshot(model), model(x).detach()
    tuner = lora(model)
    tuner.merge()
    tuner.detach()
    assert_same(before, model)
    assert torch.equal(model(x), plain)


def test_disabled_while_merged_gives_the_base_and_merges_again():
    model, x = vit(), image()
    plain = model(x).detach()
    tuner = lora(model)
    tuner.merge()
    merged = model(x).detach()
    with pytest.raises(ZeroDivisionError), tuner.disabled():
        assert torch.equal(model(x), plain)
        with tuner.disabled():
            assert torch.equal(model(x), plain)
        raise ZeroDivisionError
    assert tuner.merged is not None and torch.equal(model(x), merged)


def test_two_adapters_merge_in_the_order_in_which_they_act_and_unmerge_backwards():
    model, x = vit().double(), image().double()
    before = snapshot(model)
    one, two = lora(model), lora(model, name="two")
    both = model(x).detach()
    with pytest.raises(MergeError, match="'default' acts before 'two'"):
        two.merge()
    one.merge()
    torch.testing.assert_close(model(x), both, rtol=0, atol=1e-10)
    two.merge()
    torch.testing.assert_close(model(x), both, rtol=0, atol=1e-10)
    with pytest.raises(MergeError):
        one.unmerge()
    two.unmerge()
    one.unmerge()
    assert torch.equal(model(x), both)
    one.detach()
    two.detach()
    assert_same(before, model)


def test_one_of_two_merged_while_the_other_comes_and_goes():
    model, x = vit().double(), image().double()
    before = snapshot(model)
    one, two = lora(model), lora(model, "query", name="two")
    both = model(x).detach()
    one.merge()
    with two.disabled():
        alone = model(x)
    assert not torch.allclose(alone, both)
    torch.testing.assert_close(model(x), both, rtol=0, atol=1e-10)
    two.detach()
    torch.testing.assert_close(model(x), alone, rtol=0, atol=0)
    one.detach()
    assert_same(before, model)


def test_attaching_activating_and_scaling_are_refused_while_merged():
    model = vit()
    tuner = lora(model)
    tuner.merge()
    with pytest.raises(vp.VisionPEFTError, match="merged"):
        vp.attach(model, "ssf", name="two")
    with pytest.raises(vp.VisionPEFTError, match="merged"):
        vp.activate(model, {})
    with pytest.raises(vp.VisionPEFTError, match="merged"):
        tuner.scale = 0.5
    with pytest.raises(vp.VisionPEFTError, match="merged"):
        tuner.load_state_dict(tuner.state_dict())


def test_what_cannot_merge_is_named_and_nothing_changes():
    model = vit()
    tuner = vp.attach(model, vp.AdaptFormer(), train="head")
    held = snapshot(model)
    with pytest.raises(MergeError, match="BottleneckAdapter at blocks.0:mlp"):
        tuner.merge()
    assert_same(held, model)


def test_a_site_that_cannot_merge_leaves_the_ones_before_it_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    tuner = vp.attach(model, vp.SSF(targets="linear"))
    held = snapshot(model)
    with pytest.raises(MergeError, match="SSF at 1 .*no bias"):
        tuner.merge()
    assert_same(held, model)


class Tied(nn.Module):
    """Two Linears with one weight, as an autoencoder or a language head."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(torch.relu(self.one(x)))


@pytest.mark.parametrize("targets", ["one", "linear"])
def test_tied_weights_merge_where_they_are_adapted_and_are_tied_again(targets):
    model, x = Tied().double(), torch.randn(2, 8, dtype=torch.float64)
    before = snapshot(model)
    tuner = vp.attach(model, vp.LoRA(rank=2, targets=targets))
    for adapter in tuner.adapters.values():
        nn.init.normal_(adapter.b)
    adapted = model(x).detach()
    tuner.merge()
    torch.testing.assert_close(model(x), adapted, rtol=0, atol=1e-12)
    tuner.detach()
    assert model.one.weight is model.two.weight
    assert_same(before, model)


def test_tied_parameters_that_learn_in_place_stay_tied():
    model, x = Tied(), torch.randn(2, 8)
    before = snapshot(model)
    tuner = vp.attach(model, "full")
    assert model.one.weight is model.two.weight
    assert tuner.num_parameters == 64 + 8 + 8 == sum(p.numel() for p in tuner.parameters())
    model(x).sum().backward()
    torch.optim.SGD(tuner.parameters(), 0.1).step()
    assert torch.equal(model.one.weight, model.two.weight)
    tuner.detach()
    assert_same(before, model)


def test_a_linear_used_twice_is_one_site_and_merges_once():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.b = self.a

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    model, x = Twice().double(), torch.randn(2, 8, dtype=torch.float64)
    before = snapshot(model)
    tuner = vp.attach(model, vp.LoRA(rank=2, targets="linear"))
    assert [s.path for s in tuner.sites] == ["a"]
    adapter = next(iter(tuner.adapters.values()))
    nn.init.normal_(adapter.b)
    w = (model.a.weight + adapter.b @ adapter.a).detach()
    want = torch.relu(x @ w.T + model.a.bias) @ w.T + model.a.bias
    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-12)
    model(x).square().sum().backward()
    got = adapter.b.grad.clone()
    leaf = adapter.b.detach().requires_grad_()
    w = model.a.weight.detach() + leaf @ adapter.a.detach()
    (torch.relu(x @ w.T + model.a.bias.detach()) @ w.T + model.a.bias.detach()).square().sum().backward()
    torch.testing.assert_close(got, leaf.grad, rtol=0, atol=1e-10)
    adapter.a.grad = adapter.b.grad = None
    tuner.merge()
    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-12)
    tuner.detach()
    assert_same(before, model)


def test_a_copy_of_a_merged_model_unmerges_by_itself():
    model, x = vit(), image()
    plain = model(x).detach()
    tuner = lora(model)
    tuner.merge()
    clone = copy.deepcopy(model)
    other = vp.tuners(clone)["default"]
    other.detach()
    assert torch.equal(clone(x), plain)
    assert tuner.merged is not None
    tuner.detach()
    assert torch.equal(model(x), plain)


def test_learnt_copies_merge_at_once():
    model, x = vit(), image()
    tuner = vp.attach(model, "bitfit", train="head")
    with torch.no_grad():
        for p in tuner.parameters():
            p.add_(0.1)
    adapted, keys = model(x).detach(), list(vit().state_dict())
    tuner.merge()
    assert torch.equal(model(x), adapted) and list(model.state_dict()) == keys
    tuner.detach()


def other_numbers(model: nn.Module, tuner: vp.Tuner) -> None:
    next(iter(tuner.adapters.values())).b.data.mul_(2)  # past the version counter


def other_base(model: nn.Module, tuner: vp.Tuner) -> None:
    with torch.no_grad():
        model.fc1.weight.add_(1)


def another_weight(model: nn.Module, tuner: vp.Tuner) -> None:
    model.fc1.weight.data = torch.randn(model.fc1.weight.shape)


def other_strength(model: nn.Module, tuner: vp.Tuner) -> None:
    tuner.scale = 0.5


def other_dtype(model: nn.Module, tuner: vp.Tuner) -> None:
    model.double()


def to_and_fro(model: nn.Module, tuner: vp.Tuner) -> None:
    model.bfloat16().float()  # rounded


CHANGES = [other_numbers, other_base, another_weight, other_strength, other_dtype, to_and_fro]


@pytest.mark.parametrize("change", CHANGES)
def test_kept_weights_are_put_in_again_unless_anything_has_changed(change):
    torch.manual_seed(0)
    model = Net()
    tuner = lora(model)
    tuner.merge(keep=True)
    first = dict(model.named_parameters())
    with tuner.disabled():
        assert model.fc1.weight is not first["fc1.weight"]
    assert all(first[key] is value for key, value in model.named_parameters())
    tuner.unmerge()
    tuner.merge(keep=True)
    assert all(first[key] is value for key, value in model.named_parameters())
    tuner.unmerge()
    change(model, tuner)
    tuner.merge(keep=True)
    assert model.fc1.weight is not first["fc1.weight"]
    found = {key: value.detach().clone() for key, value in model.named_parameters()}
    tuner.unmerge()
    tuner.merge()  # computes anew, and keeps nothing
    assert tuner.kept is None
    torch.testing.assert_close(dict(model.named_parameters()), found, rtol=0, atol=0)


def test_kept_weights_go_with_the_adapter():
    model = Net()
    tuner = lora(model)
    tuner.merge(keep=True)
    merged = weakref.ref(model.fc1.weight)
    tuner.unmerge()
    assert merged() is not None
    tuner.detach()
    gc.collect()
    assert merged() is None


def test_two_kept_adapters_take_turns_to_the_bit():
    torch.manual_seed(0)
    model, x = Net(), torch.randn(3, 8)
    before = snapshot(model)
    tuners = {name: lora(model, name=name) for name in ("a", "b")}
    found: dict[str, list[torch.Tensor]] = {"a": [], "b": []}
    for name in "abab":
        for tuner in tuners.values():
            tuner.unmerge()
        vp.activate(model, name)
        tuners[name].merge(keep=True)
        found[name].append(model(x).detach())
    assert torch.equal(*found["a"]) and torch.equal(*found["b"]) and not torch.equal(found["a"][0], found["b"][0])
    for tuner in tuners.values():
        tuner.detach()
    assert_same(before, model)
