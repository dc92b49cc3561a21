"""torchvision's v2 transforms of an image and its mask together; imported only when one is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from visionpeft.data.masks import IGNORE
from visionpeft.data.preprocessing import Preprocessing
from visionpeft.errors import DataError, require

if TYPE_CHECKING:
    from torchvision import tv_tensors
    from torchvision.transforms import v2
else:
    v2 = require("torchvision.transforms.v2", extra="train")
    tv_tensors = require("torchvision.tv_tensors", extra="train")

AUGMENTATIONS = ("crop", "flip", "scale", "colour")
SCALES = (0.5, 2.0)


@dataclass(frozen=True)
class Together:
    """(PIL RGB, uint8 [H, W]) -> (float32 [3, H', W'], int64 [H', W'])."""

    geometry: Any
    to_tensor: Any

    def __call__(self, image: Any, mask: np.ndarray) -> tuple[Tensor, Tensor]:
        both = self.geometry(tv_tensors.Image(v2.functional.pil_to_tensor(image)),
                             tv_tensors.Mask(torch.from_numpy(np.ascontiguousarray(mask))))
        return self.to_tensor(both[0]), both[1].as_subclass(Tensor).long()


def together(spec: Preprocessing, side: int | None = None, augment: str | None = None) -> Together:
    """What turns an image and its mask into tensors.

    Without a side the whole image, as it is. With one, crops of `side` x `side`: from the centre, or as `augment` says,
    each of which includes those before it: "crop" from anywhere, "flip" left and right, "scale" by 0.5 to 2, "colour"
    jitter. What reaches beyond the image is black there and ignored in the mask.

    Raises:
        DataError: unknown augmentation.
    """
    if augment not in (None, *AUGMENTATIONS):
        raise DataError(f"unknown augmentation {augment!r}: use one of {', '.join(AUGMENTATIONS)}, or None")
    to_tensor = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(spec.mean, spec.std),
                            v2.ToPureTensor()])
    return Together(v2.Compose([] if side is None else _crops(side, augment)) if side else _as_it_is, to_tensor)


def _as_it_is(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return image, mask


def _crops(side: int, augment: str | None) -> list[Any]:
    fill = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORE}
    if augment is None:
        return [_PadTo(side, fill), v2.CenterCrop(side)]
    level = AUGMENTATIONS.index(augment)
    steps: list[Any] = [v2.RandomCrop(side, pad_if_needed=True, fill=fill)]
    if level >= AUGMENTATIONS.index("flip"):
        steps.append(v2.RandomHorizontalFlip())
    if level >= AUGMENTATIONS.index("scale"):
        steps.insert(0, _RandomScale(SCALES))
    if level >= AUGMENTATIONS.index("colour"):
        steps.append(v2.ColorJitter(0.4, 0.4, 0.4))
    return steps


class _PadTo(v2.Transform):  # type: ignore[misc]
    """Pad both sides to at least `side`, evenly."""

    def __init__(self, side: int, fill: dict[Any, int]) -> None:
        super().__init__()
        self.side, self.fill = side, fill

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        (height, width), side = inpt.shape[-2:], self.side
        above, left = max(side - height, 0) // 2, max(side - width, 0) // 2
        below, right = max(side - height, 0) - above, max(side - width, 0) - left
        return v2.functional.pad(inpt, [left, above, right, below], fill=self.fill[type(inpt)])


class _RandomScale(v2.Transform):  # type: ignore[misc]
    """Resize by a factor drawn evenly on a log scale, the mask by nearest neighbours."""

    def __init__(self, scales: tuple[float, float]) -> None:
        super().__init__()
        self.scales = scales

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        low, high = self.scales
        factor = low * (high / low) ** float(torch.rand(()))
        return {"size": [max(round(side * factor), 1) for side in flat_inputs[0].shape[-2:]]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return v2.functional.resize(inpt, params["size"], antialias=True)
