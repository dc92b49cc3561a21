"""Scores against formulas written out, on numbers chosen so that every branch shows."""

from __future__ import annotations

import math

import pytest
import torch

from visionpeft.clip import ClipError
from visionpeft.clip.scores import classification_scores, retrieval_scores
from visionpeft.errors import DataError


def _ece(logits, labels, bins=15):
    """Sum over bins of (share of images in the bin) |accuracy - confidence|."""
    confidence, choice = logits.double().softmax(1).max(1)
    total = 0.0
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if inside.any():
            right = (choice == labels)[inside].double().mean()
            total += inside.double().mean() * (right - confidence[inside].mean()).abs()
    return float(total)


def test_classification_scores_by_their_formulas():
    logits = torch.randn(200, 7) * 2
    labels = torch.randint(0, 6, (200,))  # class 6 never occurs
    found = classification_scores(logits, labels)
    order = logits.argsort(1, descending=True)
    assert found["top1"] == pytest.approx(sum(int(order[i, 0] == labels[i]) for i in range(200)) / 200, abs=1e-7)
    assert found["top5"] == pytest.approx(sum(int(labels[i] in order[i, :5]) for i in range(200)) / 200, abs=1e-7)
    each = [float((order[labels == c, 0] == c).double().mean()) for c in range(6)]
    assert found["mean_per_class"] == pytest.approx(sum(each) / 6, abs=1e-6)
    assert found["ece"] == pytest.approx(_ece(logits, labels), abs=1e-6)
    assert found["mean_per_class"] != pytest.approx(found["top1"], abs=1e-4)


def test_top5_has_no_meaning_below_five_classes():
    found = classification_scores(torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1]))
    assert math.isnan(found["top5"])


@pytest.mark.parametrize(
    "logits, labels, message",
    [
        (torch.zeros(2, 3), torch.tensor([0, 3]), "labels reach from 0 to 3, but there are 3 classes"),
        (torch.zeros(2, 3), torch.tensor([0]), "2 rows of logits for 1 labels"),
        (torch.full((1, 3), float("nan")), torch.tensor([0]), "NaN"),
    ],
)
def test_bad_scores_are_refused(logits, labels, message):
    with pytest.raises(DataError, match=message):
        classification_scores(logits, labels)


def test_retrieval_by_counting():
    images, texts = torch.randn(12, 6), torch.randn(30, 6)
    images, texts = (torch.nn.functional.normalize(t, dim=1) for t in (images, texts))
    owner = torch.cat([torch.arange(12), torch.randint(0, 12, (18,))])
    found = retrieval_scores(images, texts, owner)
    similarity = images.double() @ texts.double().t()
    for k in (1, 5, 10):
        up = sum(bool((owner[similarity[i].argsort(descending=True)[:k]] == i).any()) for i in range(12)) / 12
        down = sum(int(owner[j]) in similarity[:, j].argsort(descending=True)[:k].tolist() for j in range(30)) / 30
        assert found[f"image_to_text_r@{k}"] == pytest.approx(up)
        assert found[f"text_to_image_r@{k}"] == pytest.approx(down)
    assert 0 < found["text_to_image_r@1"] < found["text_to_image_r@10"] < 1


def test_retrieval_that_means_nothing_is_refused():
    unit = torch.eye(10)
    with pytest.raises(ClipError, match="recall at 10 needs as many"):
        retrieval_scores(unit[:4], unit, torch.zeros(10, dtype=torch.long))
    with pytest.raises(DataError, match="features hold NaN"):
        retrieval_scores(unit, unit * float("nan"), torch.arange(10))
    with pytest.raises(ClipError, match="image 3 has no caption"):
        retrieval_scores(unit, unit, torch.tensor([0, 1, 2, 2, 4, 5, 6, 7, 8, 9]))
