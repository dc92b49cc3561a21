"""Pickled clouds made safe: an unpickler that knows lists, tuples, dicts, strings, numbers and numpy arrays, no more.

Some sets are shipped as pickles only (ModelNet few-shot, ModelNet40's cache of 8,192 points). A pickle may name any
function to be called; here every name but those of numpy's array makers is refused before anything happens, and what
was read is written as npz, which `visionpeft points` takes.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from visionpeft.errors import DataError

_MAKERS = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")} | {
    (f"numpy.{core}.{module}", name)
    for core in ("core", "_core")
    for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
}


class SafeUnpickler(pickle.Unpickler):
    """Refuses every name that is not needed for arrays."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _MAKERS:
            raise DataError(f"the pickle asks for {module}.{name}, which is no array: it is not opened")
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        raise DataError("the pickle asks for objects from elsewhere: it is not opened")


def unpickle(path: str | Path) -> Any:
    """What a pickle of plain containers and arrays holds.

    Raises:
        DataError: it is damaged, or asks for anything else, by name.
    """
    path = Path(path)
    try:
        value = SafeUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(f"{path}: no readable pickle: {type(error).__name__}: {error}") from error
    _check_objects(value, path)
    return value


def _check_objects(value: Any, path: Path) -> None:
    if isinstance(value, np.ndarray) and value.dtype.hasobject:
        raise DataError(f"{path}: holds an array of objects and not of numbers")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        _check_objects(item, path)


def convert(source: str | Path, target: str | Path | None = None) -> Path:
    """Write the clouds and labels of a pickle as npz; gives its path, by default beside the pickle.

    Known are {"train": [(points, label, name)], "test": ...} (ModelNet few-shot) and [points, labels] (ModelNet40's
    cache), whose points are the first three columns.

    Raises:
        DataError: an unsafe or damaged pickle, or one of another layout.
    """
    source = Path(source)
    value = unpickle(source)
    try:
        arrays = _arrays(value)
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise DataError(
            f"{source}: neither a few-shot set (train, test) nor a list of points and labels: {error}"
        ) from error
    target = Path(target) if target is not None else source.with_suffix(".npz")
    with target.open("wb") as file:  # to a name numpy adds an ending
        np.savez_compressed(file, **arrays)
    return target


def _arrays(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        if not {"train", "test"} <= set(value):
            raise KeyError("train, test")
        found: dict[str, Any] = {}
        for part in ("train", "test"):
            found[f"{part}_points"] = np.stack([np.asarray(item[0], np.float32)[:, :3] for item in value[part]])
            found[f"{part}_label"] = np.array([int(item[1]) for item in value[part]])
        return found
    points, labels = value
    clouds = np.stack([np.asarray(cloud, np.float32)[:, :3] for cloud in points])
    return {"points": clouds, "label": np.array([int(np.asarray(label).reshape(-1)[0]) for label in labels])}
