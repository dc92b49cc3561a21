"""Losses against open_clip's, gradients in pieces against the large batch, and the line of WiSE-FT, in float64."""

from __future__ import annotations

import copy

import open_clip
import pytest
import tiny_clip
import torch
import torch.nn.functional as F
from torch import nn

import visionpeft as vp
from visionpeft.clip import ClipError
from visionpeft.clip.losses import check_pieces, clip_loss, clipfit_loss, in_pieces, loss_of, siglip_loss
from visionpeft.clip.wise import interpolate


def tiny(bias: bool = False):
    text = dict(context_length=6, vocab_size=30)
    return tiny_clip.tiny(text=text, shake=0, dtype=torch.float64, init_logit_bias=-3.0 if bias else None)


def batch(n: int = 10):
    text = torch.randint(1, 29, (n, 6))
    text[:, -1] = 29
    return torch.randn(n, 3, 16, 16, dtype=torch.float64), text


def unit(n=7):
    return [F.normalize(torch.randn(n, 12, dtype=torch.float64), dim=1) for _ in range(2)]


def test_losses_are_those_of_open_clip():
    i, t = unit()
    scale, bias = torch.tensor(20.0, dtype=torch.float64), torch.tensor(-8.0, dtype=torch.float64)
    torch.testing.assert_close(clip_loss(i, t, scale), open_clip.loss.ClipLoss()(i, t, scale))
    torch.testing.assert_close(siglip_loss(i, t, scale, bias), open_clip.loss.SigLipLoss()(i, t, scale, bias))


def test_clipfit_loss_by_its_formula():
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    texts, frozen = torch.randn(3, 8), torch.randn(3, 8)
    away = sum(1 - float(a @ b / a.norm() / b.norm()) for a, b in zip(texts, frozen, strict=True)) / 3
    ce = sum(float(row.logsumexp(0) - row[y]) for row, y in zip(logits, labels, strict=True)) / 4
    assert float(clipfit_loss(logits, labels, texts, frozen, 2.0)) == pytest.approx(ce + 2 * away, rel=1e-5)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("size", [1, 3, 10])
def test_pieces_give_the_gradients_of_the_large_batch(kind, size):
    model = tiny(bias=True)
    vp.attach(model, vp.LoRA(rank=2, targets="query value mlp_in"), train="logit_scale logit_bias visual.proj")
    model.logit_bias.requires_grad_(kind == "siglip")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.1)
    images, text = batch()
    other = copy.deepcopy(model)

    def encode(m, x, y):
        return m.encode_image(x, normalize=True), m.encode_text(y, normalize=True)

    whole = loss_of(other, kind)(*encode(other, images, text))
    whole.backward()
    pieces = list(zip(images.split(size), text.split(size), strict=True))
    found = in_pieces(lambda x, y: encode(model, x, y), pieces, loss_of(model, kind))
    torch.testing.assert_close(found, whole.detach(), rtol=1e-12, atol=1e-12)
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert len(grads) > 10 and all(g is not None and g.any() for g in grads.values())
    for name, p in other.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(grads[name], p.grad, rtol=1e-10, atol=1e-13)


def test_dropout_draws_the_same_masks_in_both_passes():
    """One piece with dropout is the plain step with the same seed; afterwards the generator stands where it stood."""
    images, text = batch(4)
    model = tiny().train()
    vp.attach(model, vp.LoRA(rank=2, dropout=0.5, targets="query"))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1 * float(p.requires_grad))
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    loss_of(other, "clip")(other.encode_image(images, True), other.encode_text(text, True)).backward()
    state = torch.get_rng_state()
    torch.manual_seed(1)
    in_pieces(lambda x, y: (model.encode_image(x, True), model.encode_text(y, True)), [(images, text)],
              loss_of(model, "clip"))  # fmt: skip
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        if b.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-14)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_frozen_tower_needs_no_gradient():
    model = tiny()
    vp.attach(model, vp.LoRA(rank=2, targets="query", tower="image"))
    images, text = batch(4)
    pieces = list(zip(images.split(2), text.split(2), strict=True))
    in_pieces(lambda x, y: (model.encode_image(x, True), model.encode_text(y, True)), pieces, loss_of(model, "clip"))
    assert any(p.grad is not None for p in model.parameters())


def test_what_cannot_be_is_refused_by_name():
    with pytest.raises(ClipError, match="use clip or siglip"):
        loss_of(tiny(), "triplet")
    with pytest.raises(ClipError, match="needs a logit_bias"):
        loss_of(tiny(), "siglip")
    with pytest.raises(ClipError, match="^1 takes the statistics of its batch"):
        check_pieces(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    check_pieces(nn.Sequential(nn.BatchNorm1d(2)).eval())


@pytest.mark.parametrize("method", [vp.LoRA(rank=2, targets="linear projection"), vp.methods.LNTuning(),
                                    vp.methods.FullFineTuning()])  # fmt: skip
def test_scale_is_the_line_between_the_weights(method):
    model = tiny()
    images, text = batch(3)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    tuner = vp.attach(model, method)
    with torch.no_grad():
        for p in tuner.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
        tuner.merge()
        tuned = {k: v.clone() for k, v in model.state_dict().items()}
        tuner.unmerge()
        tuner.scale = 0.3
        found = torch.cat([model.encode_image(images), model.encode_text(text)])
        tuner.detach()
        model.load_state_dict(interpolate(start, tuned, 0.3))
        expected = torch.cat([model.encode_image(images), model.encode_text(text)])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_interpolation_copies_integers_and_refuses_other_keys():
    a, b = {"w": torch.zeros(2), "n": torch.tensor(1)}, {"w": torch.ones(2), "n": torch.tensor(5)}
    found = interpolate(a, b, 0.25)
    assert found["w"].tolist() == [0.25, 0.25] and int(found["n"]) == 5
    with pytest.raises(ClipError, match="1 tensors differ in name or shape, such as n"):
        interpolate({"w": torch.zeros(2)}, b, 0.5)
