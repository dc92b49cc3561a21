"""Images with a class for every pixel: what the values in mask files mean, and sets of image and mask."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from visionpeft.data.images import read_image
from visionpeft.data.sets import ImageSet
from visionpeft.errors import DataError, require

IGNORE = 255
"""Class of pixels that count for nothing, in every mask that this library hands out."""
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class MaskFormat:
    """How mask files say which class a pixel has.

    Attributes:
        classes: names, at most 255.
        values: the number that stands for each class; None means 0, 1, 2, ...
        ignore: numbers that mean no class.
        colours: for masks that are colour pictures, the colour of each class; palette pictures then go by colour too.
        ignored_colours: colours that mean no class.
    """

    classes: tuple[str, ...]
    values: tuple[int, ...] | None = None
    ignore: tuple[int, ...] = ()
    colours: tuple[Colour, ...] | None = None
    ignored_colours: tuple[Colour, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < len(self.classes) <= IGNORE:
            raise DataError(f"{len(self.classes)} classes: masks hold between 1 and {IGNORE}")
        if twice := [name for name in self.classes if self.classes.count(name) > 1]:
            raise DataError(f"two classes are called {twice[0]!r}: name them apart")
        if wrong := [v for v in (*self._values, *self.ignore) if not 0 <= v < 2**16]:
            raise DataError(f"mask value {wrong[0]}: expected 0..65535, what a mask file can hold")
        for what, given in (("values", self.values), ("colours", self.colours)):
            if given is not None and len(set(given)) != len(self.classes):
                raise DataError(f"{len(self.classes)} classes need as many different {what}, got {list(given)}")
        if both := set(self._values) & set(self.ignore):
            raise DataError(f"value {min(both)} is a class and ignored at once: change mask values or ignore index")

    @property
    def _values(self) -> Sequence[int]:
        return range(len(self.classes)) if self.values is None else self.values

    @cached_property
    def _table(self) -> np.ndarray:
        """Class of each value, -1 for those that mean nothing."""
        table = np.full(2**16, -1, np.int16)
        table[list(self.ignore)] = IGNORE
        table[list(self._values)] = np.arange(len(self.classes))
        return table

    def decode(self, pixels: np.ndarray, where: str) -> np.ndarray:
        """Classes uint8 [H, W] of numbers [H, W] or colours [H, W, 3]; IGNORE where there is none.

        Raises:
            DataError: a value or colour that stands for nothing; `where` is named.
        """
        if pixels.ndim == 3:
            return self._of_colours(pixels, where)
        found = self._table[pixels]
        if (found < 0).any():
            raise DataError(self._unknown(np.unique(pixels), where))
        return found.astype(np.uint8)

    def _unknown(self, values: np.ndarray, where: str) -> str:
        unknown = [int(v) for v in values if self._table[v] < 0]
        if set(values.tolist()) == {0, 255}:
            return f"{where}: holds 0 and 255 only, which are no class numbers: pass --mask-values 0 255"
        known = f"0..{len(self.classes) - 1}" if self.values is None else ", ".join(map(str, self.values))
        return (f"{where}: value {unknown[0]} is none of the classes {known}; pass --ignore-index {unknown[0]} if it "
                f"means no class, or --mask-values with the number of each class")

    def _of_colours(self, pixels: np.ndarray, where: str) -> np.ndarray:
        if self.colours is None:
            raise DataError(f"{where}: this mask is a colour picture: write the colour of each class into classes.txt, "
                            "as 'name red green blue'")
        flat, place = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True)
        table: dict[tuple[int, ...], int] = {c: IGNORE for c in self.ignored_colours}
        table |= {c: i for i, c in enumerate(self.colours)}
        found = [table.get(tuple(map(int, colour))) for colour in flat]
        if None in found:
            raise DataError(f"{where}: colour {tuple(flat[found.index(None)].tolist())} is not in classes.txt; masks "
                            "of class numbers need one without colours")
        return np.array(found, np.uint8)[place.reshape(pixels.shape[:2])]


def read_mask(source: str | os.PathLike[str] | bytes, where: str | None = None, colours: bool = False) -> np.ndarray:
    """The numbers uint8 or uint16 [H, W] in a mask file (palette pictures: the index), or its colours uint8 [H, W, 3].

    `colours` asks for these whatever the file is.

    Raises:
        DataError: the file is missing, truncated, or not an image.
    """
    image_module = require("PIL.Image", extra="train")
    where = where or ("mask" if isinstance(source, bytes) else os.fspath(source))
    try:
        with image_module.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.load()
            if colours or image.mode in ("RGB", "RGBA", "CMYK"):
                return np.asarray(image.convert("RGB"))
            pixels = np.asarray(image.convert("L") if image.mode in ("1", "LA") else image)
    except FileNotFoundError as error:
        raise DataError(f"{where}: no such mask file") from error
    except Exception as error:  # Pillow's decoders raise almost any type on damaged files
        raise DataError(f"{where}: cannot read this mask ({error}); replace or remove the file") from error
    if pixels.ndim != 2 or pixels.dtype.kind not in "ui" or pixels.min() < 0 or pixels.max() > 2**16 - 1:
        raise DataError(f"{where}: a mask holds whole numbers of 0 to 65535, or colours")
    return pixels


class MaskSource(Protocol):
    """A Source with masks."""

    def __len__(self) -> int: ...
    def image(self, index: int) -> Any: ...
    def size(self, index: int) -> tuple[int, int]: ...
    def mask(self, index: int) -> np.ndarray: ...
    def path(self, index: int) -> str: ...


@dataclass(frozen=True)
class PairFiles:
    """Image files and their mask files. Pixels are taken as stored: EXIF rotation would part them from the mask."""

    images: Sequence[str]
    masks: Sequence[str]
    format: MaskFormat

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Any:
        return read_image(self.images[index], exif=False)

    def size(self, index: int) -> tuple[int, int]:
        """Width and height of the image, from the head of its file."""
        try:
            with require("PIL.Image", extra="train").open(self.images[index]) as image:
                return image.size  # type: ignore[no-any-return]
        except Exception:  # what is wrong with it, reading says
            return read_image(self.images[index], exif=False).size

    def mask(self, index: int) -> np.ndarray:
        pixels = read_mask(self.masks[index], colours=self.format.colours is not None)
        return self.format.decode(pixels, self.masks[index])

    def path(self, index: int) -> str:
        return self.images[index]


@dataclass(frozen=True)
class PairArrays:
    """Images uint8 [N, H, W, 3] and masks uint8 [N, H, W] in memory."""

    pixels: np.ndarray
    masks: np.ndarray
    format: MaskFormat
    name: str

    def __len__(self) -> int:
        return len(self.pixels)

    def image(self, index: int) -> Any:
        return require("PIL.Image", extra="train").fromarray(self.pixels[index])

    def size(self, index: int) -> tuple[int, int]:
        return self.pixels.shape[2], self.pixels.shape[1]

    def mask(self, index: int) -> np.ndarray:
        return self.format.decode(self.masks[index], self.path(index))

    def path(self, index: int) -> str:
        return f"{self.name}[{index}]"


@dataclass(frozen=True)
class MaskedSet(ImageSet):
    """A torch Dataset of `(image, mask)`: PIL RGB and uint8 [H, W], or what `transform(image, mask)` makes of both.

    `labels` are zeros, as if all images were of one class: what draws subsets by class draws plainly.
    """

    source: MaskSource
    transform: Callable[..., Any] | None = None

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        stored = self._stored(index)
        image, mask = self.source.image(stored), self.mask(index)
        self._check_size(stored, image.size, mask)
        return (image, mask) if self.transform is None else self.transform(image, mask)

    def _check_size(self, stored: int, size: tuple[int, int], mask: np.ndarray) -> None:
        if mask.shape != size[::-1]:
            raise DataError(f"{self.source.path(stored)}: the image is {size[0]}x{size[1]} but its mask "
                            f"{mask.shape[1]}x{mask.shape[0]}; make both of one size")

    def check(self) -> None:
        """Read every mask, and of its image the size.

        Raises:
            DataError: a mask with values that mean nothing, or of another size than its image; it is named.
        """
        for index in range(len(self)):
            stored = self._stored(index)
            self._check_size(stored, self.source.size(stored), self.mask(index))

    def mask(self, index: int) -> np.ndarray:
        """uint8 [H, W] as stored, without the image."""
        return self.source.mask(self._stored(index))


def masked_set(source: MaskSource) -> MaskedSet:
    """All images of a source."""
    return MaskedSet(source, np.zeros(len(source), np.int64))


def pixel_counts(images: MaskedSet, num_classes: int) -> np.ndarray:
    """int64 [num_classes]: how many pixels of each class the masks of a set hold, ignored ones apart."""
    counts = np.zeros(IGNORE + 1, np.int64)
    for index in range(len(images)):
        counts += np.bincount(images.mask(index).ravel(), minlength=IGNORE + 1)
    return counts[:num_classes]
