"""Sets of clouds by name: the field's benchmarks, folders of files, arrays, and made-up furniture.

    splits = load_clouds("scanobjectnn:pb_t50_rs", root="~/h5_files")
    cloud, label = splits.train[0]                                   # float32 [N, 3], int

Coordinates are centred and scaled into the unit sphere, but those of ScanObjectNN, which the field uses as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from visionpeft.data.cloud_files import PICKLES, SUFFIXES, checked, read_cloud, read_npz
from visionpeft.data.sets import ImageSet, Source, Splits, existing
from visionpeft.data.splitting import complete
from visionpeft.errors import DataError, require

KINDS = ("bundled", "npz", "folder", "modelnet", "scanobjectnn", "fewshot")
SCANOBJECTNN = ("bag", "bin", "box", "cabinet", "chair", "desk", "display", "door", "shelf", "table", "bed", "pillow",
                "sink", "sofa", "toilet")  # fmt: skip
VARIANTS = {
    "obj_bg": ("main_split", ""),
    "obj_only": ("main_split_nobg", ""),
    "pb_t50_rs": ("main_split", "_augmentedrot_scale75"),
}


@dataclass(frozen=True)
class CloudArray:
    """Clouds in memory [N, P, 3]."""

    points: np.ndarray
    name: str
    scaled: bool = True

    def __post_init__(self) -> None:
        if self.points.ndim != 3 or self.points.shape[-1] < 3:
            raise DataError(f"{self.name}: expected points [clouds, points, 3], got {list(self.points.shape)}")

    def __len__(self) -> int:
        return len(self.points)

    def image(self, index: int) -> np.ndarray:
        whole = self.points[index]
        scale = 1 / 32767 if whole.dtype == np.int16 else 1.0
        cloud = checked(whole[:, :3].astype(np.float32) * np.float32(scale), self.path(index))
        return unit(cloud) if self.scaled else cloud

    def path(self, index: int) -> str:
        return f"{self.name}[{index}]"


@dataclass(frozen=True)
class CloudFiles:
    """One file each."""

    paths: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> np.ndarray:
        return unit(read_cloud(self.paths[index])[:, :3])

    def path(self, index: int) -> str:
        return self.paths[index]


def unit(points: np.ndarray) -> np.ndarray:
    """Points [N, 3] about their mean, the farthest at distance 1."""
    points = points - points.mean(0)
    return points / max(float(np.linalg.norm(points, axis=1).max()), 1e-12)


def load_clouds(spec: str, root: str | None = None, seed: int = 0) -> Splits:
    """Load a set of labelled clouds.

    `spec` is "bundled" (made-up furniture), "npz:PATH", "folder:PATH" ({train,test}/class/file, or class/file),
    "modelnet:PATH" (OFF files, hdf5, normal_resampled, or its cache after `visionpeft points convert`),
    "scanobjectnn:obj_bg", ":obj_only" or ":pb_t50_rs" below `root` (the folder of main_split), or
    "fewshot:5way10shot/0" below `root` (after `visionpeft points convert`).

    Raises:
        DataError: an unknown spec, or data that are missing, malformed or pickled.
    """
    kind, _, name = spec.partition(":")
    if kind not in KINDS or bool(name) == (kind == "bundled"):
        raise DataError(f"unknown clouds {spec!r}: bundled, or one of {', '.join(f'{k}:...' for k in KINDS[1:])}")
    if kind in ("scanobjectnn", "fewshot") and root is None:
        raise DataError(f"{spec!r} needs root=, the folder that holds the files")
    loaders: dict[str, Callable[[], Splits]] = {
        "bundled": lambda: _bundled(seed),
        "npz": lambda: _npz(existing(name, "npz file"), seed),
        "folder": lambda: _folder(existing(name, "folder"), seed),
        "modelnet": lambda: _modelnet(existing(name, "folder"), seed),
        "scanobjectnn": lambda: _scanobjectnn(name, existing(root or "", "folder"), seed),
        "fewshot": lambda: _fewshot(name, existing(root or "", "folder"), seed),
    }
    return loaders[kind]()


def _set(points: np.ndarray, labels: np.ndarray, name: str, scaled: bool = True) -> ImageSet:
    labels = whole_numbers(labels, f"{name}: labels").reshape(-1)
    source = CloudArray(points, name, scaled)
    if len(labels) != len(source):
        raise DataError(f"{name}: {len(source)} clouds but {len(labels)} labels")
    return ImageSet(source, labels)


def whole_numbers(values: np.ndarray, name: str) -> np.ndarray:
    """The values as int64.

    Raises:
        DataError: they are no whole numbers.
    """
    values = np.asarray(values)
    if values.dtype.kind not in "iu" and not (values.dtype.kind == "f" and (values == np.round(values)).all()):
        raise DataError(f"{name} are whole numbers, 0, 1, 2 ..., and not {values.dtype} as {values.reshape(-1)[:1]}")
    return values.astype(np.int64)


def _bundled(seed: int) -> Splits:
    from visionpeft.data.made_clouds import MAKERS, made

    arrays = made()
    parts = [_set(arrays[f"{part}_points"], arrays[f"{part}_label"], f"bundled {part}") for part in ("train", "test")]
    return complete("bundled", list(MAKERS), parts[0], test=parts[1], seed=seed)


def _npz(path: Path, seed: int) -> Splits:
    """`{train,test}_points` and `_label`, or `points` (`xyz`), `label` and perhaps `is_train`; label -1 is left out."""
    arrays = read_npz(path)
    names = next((list(map(str, arrays[key])) for key in ("classes", "label_names") if key in arrays), None)
    if "train_points" in arrays:
        train = _labelled(arrays, "train", path)
        test = _labelled(arrays, "test", path) if "test_points" in arrays else None
    else:
        train, test = _by_flag(arrays, path)
    parts = [train] if test is None else [train, test]
    if not all(map(len, parts)):
        raise DataError(f"{path}: no cloud of train or of test has a label of 0 or more")
    classes = names or [str(i) for i in range(max(int(part.labels.max()) for part in parts) + 1)]
    return complete(path.name, classes, train, test=test, seed=seed)


def _labelled(arrays: dict[str, np.ndarray], part: str, path: Path) -> ImageSet:
    return _set(_key(arrays, f"{part}_points", path), _key(arrays, f"{part}_label", path), f"{path.name} {part}")


def _key(arrays: dict[str, np.ndarray], key: str, path: Path) -> np.ndarray:
    if key not in arrays:
        raise DataError(f"{path}: no array {key!r}; there are {', '.join(arrays)}")
    return arrays[key]


def _by_flag(arrays: dict[str, np.ndarray], path: Path) -> tuple[ImageSet, ImageSet | None]:
    points, labels = _key(arrays, "xyz" if "xyz" in arrays else "points", path), _key(arrays, "label", path)
    whole = _set(points, labels, path.name)
    known = labels.reshape(-1) >= 0
    if "is_train" not in arrays:
        return whole.take(np.flatnonzero(known)), None
    flag = arrays["is_train"].astype(bool).reshape(-1)
    if len(flag) != len(known):
        raise DataError(f"{path}: {len(known)} clouds but {len(flag)} entries of is_train")
    return whole.take(np.flatnonzero(known & flag)), whole.take(np.flatnonzero(known & ~flag))


def _folder(root: Path, seed: int) -> Splits:
    parts = [root / part for part in ("train", "test")]
    if not all(part.is_dir() for part in parts):
        classes = _classes(root)
        return complete(root.name, classes, _files(root, classes), seed=seed)
    classes = _classes(parts[0])
    if (other := _classes(parts[1])) != classes:
        unlike = sorted(set(classes) ^ set(other))
        raise DataError(f"{root}: train and test have different classes: {', '.join(unlike[:5])} in one of them only")
    train, test = (_files(part, classes) for part in parts)
    return complete(root.name, classes, train, test=test, seed=seed)


def _classes(folder: Path) -> list[str]:
    found = sorted(p.name for p in folder.iterdir() if p.is_dir())
    if not found:
        raise DataError(f"{folder}: expected a folder for each class")
    return found


def _files(folder: Path, classes: Sequence[str], make: Callable[[Sequence[str]], Source] = CloudFiles) -> ImageSet:
    paths: list[str] = []
    labels: list[int] = []
    for index, name in enumerate(classes):
        files = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in SUFFIXES + PICKLES)
        if not files:
            raise DataError(f"{folder / name}: no clouds here ({' '.join(SUFFIXES)})")
        paths += map(str, files)
        labels += [index] * len(files)
    return ImageSet(make(paths), np.array(labels, dtype=np.int64))


def _modelnet(root: Path, seed: int) -> Splits:
    """Whichever of the four layouts is there; ModelNet40 where ModelNet10's lists stand beside its own."""
    names = sorted(root.glob("modelnet*_shape_names.txt"))
    if caches := sorted(root.glob("modelnet*_train_*.npz")):
        return _modelnet_cache(root, caches[-1], names, seed)
    if names:
        return _modelnet_text(root, names[-1], seed)
    if sorted(root.glob("ply_data_train*.h5")):
        return _modelnet_h5(root, seed)
    if pickles := sorted(root.glob("modelnet*_train_*.dat")):
        raise DataError(f"{pickles[-1]} is a pickle: make an npz of it, and of the test set's, with `visionpeft points "
                        "convert`")
    classes = _classes(root)
    for name in classes:
        existing(root / name / "train", "ModelNet's folder of training meshes")
    train, test = (_meshes(root, classes, part) for part in ("train", "test"))
    return complete(root.name, classes, train, test=test, seed=seed)


def _meshes(root: Path, classes: Sequence[str], part: str) -> ImageSet:
    files = [(str(p), i) for i, name in enumerate(classes) for p in sorted((root / name / part).glob("*.off"))]
    if not files:
        raise DataError(f"{root}: no .off files in class/{part}")
    return ImageSet(CloudFiles([p for p, _ in files]), np.array([i for _, i in files], dtype=np.int64))


def _modelnet_text(root: Path, names: Path, seed: int) -> Splits:
    """normal_resampled: class/id.txt, listed in modelnet40_train.txt; the class is the id without its number."""
    classes = names.read_text().split()
    prefix = names.name.removesuffix("_shape_names.txt")
    parts = []
    for part in ("train", "test"):
        ids = existing(root / f"{prefix}_{part}.txt", "ModelNet's list").read_text().split()
        owners = [i.rpartition("_")[0] for i in ids]
        if unknown := set(owners) - set(classes):
            raise DataError(f"{root}: {sorted(unknown)[0]!r} is listed but not in {names.name}")
        paths = [str(root / owner / f"{i}.txt") for owner, i in zip(owners, ids, strict=True)]
        parts.append(ImageSet(CloudFiles(paths), np.array([classes.index(o) for o in owners], dtype=np.int64)))
    return complete(root.name, classes, parts[0], test=parts[1], seed=seed)


def _modelnet_cache(root: Path, train: Path, names: Sequence[Path], seed: int) -> Splits:
    """Both npz files of the cache of 8,192 points, after `visionpeft points convert`."""
    parts = []
    for path in (train, existing(train.with_name(train.name.replace("_train_", "_test_")), "ModelNet's other part")):
        arrays = read_npz(path)
        parts.append(_set(_key(arrays, "points", path), _key(arrays, "label", path), path.name))
    kind = train.name.partition("_")[0]  # modelnet40
    return _numbered(root, parts, next((n for n in names if n.name.startswith(f"{kind}_")), None), seed)


def _modelnet_h5(root: Path, seed: int) -> Splits:
    parts = []
    for part in ("train", "test"):
        read = [read_h5(path) for path in sorted(root.glob(f"ply_data_{part}*.h5"))]
        if not read:
            raise DataError(f"{root}: no ply_data_{part}*.h5")
        points, labels = (np.concatenate(arrays) for arrays in zip(*read, strict=True))
        parts.append(_set(points, labels, f"{root.name} {part}"))
    names = root / "shape_names.txt"
    return _numbered(root, parts, names if names.exists() else None, seed)


def _numbered(root: Path, parts: Sequence[ImageSet], names: Path | None, seed: int) -> Splits:
    """Train and test set; classes have the names of a file, else their numbers."""
    highest = max(int(part.labels.max()) for part in parts)
    classes = [str(i) for i in range(highest + 1)] if names is None else names.read_text().split()
    return complete(root.name, classes, parts[0], test=parts[1], seed=seed)


def _scanobjectnn(variant: str, root: Path, seed: int) -> Splits:
    if variant not in VARIANTS:
        raise DataError(f"unknown variant {variant!r} of ScanObjectNN: one of {', '.join(VARIANTS)}")
    folder, ending = VARIANTS[variant]
    parts = []
    for part in ("training", "test"):
        path = existing(root / folder / f"{part}_objectdataset{ending}.h5", "ScanObjectNN file")
        parts.append(_set(*read_h5(path), f"{variant} {part}", scaled=False))
    return complete(f"scanobjectnn {variant}", list(SCANOBJECTNN), parts[0], test=parts[1], seed=seed)


def read_h5(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """`data` [n, points, 3] and `label` [n] of an h5 file.

    Raises:
        DataError: truncated, no h5, or without these.
    """
    h5py: Any = require("h5py", extra="points")
    try:
        with h5py.File(path, "r") as file:
            return np.asarray(file["data"][:], np.float32), np.asarray(file["label"][:]).reshape(-1)
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise DataError(f"{path}: truncated, or no h5 file with data and label: {error}") from error


def _fewshot(name: str, root: Path, seed: int) -> Splits:
    """One draw of ModelNet few-shot, such as 5way10shot/0; the official code has the folder as 5way_10shot."""
    setting, _, draw = name.partition("/")
    folders = [root / setting, root / setting.replace("way", "way_")]
    folder = next((f for f in folders if f.is_dir()), folders[0])
    path = folder / f"{draw}.npz"
    if not path.exists() and path.with_suffix(".pkl").exists():
        raise DataError(f"{path.with_suffix('.pkl')} is a pickle: make it an npz with `visionpeft points convert`")
    return _npz(existing(path, "few-shot draw"), seed)
