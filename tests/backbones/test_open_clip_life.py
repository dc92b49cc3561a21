"""Adapters on every Linear of every kind of CLIP model: identity, liveness, paths, merging, detaching, in float64."""

from __future__ import annotations

import copy
import pickle

import open_clip
import pytest
import torch
from open_clip_zoo import MAKERS, UNUSED, Zoo, make
from torch import nn
from traces import assert_same, snapshot

import visionpeft as vp
from visionpeft import lowrank
from visionpeft.errors import SiteError, VisionPEFTError

ALL = "linear projection"


def tune(zoo: Zoo, name: str, shake: bool = True, **fields) -> vp.Tuner:
    torch.manual_seed(11)
    fields = {"rank": 2, "targets": ALL, "exclude": UNUSED.get(name), **fields}
    tuner = vp.attach(zoo.model, vp.LoRA(**fields))
    if shake:
        with torch.no_grad():
            for p in tuner.parameters():
                p.add_(torch.randn_like(p), alpha=0.2)
    return tuner


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", MAKERS)
def test_start_is_the_identity_and_detach_leaves_the_model_as_it_was(name):
    zoo = make(name)
    before = snapshot(zoo.model)
    with torch.no_grad():
        plain = zoo.features()
    tuner = tune(zoo, name, shake=False)
    with torch.no_grad():
        close(zoo.features(), plain)
    tuner.detach()
    assert_same(before, zoo.model)
    with torch.no_grad():
        assert torch.equal(zoo.features(), plain)


@pytest.mark.parametrize("name", MAKERS)
def test_every_adapter_acts_alike_in_train_and_in_eval(name):
    zoo = make(name)
    with torch.no_grad():
        plain = zoo.features()
    tuner = tune(zoo, name)
    zoo.model.train()
    trained = zoo.features()
    decoded = zoo.model(zoo.image, zoo.text)["logits"] if name == "coca" else trained  # neither encoder reaches that
    (trained.square().sum() + 0.01 * decoded.square().sum()).backward()
    still = [str(s) for s, a in tuner.adapters.items() if not all(p.grad is not None and p.grad.any()
                                                                 for p in a.parameters())]  # fmt: skip
    assert not still
    zoo.model.eval()
    with torch.no_grad():
        close(zoo.features(), trained.detach())
        assert (zoo.features() - plain).abs().max() > 0.05


@pytest.mark.parametrize("name", MAKERS)
def test_merged_weights_do_the_same_and_go_back_to_the_bit(name):
    zoo = make(name)
    before = snapshot(zoo.model)
    tuner = tune(zoo, name)
    with torch.no_grad():
        adapted = zoo.features()
        tuner.merge()
        close(zoo.features(), adapted)
        assert not any("peft" in key for key in zoo.model.state_dict())
        tuner.unmerge()
        assert torch.equal(zoo.features(), adapted)
    tuner.detach()
    assert_same(before, zoo.model)


NO_PROJECTION = ("rn50", "siglip")  # their image towers end in an attention pool


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("name", MAKERS)
def test_an_adapter_of_one_tower_leaves_the_other_to_the_bit(name, tower):
    zoo = make(name)
    with torch.no_grad():
        plain = zoo.features()
    targets = "linear" if tower == "image" and name in NO_PROJECTION else "projection"
    tuner = tune(zoo, name, targets=targets, tower=tower, exclude=None)
    with torch.no_grad():
        moved = (zoo.features() - plain).abs().amax(1) > 1e-3
    assert moved.tolist() == ([True, True, False, False] if tower == "image" else [False, False, True, True])
    assert tuner.num_parameters == sum(2 * sum(s.shape) for s in tuner.sites)


def test_save_and_load_bring_raw_projections_and_pools_back(tmp_path):
    for name in ("vit", "rn50", "custom_block"):
        zoo, other = make(name), make(name)
        tune(zoo, name).save(tmp_path / "a.safetensors")
        vp.load(other.model, tmp_path / "a.safetensors")
        with torch.no_grad():
            assert torch.equal(zoo.features(), other.features())


def test_raw_projection_adapts_as_the_formula_says():
    """x @ P with LoRA is x @ P + s (x A^T) B^T."""
    zoo = make("vit")
    tuner = tune(zoo, "vit", targets="visual.proj", alpha=6, rank=3)
    assert [str(s) for s in tuner.sites] == ["visual:proj"] and tuner.sites[0].shape == (16, 32)
    (adapter,) = tuner.adapters.values()
    visual, p = zoo.model.visual, zoo.model.visual._parameters["proj"]
    with torch.no_grad():
        pooled, _ = visual._pool(visual.transformer(visual._embeds(zoo.image)))
        expected = pooled @ p + 2.0 * (pooled @ adapter.a.t()) @ adapter.b.t()
        close(zoo.model.encode_image(zoo.image), expected)
        close(zoo.model.visual.forward_intermediates(zoo.image)["image_features"], expected)


def test_attention_pool_equals_the_functions_that_it_replaces():
    zoo = make("rn50")
    tuner = tune(zoo, "rn50", targets="visual.attnpool.*")
    assert [s.role for s in tuner.sites] == ["key", "query", "value", "attn_out"]
    assert all(s.host == "visual.attnpool" and not s.called for s in tuner.sites)
    with torch.no_grad():
        adapted = zoo.model.encode_image(zoo.image)
        deltas = {s.path: a.scale * a.b @ a.a for s, a in tuner.adapters.items()}
        tuner.detach()
        for path, delta in deltas.items():
            zoo.model.get_submodule(path).weight.add_(delta)
        close(zoo.model.encode_image(zoo.image), adapted)


@pytest.mark.parametrize("name", ["vit", "rn50", "coca", "siglip", "eva01", "eva02"])
def test_dropout_is_drawn_apart_for_query_key_and_value(name):
    zoo = make(name)
    roles = ("query", "key", "value")
    tuner = vp.attach(zoo.model, vp.LoRA(rank=1, dropout=0.5, targets=" ".join(roles), tower="image"))
    seen: list[torch.Tensor] = []
    real = lowrank._mask
    lowrank._mask = lambda x, p, seed: seen.append(real(x, p, seed)) or seen[-1].clone()
    try:
        zoo.model.train()
        zoo.model.encode_image(zoo.image)
    finally:
        lowrank._mask = real
    assert len(seen) == len(tuner.sites)
    same = [torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i] if a.shape == b.shape]
    assert same and not any(same)
    assert {round(float(m.max()), 6) for m in seen} == {2.0}


def test_what_a_raw_tensor_cannot_host_is_refused_by_name():
    zoo = make("custom_block")
    before = snapshot(zoo.model)
    with pytest.raises(SiteError, match=r"resblocks.0.attn:query: .*dropout acts on an input: set dropout=0"):
        vp.attach(zoo.model, vp.LoRA(rank=1, dropout=0.1, targets="query"))
    assert_same(before, zoo.model)
    with pytest.raises(VisionPEFTError, match="SSF at visual:proj .*no bias to take beta"):
        vp.attach(zoo.model, vp.SSF(targets="projection"))
    assert_same(before, zoo.model)


def test_towers_are_told_and_unknown_ones_refused():
    zoo = make("vit")
    with pytest.raises(SiteError, match="tower='audio'.*image and text"):
        vp.attach(zoo.model, vp.LoRA(rank=1, tower="audio"))
    with pytest.raises(SiteError, match="no towers: use within="):
        vp.attach(nn.Sequential(nn.Linear(2, 2)), vp.LoRA(rank=1, targets="linear", tower="image"))
    with pytest.raises(SiteError, match="no site matches 'query'"):
        vp.attach(make("convnext").model, vp.LoRA(rank=1, targets="query", tower="image"))
    tuner = vp.attach(zoo.model, vp.methods.LNTuning(tower="text"))
    assert {s.path.split(".")[0] for s in tuner.sites} == {"transformer", "ln_final"}
    assert tuner.num_parameters == sum(p.numel() for n, p in zoo.model.named_parameters()
                                       if "ln_" in n and "visual" not in n)  # fmt: skip


def test_ssf_of_a_tower_is_its_share_of_ssf():
    """The text tower has no patch embedding, which the paper's targets name."""
    sites = {}
    for tower in (None, "image", "text"):
        model = make("vit").model
        sites[tower] = vp.attach(model, vp.SSF(tower=tower)).sites
    assert sites["image"] + sites["text"] == sites[None] and len(sites["text"]) == 2 * 8 + 1


def test_a_method_without_a_place_in_a_tower_is_an_error():
    model = make("vit").model
    with pytest.raises(SiteError, match="Convpass finds no block with a patch embedding"):
        vp.attach(model, vp.methods.Convpass(tower="text"))
    assert not vp.tuners(model)


def test_a_resting_adapter_lets_the_raw_tensor_be_the_original():
    zoo = make("vit")
    projection = zoo.model.visual.proj
    tuner = tune(zoo, "vit", targets="projection")
    assert zoo.model.visual.proj is not projection
    with tuner.disabled():
        assert zoo.model.visual.proj is projection
    tuner.scale = 0.0
    close(zoo.model.visual.proj, projection)
    tuner.detach()
    assert zoo.model.visual.proj is projection and type(zoo.model.visual) is open_clip.transformer.VisionTransformer


@pytest.mark.parametrize("method", [vp.methods.VPT, vp.methods.Rein])
def test_blocks_of_a_timm_trunk_take_what_they_take_in_timm_itself(method):
    """How many tokens stand before the patches is for the trunk to say."""
    zoo = make("siglip")
    trunk = copy.deepcopy(zoo.model.visual.trunk)
    with torch.no_grad():
        text = zoo.model.encode_text(zoo.text)
        torch.manual_seed(0)
        tuner, lone = vp.attach(zoo.model, method(tower="image")), vp.attach(trunk, method())
        assert len(tuner.sites) == len(lone.sites) > 1
        for mine, other in zip(tuner.parameters(), lone.parameters(), strict=True):
            mine.copy_(other.normal_())
        found = zoo.model.encode_image(zoo.image)
        close(found, zoo.model.visual.head(trunk(zoo.image)))
        assert torch.equal(zoo.model.encode_text(zoo.text), text)
        tuner.detach()
        assert (zoo.model.encode_image(zoo.image) - found).abs().max() > 1e-3


@pytest.mark.parametrize("name, tower", [("vit", "visual"), ("rn50", "visual"), ("siglip", "visual"),
                                         ("siglip", "text"), ("coca", "text")])  # fmt: skip
def test_a_tower_alone_is_probed_too(name, tower, recwarn):
    lone = getattr(make(name).model, tower)
    tuner = vp.attach(lone, vp.LoRA(rank=1, targets="linear"))
    assert len(tuner.sites) > 3 and not [w for w in recwarn if "liveness" in str(w.message)]


def test_unused_pooler_of_a_hugging_face_tower_is_a_dead_adapter():
    with pytest.raises(vp.DeadAdapterError, match="1 of .*text.transformer.pooler.dense"):
        vp.attach(make("roberta").model, vp.LoRA(rank=1, targets=ALL))


def test_ssf_on_a_pool_merges():
    zoo = make("rn50")
    tuner = vp.attach(zoo.model, vp.SSF(targets="visual.attnpool.*"))
    with torch.no_grad():
        adapted = zoo.model.encode_image(zoo.image)
        tuner.merge()
        close(zoo.model.encode_image(zoo.image), adapted)


@pytest.mark.parametrize("name", ["vit", "rn50", "custom_block"])
def test_copies_pickles_and_compiled_towers_do_the_same(name):
    zoo = make(name)
    tune(zoo, name)
    with torch.no_grad():
        adapted = zoo.features()
        for model in (copy.deepcopy(zoo.model), pickle.loads(pickle.dumps(zoo.model))):
            assert torch.equal(zoo._replace(model=model).features(), adapted)
        compiled = torch.compile(zoo.model.visual, backend="eager", fullgraph=True)
        close(compiled(zoo.image), adapted[:2])


@pytest.mark.parametrize("name", ["vit", "rn50"])
def test_autocast_keeps_the_dtype_of_the_frozen_model(name):
    zoo = make(name, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = zoo.model.encode_image(zoo.image)
        tune(zoo, name)
        assert zoo.model.encode_image(zoo.image).dtype == plain.dtype
