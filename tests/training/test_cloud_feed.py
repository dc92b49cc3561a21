"""Clouds sampled once, and augmentations that are functions of seed, epoch and cloud."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from visionpeft.data.clouds import CloudArray
from visionpeft.data.sets import ImageSet
from visionpeft.models.point_ops import farthest_points, take
from visionpeft.training.clouds import AugmentError, CloudFeed, augmented, drawn_from, ordered

CLOUDS = np.random.default_rng(0).normal(size=(7, 30, 3)).astype(np.float32)


def clouds(count: int = 7, points: int = 30) -> ImageSet:
    return ImageSet(CloudArray(CLOUDS[:count, :points], "clouds", scaled=False), np.arange(count))


def test_the_first_points_are_the_farthest_whatever_the_number():
    found = ordered(clouds(), 20, batch=3)
    for n in (1, 8, 20):
        points = torch.from_numpy(CLOUDS)
        assert torch.equal(found[:, :n], take(points, farthest_points(points, n)))


def test_small_clouds_begin_again():
    found = ordered(clouds(2, 5), 12)
    assert torch.equal(found[:, 5:10], found[:, :5]) and torch.equal(found[:, 10:], found[:, :2])


def test_clouds_of_different_sizes():
    class Ragged:
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return CLOUDS[i, : 20 + i % 2], 0

    found = ordered(Ragged(), 10)
    for i in range(4):
        cloud = torch.from_numpy(CLOUDS[i : i + 1, : 20 + i % 2])
        assert torch.equal(found[i], take(cloud, farthest_points(cloud, 10))[0])


def test_numbers_that_training_samples_are_drawn_from():
    assert [drawn_from(n) for n in (512, 1024, 2048)] == [614, 1200, 2400]


@pytest.mark.parametrize("kind", ["scale_translate", "rotate", "none"])
def test_draws_depend_on_seed_epoch_and_cloud_alone(kind):
    feed = CloudFeed(ordered(clouds(), 20), torch.arange(7), 16, kind)
    (together, targets), = feed.batches([[5, 2, 0]], 1, 3)
    alone = [next(iter(feed.batches([[i]], 1, 3)))[0][0] for i in (5, 2, 0)]
    assert torch.equal(together, torch.stack(alone)) and targets.tolist() == [5, 2, 0]
    others = [next(iter(feed.batches([[5]], *at)))[0][0] for at in ((2, 3), (1, 4))]
    assert not any(torch.equal(together[0], other) for other in others)
    twins = CloudFeed(feed.clouds[:1].expand(2, -1, -1), feed.targets[:2], 16, kind)
    one, two = next(iter(twins.batches([[0, 1]], 1, 3)))[0]
    assert not torch.equal(one, two)
    plain = CloudFeed(feed.clouds, feed.targets, 16)
    assert torch.equal(next(iter(plain.batches([[5, 2]], 9, 9)))[0], feed.clouds[[5, 2], :16])


def test_points_are_drawn_without_return_and_changed_as_a_whole():
    cloud = torch.from_numpy(CLOUDS[0])
    drawn = augmented(cloud, 16, "none", 4)
    index = [int((cloud == p).all(1).nonzero()) for p in drawn]
    assert len(set(index)) == 16 and index != sorted(index)
    assert len(augmented(cloud[:5], 16, "none", 0)) == 5
    scaled, source = augmented(cloud, 16, "scale_translate", 4), cloud[torch.tensor(index)]
    for axis in range(3):
        slope, shift = np.polyfit(source[:, axis].double(), scaled[:, axis].double(), 1)
        assert 2 / 3 <= slope <= 3 / 2 and -0.2 <= shift <= 0.2
        np.testing.assert_allclose(slope * source[:, axis] + shift, scaled[:, axis], atol=1e-5)
    turned = augmented(cloud, 16, "rotate", 4)
    torch.testing.assert_close(turned.norm(dim=1), source.norm(dim=1))
    assert torch.equal(turned[:, 1], source[:, 1]) and not torch.allclose(turned[:, 0], source[:, 0])


def test_misspelt_augmentations_are_named():
    with pytest.raises(AugmentError, match="rotat.*scale_translate"):
        CloudFeed(torch.zeros(1, 2, 3), torch.zeros(1), 2, "rotat")


def test_fixed_clouds_are_those_of_evaluation_in_every_epoch():
    many = ordered(clouds(), 20)
    feeds = [CloudFeed(many, torch.arange(7), 16, kind) for kind in ("fixed", None)]
    (fixed, plain) = (next(iter(feed.batches([[5, 2]], seed, 3)))[0] for seed, feed in enumerate(feeds))
    assert torch.equal(fixed, plain)
