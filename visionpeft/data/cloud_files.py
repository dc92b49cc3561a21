"""One file, one cloud: float32 [N, C], the first three columns x y z."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from visionpeft.errors import DataError, require

TEXT = (".xyz", ".txt", ".pts", ".csv")
ARRAYS = (".npy", ".npz")
MESHES = (".off", ".ply", ".obj", ".stl")
SUFFIXES = TEXT + ARRAYS + MESHES
PICKLES = (".pkl", ".pickle", ".dat")
SURFACE = 8192
"""Points that are drawn from the surface of a mesh."""


def read_cloud(path: str | Path) -> np.ndarray:
    """The points of a file; of a mesh, `SURFACE` points drawn evenly from its surface, always the same ones.

    Raises:
        DataError: an unknown kind, a pickle, a damaged file, fewer than three columns, or numbers that are not finite.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        raise DataError(f"{path} is a pickle, which could run anything: `visionpeft points convert` makes an npz of it")
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: no kind of cloud is known by {suffix!r}; there are {' '.join(SUFFIXES)}")
    reader = _text if suffix in TEXT else _array if suffix in ARRAYS else _off if suffix == ".off" else _mesh
    try:
        points = np.asarray(reader(path), dtype=np.float32)
    except DataError:
        raise
    except (OSError, ValueError, IndexError, KeyError, EOFError) as error:
        raise DataError(f"{path}: cannot be read as a cloud: {error}") from error
    return checked(points, str(path))


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an npz.

    Raises:
        DataError: truncated or no npz, or pickled, with the command that helps.
    """
    if _is_pickle(path):
        raise DataError(f"{path} is a pickle, which could run anything: `visionpeft points convert` makes an npz of it")
    if not zipfile.is_zipfile(path):  # of anything else numpy says that it is pickled
        raise DataError(f"{path}: truncated, or no npz of plain arrays")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: truncated, or no npz of plain arrays: {error}") from error


def _is_pickle(path: Path) -> bool:
    """By the first and the last byte: what protocols begin with, and the sign that all of them stop with."""
    with path.open("rb") as file:
        first = file.read(1)
        if first not in (b"\x80", b"(", b"]", b"}", b"c", b"d", b"l"):
            return False
        file.seek(-1, 2)
        return file.read() == b"."


def checked(points: np.ndarray, name: str) -> np.ndarray:
    """The points, if they are such.

    Raises:
        DataError: not [N, at least 3], none at all, or not finite.
    """
    if points.ndim != 2 or points.shape[1] < 3 or not len(points):
        raise DataError(f"{name}: expected points [N, 3 or more columns], got {list(points.shape)}")
    wrong = np.flatnonzero(~np.isfinite(points[:, :3]).all(1))
    if len(wrong):
        raise DataError(f"{name}: {len(wrong)} of {len(points)} points are not finite, the first is number {wrong[0]}")
    return points


def _text(path: Path) -> np.ndarray:
    lines = path.read_text().splitlines()
    rows = [line.replace(",", " ").split() for line in lines if line.strip() and line.lstrip()[0] not in "#/"]
    if rows and len(rows[0]) == 1:  # .pts files begin with the number of points
        rows = rows[1:]
    if len({len(row) for row in rows}) > 1:
        odd = next(i for i, row in enumerate(rows) if len(row) != len(rows[0]))
        raise DataError(f"{path}: row {odd + 1} has {len(rows[odd])} columns and the first has {len(rows[0])}")
    return np.array(rows, dtype=np.float32).reshape(len(rows), -1)


def _array(path: Path) -> np.ndarray:
    if path.suffix.lower() == ".npy":
        return np.load(path, allow_pickle=False)
    loaded = read_npz(path)
    named: list[str] = [k for k in ("points", "xyz") if k in loaded] or [k for k in loaded if loaded[k].ndim == 2]
    if not named:
        raise DataError(f"{path}: no array of points among {', '.join(loaded)}")
    return loaded[named[0]]


def _off(path: Path) -> np.ndarray:
    """Vertices and polygons; some files of ModelNet lack the line break behind OFF."""
    words = path.read_text().split()
    if not words or not words[0].upper().startswith("OFF"):
        raise DataError(f"{path}: an OFF file begins with OFF")
    words = [words[0][3:], *words[1:]] if len(words[0]) > 3 else words[1:]
    vertices, faces = int(words[0]), int(words[1])
    at = 3 + 3 * vertices
    corners = np.array(words[3:at], dtype=np.float64).reshape(vertices, 3)
    triangles = []
    for _ in range(faces):
        size = int(words[at])
        ring = [int(w) for w in words[at + 1 : at + 1 + size]]
        triangles += [(ring[0], ring[i], ring[i + 1]) for i in range(1, size - 1)]
        at += 1 + size
    return surface(corners, np.array(triangles, dtype=np.int64).reshape(-1, 3))


def _mesh(path: Path) -> np.ndarray:
    loaded: Any = require("trimesh", extra="points").load(path, process=False)
    if hasattr(loaded, "geometry"):
        loaded = loaded.to_geometry()
    faces = getattr(loaded, "faces", None)
    return np.asarray(loaded.vertices) if faces is None or not len(faces) else surface(loaded.vertices, faces)


def surface(corners: np.ndarray, triangles: np.ndarray, count: int = SURFACE) -> np.ndarray:
    """`count` points [count, 3] spread evenly over triangles [T, 3] of corners [V, 3]; the corners if none has an area.

    Raises:
        IndexError: a triangle names a corner that is not there.
    """
    a, b, c = (np.asarray(corners, dtype=np.float64)[np.asarray(triangles)[:, i]] for i in range(3))
    areas = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    if not areas.sum() > 0:
        return np.asarray(corners)
    rng = np.random.default_rng(0)
    chosen = rng.choice(len(areas), count, p=areas / areas.sum())
    u, v = rng.random((2, count, 1))
    u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)
    return a[chosen] + u * (b - a)[chosen] + v * (c - a)[chosen]
