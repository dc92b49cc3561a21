"""Data sets that are arrays: npz files, Fashion-MNIST's idx files, scikit-learn's digits, the bundled set."""

from __future__ import annotations

import gzip
import importlib.resources
import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from visionpeft.data.sets import ArraySource, BytesSource, ImageSet, Splits, existing
from visionpeft.data.splitting import complete
from visionpeft.errors import DataError, require

FASHION_CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
                   "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
FASHION_ROOTS = ("/usr/share/datasets/fashion-mnist",)  # where Debian's dataset-fashion-mnist puts them


def load_npz(path: str | Path, seed: int = 0) -> Splits:
    """An npz of encoded images (`{train,test}_{bytes,off,y}`) or of pixels (`{train,test}_{x,y}`), with `classes`.

    `bytes[off[i]:off[i+1]]` is one JPEG or PNG; `x` is uint8 [N, H, W] or [N, H, W, 3]; `y` counts from zero.

    Raises:
        DataError: the file is damaged or lacks a key.
    """
    path = existing(path, "npz file")
    with open(path, "rb") as file:
        return _from_npz(file, path.stem, str(path), seed)


def load_bundled(seed: int = 0) -> Splits:
    """1,000 + 2,000 images of Fashion-MNIST (Zalando, MIT licence) that come with the library."""
    name = "fashion_mnist_small"
    resource = importlib.resources.files("visionpeft.assets") / f"{name}.npz"
    if not resource.is_file():
        raise DataError(f"{name}.npz is not among the installed assets; run scripts/build_assets.py or reinstall")
    with resource.open("rb") as file:
        return _from_npz(file, name, f"{name}.npz", seed)  # type: ignore[arg-type]


def load_fashion_mnist(root: str | Path | None = None, seed: int = 0) -> Splits:
    """The four idx files of Fashion-MNIST, gzipped or not: 60,000 + 10,000 grey images of 28x28.

    Raises:
        DataError: a file is missing or damaged.
    """
    folder = existing(root, "folder of Fashion-MNIST idx files") if root else _fashion_root()
    parts = {}
    for part, prefix in (("train", "train"), ("test", "t10k")):
        pixels = _read_idx(folder, f"{prefix}-images-idx3-ubyte", dimensions=3)
        labels = _read_idx(folder, f"{prefix}-labels-idx1-ubyte", dimensions=1).astype(np.int64)
        parts[part] = ImageSet(ArraySource(pixels, f"fashion-mnist/{part}"), labels)
    return complete("fashion-mnist", FASHION_CLASSES, parts["train"], test=parts["test"], seed=seed)


def load_digits(seed: int = 0) -> Splits:
    """scikit-learn's 1,797 handwritten digits, 8x8, 0..16 stretched to 0..255; a fixed fifth is the test set."""
    digits = require("sklearn.datasets", extra="train").load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = ImageSet(ArraySource(pixels, "digits"), digits.target.astype(np.int64))
    return complete("digits", [str(d) for d in range(10)], images, seed=seed)


def _from_npz(file: BinaryIO, name: str, where: str, seed: int) -> Splits:
    try:
        with np.load(file, allow_pickle=False) as archive:
            data = {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{where}: not a readable npz file ({error})") from error
    if "classes" not in data:
        raise DataError(f"{where}: has no key 'classes' (found {sorted(data)})")
    train, test = (_npz_part(data, part, where) for part in ("train", "test"))
    return complete(name, [str(c) for c in data["classes"]], train, test=test, seed=seed)


def _npz_part(data: dict[str, np.ndarray], part: str, where: str) -> ImageSet:
    encoded = f"{part}_bytes" in data
    keys = [f"{part}_{key}" for key in (("bytes", "off", "y") if encoded else ("x", "y"))]
    if missing := [key for key in keys if key not in data]:
        raise DataError(f"{where}: lacks {missing} (found {sorted(data)}); "
                        "see visionpeft.data.arrays.load_npz for the two layouts")
    values = [data[key] for key in keys]
    name = f"{where}:{part}"
    source: Any = BytesSource(values[0], values[1], name) if encoded else ArraySource(values[0], name)
    return ImageSet(source, values[-1].astype(np.int64))


def _fashion_root() -> Path:
    for root in FASHION_ROOTS:
        if os.path.isdir(root):
            return Path(root)
    raise DataError("Fashion-MNIST idx files not found: install Debian's dataset-fashion-mnist, or give root=")


def _read_idx(folder: Path, name: str, dimensions: int) -> np.ndarray:
    """One idx file of unsigned bytes: 0, 0, 8, number of dimensions, big-endian sizes, values."""
    path = folder / f"{name}.gz"
    if not path.exists():
        path = existing(folder / name, "idx file")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: truncated or not gzip ({error})") from error
    shape = np.frombuffer(data[4 : 4 + 4 * dimensions], ">u4").astype(np.int64)
    if data[:4] != bytes((0, 0, 8, dimensions)) or len(data) != 4 + 4 * dimensions + shape.prod():
        raise DataError(f"{path}: not an idx file of {dimensions} dimensions, or truncated")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
