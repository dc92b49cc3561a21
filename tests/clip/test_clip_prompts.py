"""CoOp: what the learnt context replaces, where the name stands, how many numbers learn."""

from __future__ import annotations

import pytest
import tiny_clip
import torch
import torch.nn.functional as F
from tiny_clip import tokenizer

from visionpeft.clip import ClipError, zero_shot_weights
from visionpeft.clip.model import Clip
from visionpeft.clip.prompts import CoOp

CLASSES = ["cat", "grizzly bear", "sea_lion"]


def tiny(**text) -> Clip:
    model = tiny_clip.tiny(text={"layers": 2, **text}, dtype=torch.float64)
    return tiny_clip.clip(model.requires_grad_(False))


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("position, template", [("end", "a photo of a {}."), ("middle", "a photo {} of a."),
                                                ("front", "{} a photo of a.")])  # fmt: skip
def test_a_context_that_begins_with_words_is_the_prompt_of_these_words(position, template, per_class):
    clip = tiny()
    coop = CoOp(clip, CLASSES, init="a photo of a", position=position, per_class=per_class)
    found = coop()
    expected = zero_shot_weights(clip.model, tokenizer, CLASSES, [template])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    found.sum().backward()
    assert coop.context.grad.abs().amax(-1).all()
    assert coop.context.shape == ((3, 4, 16) if per_class else (4, 16))


def test_counts_and_start():
    clip = tiny(width=512, heads=8, layers=1)
    coop = CoOp(clip, CLASSES)
    assert sum(p.numel() for p in coop.parameters()) == 8_192
    assert sum(p.numel() for p in CoOp(clip, CLASSES, per_class=True).parameters()) == 3 * 8_192
    coop.requires_grad_(False)
    assert abs(float(coop.context.std()) - 0.02) < 0.001 and abs(float(coop.context.mean())) < 0.001


def test_the_same_context_serves_other_classes():
    clip = tiny()
    coop = CoOp(clip, CLASSES, init="a photo of a")
    with torch.no_grad():
        coop.context.add_(0.3 * torch.randn_like(coop.context))
    other = coop.name(["dog", "CLIP model"])()
    fresh = CoOp(clip, ["dog", "CLIP model"], init="a photo of a")
    fresh.load_state_dict(coop.state_dict())
    assert torch.equal(other, fresh())
    plain = zero_shot_weights(clip.model, tokenizer, ["dog"], ["a photo of a {}."])
    assert F.cosine_similarity(other[:, :1], plain, dim=0) < 0.9999


def test_what_cannot_be_is_refused_by_name():
    clip = tiny()
    with pytest.raises(ClipError, match="position='left': one of end, middle, front"):
        CoOp(clip, CLASSES, position="left")
    with pytest.raises(ClipError, match="more tokens than the context of 32"):
        CoOp(clip, CLASSES, tokens=30)
    with pytest.raises(ClipError, match="contexts of single classes"):
        CoOp(clip, CLASSES, tokens=2, per_class=True).name(["dog"])
