"""How sites are chosen, and what is said when none is."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import Net, vit
from torch import nn

import visionpeft as vp
from visionpeft.errors import SiteError
from visionpeft.sites import KINDS, ROLES, Backbone
from visionpeft.targets import choose_among

BACKBONE = Backbone(vit())
SITES = BACKBONE.sites()


def chosen(targets, within=None, exclude=None) -> list[str]:
    return [str(s) for s in choose_among(SITES, targets, within, exclude)]


def test_roles_kinds_globs_and_mixtures():
    assert chosen("query") == ["blocks.0.attn.qkv:query", "blocks.1.attn.qkv:query"]
    assert chosen("blocks.*.mlp.fc1") == ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]
    assert chosen("value blocks.1.mlp.fc2 patch_embed") == [
        "patch_embed.proj", "blocks.0.attn.qkv:value", "blocks.1.attn.qkv:value", "blocks.1.mlp.fc2"
    ]  # fmt: skip
    assert chosen("blocks.0.attn.qkv") == ["blocks.0.attn.qkv"]  # the whole Linear, once, with one shared A
    assert chosen("norm") == [f"{p}.norm{i}" for p in ("blocks.0", "blocks.1") for i in (1, 2)] + ["norm"]


def test_linear_takes_whole_modules_and_leaves_the_classifier():
    found = chosen("linear")
    assert len(found) == 8 and not any(":" in s for s in found) and "head" not in found
    assert chosen("head") == ["head"]


def test_predicates_see_every_part():
    assert chosen(lambda s: s.role == "key" and s.path.startswith("blocks.1")) == ["blocks.1.attn.qkv:key"]
    assert len(chosen(lambda s: True)) == len(SITES)


def test_within_and_exclude_narrow():
    assert chosen("query", within="blocks.1.*") == ["blocks.1.attn.qkv:query"]
    assert chosen("linear", exclude="*.mlp.*") == [f"blocks.{i}.attn.{n}" for i in (0, 1) for n in ("qkv", "proj")]
    both = chosen("query key", within="blocks.*", exclude="blocks.0.*")
    assert both == ["blocks.1.attn.qkv:query", "blocks.1.attn.qkv:key"]


@pytest.mark.parametrize(
    ("targets", "within", "named"),
    [("keys", None, "keys"), ("query blocks.7.*", None, "blocks.7"), ("", None, "''"), ("query", "nothing.*", "query"),
     (lambda s: False, None, "predicate")],
)  # fmt: skip
def test_no_match_says_which_word_and_lists_roles_and_paths(targets, within, named):
    with pytest.raises(SiteError) as error:
        chosen(targets, within)
    assert named in str(error.value)
    if within is None:
        assert "query" in str(error.value) and "mlp_in" in str(error.value) and "blocks." in str(error.value)


WORDS = st.sampled_from(["query", "value", "mlp_in", "norm", "linear", "blocks.*.attn.proj", "blocks.0.*", "head"])


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=5), st.randoms())
def test_order_and_repetition_of_words_do_not_matter(words, random):
    shuffled = [*words, random.choice(words)]
    random.shuffle(shuffled)
    found = chosen(" ".join(words))
    assert found == chosen(" ".join(shuffled))
    assert len(set(found)) == len(found)
    union = {s for word in words for s in chosen(word)}
    assert set(found) == union and found == [str(s) for s in SITES if str(s) in union]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["linear", "norm", "query key"]), st.sampled_from("* blocks.* *.mlp.* blocks.1.* norm".split()))
def test_within_and_exclude_split_the_choice(targets, glob):
    def safe(**kw):
        try:
            return chosen(targets, **kw)
        except SiteError:
            return []

    inside, outside = safe(within=glob), safe(exclude=glob)
    if len(targets.split()) == 1 or (inside and outside):
        assert sorted(inside + outside) == sorted(chosen(targets))
    assert all(fnmatchcase(s.split(":")[0], glob) for s in inside)


def test_every_role_and_kind_of_a_site_is_a_known_word():
    assert {s.role for s in SITES} <= {*ROLES, ""} and {s.kind for s in SITES} <= set(KINDS)


def test_inspect_prints_a_table():
    lines = repr(vp.inspect(vit())).splitlines()
    assert lines[0].split() == ["path", "part", "role", "kind", "shape", "called"]
    assert len(lines) == len(SITES) + 1
    assert any(line.split() == ["blocks.0.attn.qkv", "key", "key", "linear", "48x48", "yes"] for line in lines)


def test_inspect_shows_bypassed_sites_and_unknown_modules_by_plain_paths():
    assert {s.called for s in vp.inspect(nn.MultiheadAttention(8, 2))} == {False}
    assert [(s.path, s.role, s.kind) for s in vp.inspect(Net())] == [
        ("fc1", "", "linear"), ("norm", "norm", "norm"), ("fc2", "", "linear"), ("head", "head", "linear")
    ]  # fmt: skip


def test_inspect_of_an_adapted_model_is_that_of_the_plain_one():
    model = vit()
    before = repr(vp.inspect(model))
    vp.attach(model, vp.LoRA(rank=2, targets="linear"), name="a", train="head")
    vp.attach(model, vp.AdaptFormer(), name="b")
    assert repr(vp.inspect(model)) == before


def test_expected_errors_of_methods():
    model = vit()
    with pytest.raises(SiteError, match=r"rank 49 is above the 48 x 48 matrix.*at most 48.*1 more site"):
        vp.attach(model, vp.LoRA(rank=49, targets="query", within="blocks.*"))
    with pytest.raises(SiteError, match="LoRA cannot act at blocks.0.norm1.*norm"):
        vp.attach(model, vp.LoRA(targets="norm"))
    with pytest.raises(SiteError, match="AdaptFormer"):
        vp.attach(model, vp.AdaptFormer(targets="linear"))
    with pytest.raises(vp.VisionPEFTError, match="no method 'lorra'.*lora"):
        vp.attach(model, "lorra")
    with pytest.raises(SiteError, match="nn.Module"):
        vp.attach("model", "lora")
    assert not torch.is_tensor(vp.tuners(model)) and vp.tuners(model) == {}
