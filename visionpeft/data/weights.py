"""Weights against class imbalance."""

from __future__ import annotations

import numpy as np
import torch

from visionpeft.errors import DataError


def class_weights(labels: np.ndarray, num_classes: int) -> torch.Tensor:
    """float32 [num_classes] for the loss.

    For labels int64 [N]: `N / (K n_c)` over the K classes that occur (`weight=` of cross-entropy), so that the mean
    weight of an image is 1; zero for a class that does not occur. For labels float32 [N, C]: negatives / positives
    (`pos_weight=` of binary cross-entropy), one where there is no positive.

    Raises:
        DataError: a label is out of range, or [N, C] does not fit `num_classes`.
    """
    if labels.ndim == 2:
        if labels.shape[1] != num_classes:
            raise DataError(f"labels have {labels.shape[1]} columns, not num_classes={num_classes}")
        positives = labels.sum(0)
        weights = np.where(positives > 0, (len(labels) - positives) / np.maximum(positives, 1), 1.0)
        return torch.tensor(weights, dtype=torch.float32)
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise DataError(f"labels span {labels.min()}..{labels.max()}, outside 0..{num_classes - 1}")
    return weights_of_counts(np.bincount(labels, minlength=num_classes))


def weights_of_counts(counts: np.ndarray) -> torch.Tensor:
    """float32 [C], `N / (K n_c)` over the K classes that occur, zero for the others: the mean weight of all N is 1."""
    present = max((counts > 0).sum(), 1)
    weights = np.where(counts > 0, counts.sum() / (present * np.maximum(counts, 1)), 0)
    return torch.tensor(weights, dtype=torch.float32)
