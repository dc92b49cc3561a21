"""Images with labels, whatever they are stored in, and the four parts that an experiment needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from visionpeft.data.images import read_image
from visionpeft.errors import DataError, require


class Source(Protocol):
    """Where the pixels of an ImageSet come from."""

    def __len__(self) -> int: ...
    def image(self, index: int) -> Any: ...
    def path(self, index: int) -> str: ...


@dataclass(frozen=True)
class FileSource:
    """Image files; `where[i]` is the list and line that names file i, for error messages."""

    paths: Sequence[str]
    where: Sequence[str] = ()
    exif: bool = False

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> Any:
        named = f"{self.paths[index]} (listed in {self.where[index]})" if self.where else self.paths[index]
        return read_image(self.paths[index], where=named, exif=self.exif)

    def path(self, index: int) -> str:
        return self.paths[index]


@dataclass(frozen=True)
class ArraySource:
    """Pixels in memory: uint8 [N, H, W] or [N, H, W, 3]."""

    pixels: np.ndarray
    name: str

    def __post_init__(self) -> None:
        if self.pixels.dtype != np.uint8 or self.pixels.ndim not in (3, 4):
            raise DataError(f"{self.name}: expected uint8 [N, H, W] or [N, H, W, 3], got "
                            f"{self.pixels.dtype} {list(self.pixels.shape)}")

    def __len__(self) -> int:
        return len(self.pixels)

    def image(self, index: int) -> Any:
        return require("PIL.Image", extra="train").fromarray(self.pixels[index]).convert("RGB")

    def path(self, index: int) -> str:
        return f"{self.name}[{index}]"


@dataclass(frozen=True)
class BytesSource:
    """Encoded images end to end in one uint8 array: image i is `data[offsets[i]:offsets[i + 1]]`."""

    data: np.ndarray
    offsets: np.ndarray
    name: str

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def image(self, index: int) -> Any:
        encoded = self.data[self.offsets[index] : self.offsets[index + 1]].tobytes()
        return read_image(encoded, where=self.path(index), exif=False)

    def path(self, index: int) -> str:
        return f"{self.name}[{index}]"


@dataclass(frozen=True)
class ImageSet(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """A torch Dataset of `(image, label)`.

    The image is PIL RGB, or what `transform` makes of it. `labels` is int64 [N], or float32 [N, C] where an image may
    have several classes; the label of an item is an int, or a float32 tensor [C].
    """

    source: Source
    labels: np.ndarray
    transform: Callable[[Any], Any] | None = None
    indices: np.ndarray | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if len(self.labels) != len(self):
            raise DataError(f"{len(self)} images but {len(self.labels)} labels in {self.source.path(0)}")

    def __len__(self) -> int:
        return len(self.source) if self.indices is None else len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image = self.source.image(self._stored(index))
        label = self.labels[index]
        return (
            image if self.transform is None else self.transform(image),
            torch.from_numpy(label.copy()) if self.labels.ndim == 2 else int(label),
        )

    def path(self, index: int) -> str:
        """What to call image `index` in a message: a file, or an array with its index."""
        return self.source.path(self._stored(index))

    def with_transform(self, transform: Callable[[Any], Any] | None) -> ImageSet:
        """The same images behind another transform."""
        return replace(self, transform=transform)

    def take(self, indices: np.ndarray) -> ImageSet:
        """The items at `indices`, in that order."""
        indices = np.asarray(indices, dtype=np.int64)
        stored = indices if self.indices is None else self.indices[indices]
        return replace(self, labels=self.labels[indices], indices=stored)

    def _stored(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index = index % len(self)
        return index if self.indices is None else int(self.indices[index])


def join(first: ImageSet, second: ImageSet) -> ImageSet:
    """Both sets, one after the other."""
    labels = np.concatenate([first.labels, second.labels])
    if first.source is second.source:
        stored = np.concatenate([_stored_indices(first), _stored_indices(second)])
        return replace(first, labels=labels, indices=stored)
    return replace(first, source=_Joined(first, second), labels=labels, indices=None)


def _stored_indices(images: ImageSet) -> np.ndarray:
    return np.arange(len(images)) if images.indices is None else images.indices


@dataclass(frozen=True)
class _Joined:
    first: ImageSet
    second: ImageSet

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def image(self, index: int) -> Any:
        images, index = self._find(index)
        return images.source.image(images._stored(index))

    def mask(self, index: int) -> Any:
        images, index = self._find(index)
        return images.source.mask(images._stored(index))  # type: ignore[attr-defined]

    def path(self, index: int) -> str:
        images, index = self._find(index)
        return images.path(index)

    def _find(self, index: int) -> tuple[ImageSet, int]:
        return (self.first, index) if index < len(self.first) else (self.second, index - len(self.first))


@dataclass(frozen=True)
class Splits:
    """One data set. Choose on `val` after training on `train`; then train on `train_val` and touch `test` once."""

    name: str
    classes: list[str]
    group: str | None
    multi_label: bool
    train: ImageSet
    val: ImageSet
    train_val: ImageSet
    test: ImageSet

    def __post_init__(self) -> None:
        for part in ("train", "val", "train_val", "test"):
            self._check_part(part, getattr(self, part))

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def _check_part(self, part: str, images: ImageSet) -> None:
        if not len(images):
            raise DataError(f"{self.name}: the {part} split is empty")
        if self.multi_label:
            if images.labels.ndim != 2 or images.labels.shape[1] != self.num_classes:
                raise DataError(f"{self.name}: {part} labels are {list(images.labels.shape)}, expected "
                                f"[N, {self.num_classes}]")
            return
        wrong = np.flatnonzero((images.labels < 0) | (images.labels >= self.num_classes))
        if len(wrong):
            raise DataError(f"{self.name}: {images.path(int(wrong[0]))} in {part} has label "
                            f"{images.labels[wrong[0]]}, outside 0..{self.num_classes - 1}")


def check_num_classes(splits: Splits, num_classes: int) -> None:
    """Refuse a head of another size than the data.

    Raises:
        DataError: naming both numbers.
    """
    if splits.num_classes != num_classes:
        raise DataError(f"the model has {num_classes} outputs but {splits.name} has {splits.num_classes} classes; "
                        f"create the model with num_classes={splits.num_classes}, or call reset_classifier")


def existing(path: str | Path, what: str) -> Path:
    """`path`, if there is something there.

    Raises:
        DataError: naming the path.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise DataError(f"{path}: {what} not found; check the path, or give root=")
    return path
