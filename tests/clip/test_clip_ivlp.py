"""Prompts in both towers against hooks on open_clip's own forward; PromptSRC's loss and average by their formulas."""

from __future__ import annotations

import copy
import logging
import math

import open_clip
import pytest
import tiny_clip
import torch
import torch.nn.functional as F
from tiny_clip import tokenizer

from visionpeft.clip import ClipError, zero_shot_weights
from visionpeft.clip.ivlp import IVLP, gaussian_weights
from visionpeft.clip.losses import promptsrc_loss
from visionpeft.clip.model import Clip
from visionpeft.clip.stepping import EpochAverage

CLASSES = ["cat", "grizzly bear", "sea_lion"]


def tiny(**vision) -> Clip:
    model = tiny_clip.tiny({"layers": 3, **vision}, {"layers": 3, "width": 24}, dtype=torch.float64)
    return tiny_clip.clip(model.requires_grad_(False))


def learn(clip: Clip, **fields) -> IVLP:
    ivlp = IVLP(clip, CLASSES, **fields)
    with torch.no_grad():
        for p in ivlp.parameters():
            p.add_(torch.randn_like(p))
    return ivlp


def hooked(modules, changes):
    """Hooks that change the first input of each module."""
    return [m.register_forward_pre_hook(lambda _, args, c=c: (c(args[0]), *args[1:]))
            for m, c in zip(modules, changes, strict=True)]  # fmt: skip


@pytest.mark.parametrize("depth", [1, 2, 3, 9])
@pytest.mark.parametrize("vision", [{}, {"no_ln_pre": True}, {"pool_type": "avg"}])
def test_images_see_what_hooks_on_open_clips_own_forward_would_put_in(depth, vision):
    clip = tiny(**vision)
    ivlp, pixels = learn(clip, depth=depth), torch.randn(5, 3, 16, 16, dtype=torch.float64)
    found = ivlp.image(pixels)
    visual, prompts = clip.model.visual, [p.expand(5, -1, -1) for p in ivlp.visual]
    assert len(prompts) == min(depth, 3)
    blocks = visual.transformer.resblocks
    changes = [lambda x: torch.cat([x, prompts[0]], 1)]  # before ln_pre, as in the official code
    changes += [lambda x, p=p: torch.cat([x[:, :-4], p], 1) for p in prompts[1:]]
    hooks = hooked([visual.ln_pre, *blocks[1 : len(prompts)]], changes)
    if vision.get("pool_type") == "avg":  # the prompts are none of the image's tokens
        hooks += hooked([visual.ln_post], [lambda x: x[:, :-4]])
    expected = clip.model.encode_image(pixels, normalize=True)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert (found - clip.model.encode_image(pixels, normalize=True)).abs().max() > 1e-2


@pytest.mark.parametrize("depth", [1, 2, 3, 9])
def test_texts_see_what_hooks_on_open_clips_own_forward_would_put_in(depth):
    clip = tiny()
    ivlp = learn(clip, depth=depth)
    prompts = [ivlp.first.context, *ivlp.text]
    assert len(prompts) == min(depth, 3)
    changes = [lambda x, p=p: torch.cat([x[:, :1], p.expand(3, -1, -1), x[:, 5:]], 1) for p in prompts[1:]]
    hooks = hooked(clip.model.transformer.resblocks[1 : len(prompts)], changes)
    embed = clip.model.token_embedding
    hooks += [embed.register_forward_hook(
        lambda m, i, y: torch.cat([y[:, :1], prompts[0].expand(3, -1, -1), y[:, 5:]], 1))]  # fmt: skip
    ids = tokenizer([f"a photo of a {c.replace('_', ' ')}." for c in CLASSES])
    expected = clip.model.encode_text(ids, normalize=True).t()
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(ivlp(), expected, rtol=0, atol=1e-12)
    assert (expected - zero_shot_weights(clip.model, tokenizer, CLASSES, ["a photo of a {}."])).abs().max() > 1e-2


def test_it_begins_with_the_words_and_learns_alone():
    clip = tiny()
    before = copy.deepcopy(clip.model.state_dict())
    shallow = IVLP(clip, CLASSES, depth=1)
    torch.testing.assert_close(shallow(), zero_shot_weights(clip.model, tokenizer, CLASSES, ["a photo of a {}."]),
                               rtol=0, atol=1e-12)  # fmt: skip
    ivlp = IVLP(clip, CLASSES)
    (ivlp.image(torch.randn(2, 3, 16, 16, dtype=torch.float64)) @ ivlp()).square().sum().backward()
    assert all(p.grad.abs().amax(-1).all() for p in ivlp.parameters())
    assert [n for n, _ in ivlp.named_parameters()] == ["text", "visual", "first.context"]
    after = clip.model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], v) for k, v in before.items())
    assert all(p.grad is None for p in clip.model.parameters())


def test_count_on_the_papers_model():
    logging.disable(logging.WARNING)
    with torch.device("meta"):
        model = open_clip.create_model("ViT-B-16", pretrained=None, device="meta")
    logging.disable(logging.NOTSET)
    ivlp = IVLP(Clip(model, open_clip.get_tokenizer("ViT-B-16"), None, "b16"), CLASSES)
    assert sum(p.numel() for p in ivlp.parameters()) == 46_080


def test_other_classes_take_the_same_prompts():
    clip = tiny()
    ivlp = learn(clip)
    alone = IVLP(clip, ["dog"])
    alone.load_state_dict(ivlp.state_dict())
    assert torch.equal(ivlp.name(["dog"])(), alone())


def test_towers_without_such_blocks_are_refused_by_name():
    model = tiny_clip.tiny(dict(layers=(1, 1, 1, 1), width=8, image_size=64))
    with pytest.raises(ClipError, match="prompts in the image tower need open_clip's transformer, not NoneType"):
        IVLP(tiny_clip.clip(model), CLASSES)
    with pytest.raises(ClipError, match="tokens=4, depth=0: expected at least 1"):
        IVLP(tiny(), CLASSES, depth=0)


def test_promptsrc_loss_by_its_formula():
    g = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    logits, frozen, labels = draw(4, 3), draw(4, 3), torch.tensor([0, 2, 1, 1])
    texts, frozen_texts, images, frozen_images = draw(3, 8), draw(3, 8), draw(4, 8), draw(4, 8)
    found = promptsrc_loss(logits, labels, texts, frozen_texts, images, frozen_images, frozen)
    p, q = logits.softmax(1), frozen.softmax(1)
    expected = -sum(math.log(p[i, y]) for i, y in enumerate(labels)) / 4
    expected += 25 * sum(abs(float(d)) for d in (texts - frozen_texts).flatten()) / 24
    expected += 10 * sum(abs(float(d)) for d in (images - frozen_images).flatten()) / 32
    expected += sum(float(q[i, c]) * math.log(q[i, c] / p[i, c]) for i in range(4) for c in range(3)) / 12
    assert float(found) == pytest.approx(expected, rel=1e-12)
    assert float(promptsrc_loss(logits, labels, texts, texts, images, images, logits)) == pytest.approx(
        float(F.cross_entropy(logits, labels)), rel=1e-12)  # fmt: skip


@pytest.mark.parametrize("epochs, mean, deviation", [(20, 15, 1), (50, 30, 30), (50, 45, 5), (1, 0.75, 0.01)])
def test_weights_of_the_epochs_are_a_gaussians(epochs, mean, deviation):
    found = gaussian_weights(epochs, mean, deviation)
    density = [math.exp(-((e - mean) ** 2) / (2 * deviation**2)) for e in range(1, epochs + 1)]
    assert len(found) == epochs and sum(found) == pytest.approx(1, abs=1e-12)
    if sum(density):
        assert found == pytest.approx([d / sum(density) for d in density], rel=1e-12)


def test_the_average_is_over_the_ends_of_epochs_and_the_rest_of_one():
    module = torch.nn.Linear(2, 3)
    module.bias.requires_grad_(False)
    average, seen = EpochAverage([0.2, 0.5, 0.3], per_epoch=2), []
    bias = module.bias.clone()
    for done in range(1, 6):
        with torch.no_grad():
            module.weight.normal_()
        seen.append(module.weight.detach().double())
        average.add(module, done, last=done == 5)
    average.put(module)
    expected = 0.2 * seen[1] + 0.5 * seen[3] + 0.3 * seen[4]
    torch.testing.assert_close(module.weight.detach().double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(module.bias, bias)
