"""Seeded, class-balanced draws: hold-outs and VTAB-style subsets.

Every draw uses numpy's PCG64, whose stream is the same on every platform.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from visionpeft.data.sets import ImageSet, Splits, join
from visionpeft.errors import DataError

HOLD_OUT = 0.2


def hold_out(images: ImageSet, seed: int, fraction: float = HOLD_OUT) -> tuple[ImageSet, ImageSet]:
    """`(kept, held)`: `fraction` of the images of every class is held out, and the fraction overall to the image.

    Each class keeps one image at least. Multi-label sets are drawn without regard to class.
    """
    total = round(fraction * len(images))
    if images.labels.ndim == 2:
        held = np.random.default_rng(seed).permutation(len(images))[:total]
    else:
        _, inverse, counts = np.unique(images.labels, return_inverse=True, return_counts=True)
        held = _draw(inverse, _shares(counts, total), seed)
    return images.take(np.setdiff1d(np.arange(len(images)), held)), images.take(np.sort(held))


def balanced(images: ImageSet, total: int, seed: int) -> ImageSet:
    """`total` images, as equal in number over the classes as the classes allow.

    Raises:
        DataError: there are fewer than `total` images.
    """
    if not 0 < total <= len(images):
        raise DataError(f"a subset of {total} was asked for, but there are {len(images)} images ({images.path(0)} ...)")
    if images.labels.ndim == 2:
        return images.take(np.sort(np.random.default_rng(seed).permutation(len(images))[:total]))
    _, inverse, counts = np.unique(images.labels, return_inverse=True, return_counts=True)
    return images.take(np.sort(_draw(inverse, _level(counts, total, seed), seed)))


def subset(splits: Splits, train: int | None, test: int | None, seed: int) -> Splits:
    """A fixed class-balanced part: of `train` images 80 % are train and 20 % val; `test` images of the test set."""
    if train is not None:
        whole = balanced(splits.train_val, train, seed)
        kept, held = hold_out(whole, seed)
        splits = replace(splits, train=kept, val=held, train_val=whole)
    return splits if test is None else replace(splits, test=balanced(splits.test, test, seed))


def complete(
    name: str,
    classes: list[str],
    train: ImageSet,
    val: ImageSet | None = None,
    test: ImageSet | None = None,
    *,
    seed: int = 0,
    group: str | None = None,
) -> Splits:
    """Splits from the parts that a source has.

    A missing test set is 20 % of train, the same for every seed, so that seeds stay comparable; a missing validation
    set is 20 % of what then remains, drawn by `seed`.
    """
    if test is None:
        train, test = hold_out(train, seed=0)
    if val is None:
        train_val = train
        train, val = hold_out(train, seed)
    else:
        train_val = join(train, val)
    return Splits(name, classes, group, train.labels.ndim == 2, train, val, train_val, test)


def _draw(class_of: np.ndarray, quota: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(class_of == c) for c in range(len(quota))]
    return np.concatenate([rng.permutation(m)[:q] for m, q in zip(members, quota, strict=True)])


def _shares(counts: np.ndarray, total: int) -> np.ndarray:
    """`total` in proportion to `counts` by largest remainder, leaving at least one of each class."""
    exact = counts * total / counts.sum()
    quota = np.minimum(np.floor(exact), counts - 1).astype(np.int64)
    for c in np.argsort(-(exact - quota), kind="stable"):
        if quota.sum() >= total:
            break
        quota[c] += quota[c] < counts[c] - 1
    return quota


def _level(counts: np.ndarray, total: int, seed: int) -> np.ndarray:
    """Equal quotas, small classes whole; what does not divide goes to classes chosen by `seed`."""
    quota = np.zeros_like(counts)
    order = np.random.default_rng(seed).permutation(len(counts))
    while quota.sum() < total:
        open_classes = order[quota[order] < counts[order]]
        step = max((total - int(quota.sum())) // len(open_classes), 1)
        for c in open_classes[: total - int(quota.sum())]:
            quota[c] += min(step, counts[c] - quota[c])
    return quota
