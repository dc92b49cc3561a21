"""Each adapter owns its classifier: one backbone, several class sets."""

from __future__ import annotations

import warnings

import pytest
import torch
from small import Net, image, vit
from torch import nn
from traces import assert_same, snapshot

import visionpeft as vp
from visionpeft.errors import SiteError


def randomise(tuner: vp.Tuner) -> None:
    with torch.no_grad():
        for p in tuner.parameters():
            nn.init.normal_(p, std=0.2)


@pytest.fixture
def two_files(tmp_path):
    """pets.safetensors with 37 classes and digits.safetensors with 10, on the same backbone, and their outputs."""
    torch.manual_seed(0)
    backbone = vit(10).state_dict()
    outputs = {}
    for name, classes in (("pets", 37), ("digits", 10)):
        model = vit(classes)
        model.load_state_dict({k: v for k, v in backbone.items() if not k.startswith("head.")}, strict=False)
        tuner = vp.attach(model, vp.LoRA(rank=2), name=name, train="head")
        randomise(tuner)
        tuner.save(tmp_path / f"{name}.safetensors")
        outputs[name] = model
    plain = vit(10)
    plain.load_state_dict(backbone)
    return plain, tmp_path, outputs


def test_a_37_class_file_in_a_10_class_model(two_files):
    model, folder, originals = two_files
    x, before = image(), snapshot(model)
    plain = model(x).detach()
    pets = vp.load(model, folder / "pets.safetensors")
    assert model.head.out_features == 37 and model(x).shape == (2, 37)
    assert torch.equal(model(x), originals["pets"](x))
    with pytest.warns(UserWarning, match="'pets' rests now"):
        digits = vp.load(model, folder / "digits.safetensors")
    assert model.head.out_features == 10 and torch.equal(model(x), originals["digits"](x))
    vp.activate(model, "pets")
    assert model.head.out_features == 37 and torch.equal(model(x), originals["pets"](x))
    vp.activate(model, {"digits": 1.0})
    assert torch.equal(model(x), originals["digits"](x))
    with digits.disabled():
        assert torch.equal(model(x), plain) and model.head.out_features == 10
    vp.activate(model, {})
    assert torch.equal(model(x), plain)
    pets.detach()
    digits.detach()
    assert_same(before, model)


def test_blending_unequal_heads_is_an_error_that_changes_nothing(two_files):
    model, folder, originals = two_files
    x = image()
    vp.load(model, folder / "pets.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vp.load(model, folder / "digits.safetensors")
    with pytest.raises(vp.VisionPEFTError, match=r"head\.weight.*\(37, 48\).*\(10, 48\)"):
        vp.activate(model, {"pets": 0.5, "digits": 0.5})
    assert torch.equal(model(x), originals["digits"](x))


def test_each_trains_its_own_copy(two_files):
    model, folder, _ = two_files
    base = model.head.weight
    pets = vp.load(model, folder / "pets.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        digits = vp.load(model, folder / "digits.safetensors")
    held = pets.learnt("head", "weight").detach().clone()
    model(image()).square().sum().backward()
    assert all(p.grad is not None for p in digits.parameters())
    assert all(p.grad is None for p in pets.parameters()) and base.grad is None
    torch.optim.SGD(digits.parameters(), 1.0).step()
    assert torch.equal(pets.learnt("head", "weight"), held)
    assert {id(p) for p in pets.parameters()}.isdisjoint(id(p) for p in digits.parameters())


def test_copies_keep_their_identity_through_switching():
    """An optimiser that holds them goes on training them."""
    model = vit()
    tuner = vp.attach(model, vp.LoRA(rank=1), train="head")
    ids = [id(p) for p in tuner.parameters()]
    with tuner.disabled():
        assert [id(p) for p in tuner.parameters()] == ids
    vp.activate(model, {})
    vp.activate(model, "default")
    tuner.scale = 0.5
    tuner.scale = 1.0
    tuner.merge()
    tuner.unmerge()
    assert [id(p) for p in tuner.parameters()] == ids and model.head.weight.requires_grad


def test_a_classifier_that_neither_trains_nor_is_adapted_is_a_warning():
    with pytest.warns(UserWarning, match="classifier 'head' neither trains nor is adapted"):
        vp.attach(vit(), vp.LoRA(rank=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vp.attach(vit(), vp.LoRA(rank=1), train="head")
        vp.attach(vit(), vp.LoRA(rank=1, targets="query head"))
        vp.attach(vit(), "full")
        vp.attach(vit(0), vp.LoRA(rank=1))


def test_train_without_classifier_or_match_is_an_error():
    with pytest.raises(SiteError, match="no classifier"):
        vp.attach(vit(0), vp.LoRA(rank=1), train="head")
    with pytest.raises(SiteError, match="train='hed'"):
        vp.attach(vit(), vp.LoRA(rank=1), train="hed")


def test_train_takes_globs_of_any_parameter():
    model = vit()
    tuner = vp.attach(model, vp.LoRA(rank=1), train="head pos_embed blocks.0.norm?.weight norm")
    assert set(tuner.trained) == {
        ("head", "weight"), ("head", "bias"), ("", "pos_embed"), ("blocks.0.norm1", "weight"),
        ("blocks.0.norm2", "weight"), ("norm", "weight"), ("norm", "bias"),
    }  # fmt: skip
    assert tuner.num_parameters == 2 * 2 * (48 + 48)
    model(image()).sum().backward()
    assert model.pos_embed.grad is not None


def test_counts_leave_the_head_out_except_for_full():
    model = vit()
    everything = sum(p.numel() for p in model.parameters())
    for method, count in (("linear", 0), ("full", everything), ("bitfit", None)):
        tuner = vp.attach(model, method, train="head")
        biases = sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias") and not n.startswith("head"))
        assert tuner.num_parameters == (biases if count is None else count)
        tuner.detach()


def test_scale_leaves_the_head_whole_and_draws_a_line_for_the_method():
    model, x = vit(), image()
    base = model.norm.bias.detach().clone()
    tuner = vp.attach(model, "bitfit", train="head")
    randomise(tuner)
    learnt, head = model.norm.bias.detach().clone(), model.head.weight
    tuner.scale = 0.25
    torch.testing.assert_close(model.norm.bias, base + 0.25 * (learnt - base), rtol=0, atol=1e-7)
    assert model.head.weight is head
    model(x)
    tuner.scale = 1
    assert torch.equal(model.norm.bias, learnt)
    tuner.detach()
    assert torch.equal(model.norm.bias, base)


def test_heads_of_unknown_models_by_their_usual_names():
    model = Net()
    tuner = vp.attach(model, "linear")
    assert tuner.trained == [("head", "weight"), ("head", "bias")]
