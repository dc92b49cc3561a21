"""What the report of a classification run shows of its test set."""

from __future__ import annotations

from typing import Any

import numpy as np

from visionpeft.report import page, plots

SAMPLES = 24


def predictions(result: Any, predicted: np.ndarray, splits: Any) -> list[str]:
    """Confusion matrix and samples.

    Args:
        predicted: classes [N] of the test images.
    """
    labels, classes = splits.test.labels, splits.classes
    plain = splits.test.with_transform(None)
    # Spread over the test set, which may be sorted by class.
    chosen = np.linspace(0, len(labels) - 1, min(SAMPLES, len(labels))).astype(int)
    samples = [_sample(plain[int(i)][0], classes[labels[i]], classes[predicted[i]]) for i in chosen]
    drawn = [] if result.confusion is None else [page.figure(plots.confusion(np.array(result.confusion), classes))]
    return [page.heading("Test set"), *drawn, page.heading("Samples of the test set"), *samples]


def _sample(image: Any, true: str, predicted: str) -> str:
    right = true == predicted
    return page.figure(plots.picture(image), predicted if right else f"{predicted}, not {true}", wrong=not right)
