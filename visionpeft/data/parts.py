"""Sets of clouds with a part for every point: ShapeNetPart, arrays, folders of files, and made-up furniture.

    splits = load_parts("shapenetpart:shapenetcore_partanno_segmentation_benchmark_v0_normal")
    cloud, category = splits.train[0]                  # float32 [N, 4]: x y z in the unit sphere, and the part

Parts are numbered through all categories; `owned` says which are those of each.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from visionpeft.data.cloud_files import read_cloud, read_npz
from visionpeft.data.clouds import CloudArray, _classes, _files, _key, unit, whole_numbers
from visionpeft.data.sets import ImageSet, Splits, existing
from visionpeft.data.splitting import complete
from visionpeft.errors import DataError

KINDS = ("bundled-parts", "parts", "shapenetpart")
SHAPENET = {
    "Airplane": 4, "Bag": 2, "Cap": 2, "Car": 4, "Chair": 4, "Earphone": 3, "Guitar": 3, "Knife": 2, "Lamp": 4,
    "Laptop": 2, "Motorbike": 6, "Mug": 2, "Pistol": 3, "Rocket": 3, "Skateboard": 3, "Table": 3,
}  # fmt: skip
"""Parts of each category of ShapeNetPart, 50 in all, numbered in this order."""


@dataclass(frozen=True)
class PartSplits(Splits):
    """Clouds with parts; `classes` are the categories of whole shapes."""

    parts: tuple[str, ...]
    owned: tuple[tuple[int, ...], ...]
    """Numbers of the parts of each category."""


@dataclass(frozen=True)
class PartArray:
    """Clouds [N, P, 3] and parts [N, P] in memory."""

    clouds: CloudArray
    parts: np.ndarray

    def __post_init__(self) -> None:
        if self.parts.shape != self.clouds.points.shape[:2]:
            raise DataError(f"{self.clouds.name}: parts {list(self.parts.shape)} do not fit points "
                            f"{list(self.clouds.points.shape)}: one part for each point")
        if whole_numbers(self.parts, f"{self.clouds.name}: parts").min(initial=0) < 0:
            raise DataError(f"{self.clouds.name}: parts are counted from 0, and there is {self.parts.min()}")

    def __len__(self) -> int:
        return len(self.clouds)

    def image(self, index: int) -> np.ndarray:
        return np.concatenate([self.clouds.image(index), self.parts[index, :, None]], 1, dtype=np.float32)

    def path(self, index: int) -> str:
        return self.clouds.path(index)


@dataclass(frozen=True)
class PartFiles:
    """One file each, whose last column is the part."""

    paths: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> np.ndarray:
        return labelled_cloud(self.paths[index])

    def path(self, index: int) -> str:
        return self.paths[index]


def labelled_cloud(path: str) -> np.ndarray:
    """Points float32 [N, 4] of a file: x y z within the unit sphere, and its last column, the part.

    Raises:
        DataError: fewer than four columns, or parts that are no whole numbers from 0 on.
    """
    rows = read_cloud(path)
    if rows.shape[1] < 4:
        raise DataError(f"{path}: expected x y z ... part, 4 or more columns, got {rows.shape[1]}")
    parts = rows[:, -1]
    wrong = np.flatnonzero(~((parts >= 0) & (parts == np.round(parts))))
    if len(wrong):
        raise DataError(f"{path}: the last column is the part, a whole number from 0 on, but row {wrong[0] + 1} has "
                        f"{parts[wrong[0]]:g}")
    return np.concatenate([unit(rows[:, :3]), parts[:, None]], 1, dtype=np.float32)


def is_parts(spec: str) -> bool:
    """Whether data of this name have a part for every point."""
    return spec.partition(":")[0] in KINDS


def load_parts(spec: str, root: str | None = None, seed: int = 0) -> PartSplits:
    """Load a set of clouds with parts.

    `spec` is "bundled-parts" (made-up furniture), "shapenetpart:PATH" (the official folder), "parts:PATH" of an npz
    ({train,test}_points [n, P, 3], _part [n, P], _label [n] and perhaps classes and parts, the names) or of a folder
    ({train,test}/category/file, the last column being the part).

    Raises:
        DataError: an unknown spec, or data that are missing or malformed.
    """
    kind, _, name = spec.partition(":")
    if kind not in KINDS or bool(name) == (kind == "bundled-parts"):
        raise DataError(f"unknown clouds with parts {spec!r}: bundled-parts, parts:PATH or shapenetpart:PATH")
    if kind == "bundled-parts":
        from visionpeft.data.made_clouds import MAKERS, made, part_names

        names = {"classes": np.array(list(MAKERS)), "parts": np.array(part_names())}
        return _arrays({**made(), **names}, "bundled", seed)
    path = existing(name, "clouds with parts")
    if kind == "shapenetpart":
        return _shapenet(path, seed)
    return _folder(path, seed) if path.is_dir() else _arrays(read_npz(path), path.name, seed)


def _with_parts(splits: Splits, parts: Sequence[str], owned: Sequence[Sequence[int]]) -> PartSplits:
    given = {f.name: getattr(splits, f.name) for f in fields(Splits)}
    return PartSplits(**given, parts=tuple(parts), owned=tuple(tuple(own) for own in owned))


def _arrays(arrays: dict[str, Any], name: str, seed: int) -> PartSplits:
    sets: dict[str, ImageSet] = {}
    for part in ("train", "test"):
        points, parts, labels = (_key(arrays, f"{part}_{key}", Path(name)) for key in ("points", "part", "label"))
        labels = whole_numbers(labels, f"{name} {part}: labels").reshape(-1)
        sets[part] = ImageSet(PartArray(CloudArray(points, f"{name} {part}"), parts), labels)
    labels, parts = sets["train"].labels, arrays["train_part"]
    classes = list(map(str, arrays.get("classes", range(int(labels.max()) + 1))))
    owned = [np.unique(parts[labels == i]).tolist() for i in range(len(classes))]
    highest = max((max(own) for own in owned if own), default=0)
    if len(names := arrays.get("parts", range(highest + 1))) <= highest:
        raise DataError(f"{name}: there are parts up to {highest} but only {len(names)} names of parts")
    splits = complete(name, classes, sets["train"], test=sets["test"], seed=seed)
    return _with_parts(splits, list(map(str, names)), owned)


def _folder(root: Path, seed: int) -> PartSplits:
    classes = _classes(existing(root / "train", "folder of training clouds"))
    train, test = (_files(existing(root / part, f"folder of {part} clouds"), classes, PartFiles)
                   for part in ("train", "test"))
    owned: list[set[int]] = [set() for _ in classes]
    for cloud, label in (train[i] for i in range(len(train))):
        owned[label] |= set(cloud[:, 3].astype(int).tolist())
    splits = complete(root.name, classes, train, test=test, seed=seed)
    return _with_parts(splits, [str(i) for i in range(max(map(max, owned)) + 1)], [sorted(own) for own in owned])


def _shapenet(root: Path, seed: int) -> PartSplits:
    """The official folder; its train and val are what is trained on, as in the papers."""
    listed = existing(root / "synsetoffset2category.txt", "ShapeNetPart's list of categories").read_text().split()
    synsets = dict(zip(listed[1::2], listed[::2], strict=False))
    if unknown := sorted(set(synsets.values()) - set(SHAPENET)):
        raise DataError(f"{root}: {unknown[0]!r} is no category of ShapeNetPart, which has {', '.join(SHAPENET)}")
    classes = [name for name in SHAPENET if name in synsets.values()]
    parts = {part: _listed(root, part, synsets, classes) for part in ("train", "val", "test")}
    splits = complete("ShapeNetPart", classes, parts["train"], parts["val"], parts["test"], seed=seed)
    ends = np.cumsum(list(SHAPENET.values()))
    owned = {name: range(end - count, end) for (name, count), end in zip(SHAPENET.items(), ends, strict=True)}
    names = [f"{name} {i}" for name, count in SHAPENET.items() for i in range(count)]
    return _with_parts(splits, names, [[int(i) for i in owned[name]] for name in classes])


def _listed(root: Path, part: str, synsets: dict[str, str], classes: Sequence[str]) -> ImageSet:
    path = existing(root / "train_test_split" / f"shuffled_{part}_file_list.json", "ShapeNetPart's list of shapes")
    try:
        shapes = [entry.split("/")[-2:] for entry in json.loads(path.read_text())]
        labels = [classes.index(synsets[synset]) for synset, _ in shapes]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{path}: expected a list of shape_data/SYNSET/ID with synsets of "
                        f"synsetoffset2category.txt: {error}") from error
    files = [str(root / synset / f"{shape}.txt") for synset, shape in shapes]
    return ImageSet(PartFiles(files), np.array(labels, dtype=np.int64))


def check_parts(clouds: np.ndarray, splits: PartSplits, which: ImageSet) -> None:
    """Refuse points whose part is none of their category's.

    Raises:
        DataError: naming the first cloud [N, P, 4] that has such points.
    """
    for index, (cloud, label) in enumerate(zip(clouds, which.labels, strict=True)):
        strange = sorted(set(np.unique(cloud[:, 3]).astype(int).tolist()) - set(splits.owned[label]))
        if strange:
            raise DataError(f"{which.path(index)}: part {strange[0]} is none of the category {splits.classes[label]}, "
                            f"which has {', '.join(map(str, splits.owned[label]))}")

