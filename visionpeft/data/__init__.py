"""Data sets by name, their splits, and what happens to an image before a model sees it.

    splits = load("vtab:cifar", root="~/vtab-1k")
    splits = load("torchvision:CIFAR10?train=1000&test=2000", root="~/data")
    transform = preprocessing(model).transform()
    train = splits.train_val.with_transform(transform)
"""

from __future__ import annotations

from visionpeft.data.images import read_image
from visionpeft.data.preprocessing import PROTOCOLS, Preprocessing, preprocessing
from visionpeft.data.registry import expand, load
from visionpeft.data.sets import ImageSet, Splits, check_num_classes
from visionpeft.data.weights import class_weights

__all__ = [
    "PROTOCOLS",
    "ImageSet",
    "Preprocessing",
    "Splits",
    "check_num_classes",
    "class_weights",
    "expand",
    "load",
    "preprocessing",
    "read_image",
]
