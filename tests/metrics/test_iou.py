"""Mean IoU against scikit-learn, torchmetrics and counting by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, jaccard_score
from torchmetrics.classification import MulticlassJaccardIndex

from visionpeft.data.masks import IGNORE
from visionpeft.errors import DataError
from visionpeft.metrics import MeanIoU
from visionpeft.metrics.iou import scores_of

CLASSES = 6


def draw(images: int, seed: int, absent: tuple[int, ...] = ()) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions and masks [N, 9, 7] without some classes, a fifth of the masks ignored."""
    rng = np.random.default_rng(seed)
    occur = [c for c in range(CLASSES) if c not in absent]
    predicted, masks = (torch.from_numpy(rng.choice(occur, (images, 9, 7))) for _ in range(2))
    masks[torch.from_numpy(rng.random(masks.shape) < 0.2)] = IGNORE
    return predicted, masks


def accumulate(predicted: torch.Tensor, masks: torch.Tensor, sizes: list[int]) -> dict[str, object]:
    metric = MeanIoU(CLASSES)
    for part, mask in zip(predicted.split(sizes), masks.split(sizes), strict=True):
        metric.update(part, mask)
    return metric.compute()


@pytest.mark.parametrize("absent", [(), (0,), (2, 5)])
def test_it_is_what_scikit_learn_counts(absent: tuple[int, ...]) -> None:
    predicted, masks = draw(5, seed=1, absent=absent)
    found = accumulate(predicted, masks, [2, 1, 2])
    true, given = masks[masks != IGNORE].numpy(), predicted[masks != IGNORE].numpy()
    assert np.array_equal(found["confusion"], confusion_matrix(true, given, labels=range(CLASSES)))
    occur = [c for c in range(CLASSES) if c not in absent]
    expected = jaccard_score(true, given, labels=occur, average=None)
    assert np.allclose(found["per_class"][occur], expected, rtol=1e-12, atol=0)
    assert torch.isnan(found["per_class"][list(absent)]).all()
    assert found["mIoU"] == pytest.approx(expected.mean(), rel=1e-12)
    assert found["pixels"] == pytest.approx((true == given).mean(), rel=1e-12)


@pytest.mark.parametrize("absent", [(), (3,)])
def test_torchmetrics_own_index_agrees(absent: tuple[int, ...]) -> None:
    """Its macro average leaves out absent classes too, and its ignore_index takes those pixels away."""
    predicted, masks = draw(4, seed=2, absent=absent)
    oracle = MulticlassJaccardIndex(CLASSES, average="macro", ignore_index=IGNORE)
    assert accumulate(predicted, masks, [4])["mIoU"] == pytest.approx(float(oracle(predicted, masks)), abs=1e-6)


def test_by_hand() -> None:
    """Class 0: 2 of 3; class 1: 1 of 3; class 2 is predicted but never true: 0 of 1, and it counts."""
    predicted = torch.tensor([[[0, 0, 1, 2, 1]]])
    masks = torch.tensor([[[0, 0, 1, 1, IGNORE]]])
    found = accumulate(predicted, masks, [1])
    assert found["per_class"][:3].tolist() == [1.0, 0.5, 0.0] and torch.isnan(found["per_class"][3:]).all()
    assert found["mIoU"] == 0.5 and found["pixels"] == 0.75


def test_it_is_no_mean_over_images() -> None:
    """One image is all right, one of the same size all wrong: 2 of 6 pixels of each class, not the mean of 1 and 0."""
    masks = torch.tensor([[[0, 0, 1, 1]], [[0, 0, 1, 1]]])
    predicted = torch.tensor([[[0, 0, 1, 1]], [[1, 1, 0, 0]]])
    assert accumulate(predicted, masks, [1, 1])["mIoU"] == pytest.approx(1 / 3)


def test_nothing_but_ignored_pixels_has_no_score() -> None:
    with pytest.raises(DataError, match="no pixel"):
        scores_of(torch.zeros(3, 3, dtype=torch.long))
