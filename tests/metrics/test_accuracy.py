"""Accuracy and mAP against scikit-learn and by hand."""

import pytest
import torch
from sklearn.metrics import average_precision_score

from visionpeft.errors import DataError
from visionpeft.metrics import metric_for

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchmetrics")


def test_accuracy_over_batches():
    metric = metric_for(3)
    logits = torch.eye(3)[[0, 0, 1, 1, 1]]
    metric.update(logits[:2], torch.tensor([0, 1]))
    metric.update(logits[2:], torch.tensor([1, 1, 1]))
    found = metric.compute()
    assert found["top1"] == pytest.approx(0.8)
    assert found["mean_per_class"] == pytest.approx((1 + 3 / 4) / 2)  # class 2 does not occur
    assert found["confusion"].tolist() == [[1, 0, 0], [1, 3, 0], [0, 0, 0]]
    metric.reset()
    metric.update(logits[:1], torch.tensor([0]))
    assert metric.compute()["top1"] == 1


def test_mean_average_precision_over_batches():
    torch.manual_seed(0)
    logits, labels = 40 * torch.randn(30, 4), (torch.rand(30, 4) > 0.6).float()
    labels[:, 3] = 0
    metric = metric_for(4, multi_label=True)
    for part in (slice(0, 11), slice(11, 30)):
        metric.update(logits[part], labels[part])
    found = metric.compute()
    expected = [average_precision_score(labels[:, c], logits[:, c]) for c in range(3)]
    assert found["per_class"][:3].tolist() == pytest.approx(expected, abs=1e-6)
    assert found["per_class"][3].isnan() and found["map"] == pytest.approx(sum(expected) / 3, abs=1e-6)


@pytest.mark.parametrize("multi_label", [False, True])
def test_nothing_and_nan_are_errors(multi_label):
    metric = metric_for(2, multi_label)
    with pytest.raises(DataError, match="never called"):
        metric.compute()
    labels = torch.zeros(1, 2) if multi_label else torch.zeros(1, dtype=torch.long)
    with pytest.raises(DataError, match="NaN"):
        metric.update(torch.tensor([[0.0, float("nan")]]), labels)
