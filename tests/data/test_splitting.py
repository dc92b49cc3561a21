"""Draws are exact in size, class-balanced, disjoint and repeatable."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from pytest import raises

from visionpeft.data.sets import ArraySource, ImageSet
from visionpeft.data.splitting import balanced, complete, hold_out, subset
from visionpeft.errors import DataError

label_lists = st.lists(st.integers(0, 6), min_size=10, max_size=80)
seeds = st.integers(0, 5)


def make(labels, name="x"):
    labels = np.asarray(labels)
    return ImageSet(ArraySource(np.zeros((len(labels), 1, 1), np.uint8), name), labels)


def names(images):
    return [images.path(i) for i in range(len(images))]


@given(label_lists, seeds)
def test_hold_out_is_a_partition_with_a_fifth_of_every_class(labels, seed):
    images = make(labels)
    kept, held = hold_out(images, seed)
    assert sorted(names(kept) + names(held)) == sorted(names(images))
    counts = np.bincount(labels, minlength=7)
    held_counts = np.bincount(held.labels, minlength=7)
    assert (np.abs(held_counts - 0.2 * counts) <= 1).all()
    assert (np.bincount(kept.labels, minlength=7)[counts > 0] >= 1).all()
    if counts[counts > 0].min() >= 5:
        assert len(held) == round(0.2 * len(labels))


@given(label_lists, seeds, st.data())
def test_balanced_takes_exactly_n_and_levels_the_classes(labels, seed, data):
    total = data.draw(st.integers(1, len(labels)))
    drawn = balanced(make(labels), total, seed)
    assert len(set(names(drawn))) == total
    counts, drawn_counts = np.bincount(labels, minlength=7), np.bincount(drawn.labels, minlength=7)
    unfilled = drawn_counts[drawn_counts < counts]
    if len(unfilled):  # who is not taken whole has at most one less than anybody
        assert drawn_counts.max() - unfilled.min() <= 1
    assert names(drawn) == names(balanced(make(labels), total, seed))


def test_seed_changes_the_draw():
    images = make(np.arange(100) % 10)
    assert names(balanced(images, 50, 0)) != names(balanced(images, 50, 1))


def test_labels_follow_their_images():
    images = make(np.arange(100) % 7)
    drawn = balanced(images, 40, 3).take(np.arange(39, -1, -1))
    assert all(int(name[2:-1]) % 7 == label for name, label in zip(names(drawn), drawn.labels, strict=True))


def test_vtab_style_subset_leaves_the_test_set_alone():
    whole = complete("x", list("abcdefghij"), make(np.arange(3000) % 10, "train"), test=make(np.arange(50) % 10, "t"))
    part = subset(whole, train=1000, test=None, seed=0)
    assert (len(part.train), len(part.val), len(part.train_val)) == (800, 200, 1000)
    assert set(np.bincount(part.train.labels)) == {80} and set(np.bincount(part.val.labels)) == {20}
    assert sorted(names(part.train) + names(part.val)) == sorted(names(part.train_val))
    assert part.test is whole.test


def test_test_hold_out_is_the_same_for_every_seed_and_val_is_not():
    first, second = (complete("x", list("ab"), make(np.arange(100) % 2), seed=s) for s in (0, 1))
    assert names(first.test) == names(second.test) and names(first.val) != names(second.val)
    parts = [set(names(p)) for p in (first.train, first.val, first.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 100
    assert set(names(first.train_val)) == parts[0] | parts[1]


def test_a_given_validation_set_joins_train_val():
    splits = complete("x", list("ab"), make([0, 1], "t"), make([1, 0], "v"), make([0], "s"))
    assert names(splits.train_val) == ["t[0]", "t[1]", "v[0]", "v[1]"]
    assert splits.train_val.labels.tolist() == [0, 1, 1, 0]
    assert splits.train_val.take(np.array([3]))[0][0].size == (1, 1)


def test_parts_of_one_source_join_in_order():
    whole = make([0, 1, 0, 1, 0])
    splits = complete("x", list("ab"), whole.take(np.array([4, 1])), whole.take(np.array([0])), whole)
    assert names(splits.train_val) == ["x[4]", "x[1]", "x[0]"] and splits.train_val.labels.tolist() == [0, 1, 0]


def test_too_large_a_subset_is_an_error():
    with raises(DataError, match="subset of 11 .* 10 images"):
        balanced(make(np.arange(10)), 11, 0)


def test_multi_label_draws_are_disjoint():
    images = ImageSet(ArraySource(np.zeros((10, 1, 1), np.uint8), "m"), np.eye(10, 3, dtype=np.float32))
    kept, held = hold_out(images, 0)
    assert len(held) == 2 and not set(names(kept)) & set(names(held))
    assert len(balanced(images, 4, 0)) == 4
