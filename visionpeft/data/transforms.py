"""torchvision's v2 transforms for a Preprocessing; imported only when one is built."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from visionpeft.data.preprocessing import AUGMENTATIONS, Preprocessing, before_crop
from visionpeft.errors import DataError, require

if TYPE_CHECKING:
    from torchvision.transforms import v2
else:
    v2 = require("torchvision.transforms.v2", extra="train")


def build(spec: Preprocessing, augment: str | None) -> Any:
    """PIL RGB -> float32 [3, H, W].

    Raises:
        DataError: unknown augmentation.
    """
    if augment not in (None, *AUGMENTATIONS):
        raise DataError(f"unknown augmentation {augment!r}: use one of {', '.join(AUGMENTATIONS)}, or None")
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(spec.mean, spec.std)]
    erase = [v2.RandomErasing(p=0.25)] if augment == "randaugment" else []
    return v2.Compose([*_geometry(spec, augment), *to_tensor, *erase, v2.ToPureTensor()])


def _geometry(spec: Preprocessing, augment: str | None) -> list[Any]:
    mode = v2.InterpolationMode(spec.interpolation)
    if augment in ("resized_crop", "randaugment"):
        crop = [v2.RandomResizedCrop(spec.size, interpolation=mode, antialias=True), v2.RandomHorizontalFlip()]
        return crop if augment == "resized_crop" else [*crop, v2.RandAugment(), v2.ColorJitter(0.4, 0.4, 0.4)]
    sides = before_crop(spec.size, spec.crop_pct)
    resize = v2.Resize(list(sides) if spec.resize == "squash" else max(sides), interpolation=mode, antialias=True)
    crop = v2.RandomCrop(spec.size) if augment == "crop" else v2.CenterCrop(spec.size)
    return [resize, crop] if augment is None else [resize, crop, v2.RandomHorizontalFlip()]
