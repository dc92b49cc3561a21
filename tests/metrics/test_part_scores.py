"""mIoU of parts against counting with sets."""

from __future__ import annotations

import pytest
import torch

from visionpeft.errors import DataError
from visionpeft.metrics.parts import part_scores, shape_ious

OWNED = ((0, 1), (2, 3, 4), (5,))


def by_counting(predicted, parts, categories):
    ious = []
    for said, true, category in zip(predicted.tolist(), parts.tolist(), categories.tolist(), strict=True):
        each = []
        for part in OWNED[category]:
            a, b = ({i for i, v in enumerate(x) if v == part} for x in (said, true))
            each.append(len(a & b) / len(a | b) if a | b else 1.0)
        ious.append(sum(each) / len(each))
    return ious


def test_ious_of_shapes_and_their_means():
    generator = torch.Generator().manual_seed(0)
    categories = torch.tensor([0, 1, 1, 2, 0, 1])
    first, count = torch.tensor([0, 2, 5]), torch.tensor([2, 3, 1])
    draw = lambda: (torch.rand(6, 30, generator=generator) * count[categories, None]).long() + first[categories, None]  # noqa: E731
    parts, predicted = draw(), draw()
    parts[1], predicted[1] = 2, 2  # two parts that are nowhere count 1
    parts[2], predicted[2] = 2, 3  # one of which nothing is right, twice, and one that is nowhere
    ious = shape_ious(predicted, parts, categories, OWNED)
    expected = by_counting(predicted, parts, categories)
    assert ious.tolist() == pytest.approx(expected, abs=1e-15) and ious[1] == 1 and ious[2] == 1 / 3
    scores, each = part_scores(ious, categories, ("a", "b", "c"))
    assert scores["instance_mIoU"] == pytest.approx(sum(expected) / 6, abs=1e-15)
    means = [(expected[0] + expected[4]) / 2, (expected[1] + expected[2] + expected[5]) / 3, expected[3]]
    assert list(each.values()) == pytest.approx(means, abs=1e-15)
    assert scores["class_mIoU"] == pytest.approx(sum(means) / 3, abs=1e-15)


def test_categories_that_do_not_occur_do_not_count():
    parts = torch.tensor([[0, 1]])
    scores, each = part_scores(shape_ious(parts, parts, torch.tensor([0]), OWNED), torch.tensor([0]), ("a", "b", "c"))
    assert scores == {"instance_mIoU": 1.0, "class_mIoU": 1.0} and each == {"a": 1.0}
    with pytest.raises(DataError, match="no shape"):
        part_scores(torch.zeros(0), torch.zeros(0), ("a",))
