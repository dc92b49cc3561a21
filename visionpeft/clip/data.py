"""What CLIP jobs evaluate on: any data set with class names, one's own folder, and images with captions.

    load_images("folder-all:~/birds", classes="birds.json")      all images of a folder of class folders, no split
    load_coop("eurosat", "~/data", shots=16, seed=1)             the layout and splits of CoOp
    read_pairs("captions.csv")                                   image and caption: CSV, JSON, or a folder with .txt
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from visionpeft import data
from visionpeft.clip.coop_layouts import Entries, aircraft, imagenet
from visionpeft.clip.errors import ClipError
from visionpeft.data.folder import class_folders, images_below, read_part
from visionpeft.data.sets import FileSource, ImageSet, Splits, existing, join
from visionpeft.errors import DataError, require

# CoOp's folder and image folder of each set, and its split file.
COOP_LAYOUT = {
    "caltech101": ("caltech-101", "101_ObjectCategories", "split_zhou_Caltech101.json"),
    "oxford_pets": ("oxford_pets", "images", "split_zhou_OxfordPets.json"),
    "stanford_cars": ("stanford_cars", "", "split_zhou_StanfordCars.json"),
    "oxford_flowers": ("oxford_flowers", "jpg", "split_zhou_OxfordFlowers.json"),
    "food101": ("food-101", "images", "split_zhou_Food101.json"),
    "sun397": ("sun397", "SUN397", "split_zhou_SUN397.json"),
    "dtd": ("dtd", "images", "split_zhou_DescribableTextures.json"),
    "eurosat": ("eurosat", "2750", "split_zhou_EuroSAT.json"),
    "ucf101": ("ucf101", "UCF-101-midframes", "split_zhou_UCF101.json"),
}
COOP_LISTS = {"fgvc_aircraft": ("fgvc_aircraft", aircraft), "imagenet": ("imagenet", imagenet)}
VAL_SHOTS = 4  # CoOp validates on min(shots, 4) images a class
_UTF8 = "utf-8-sig"  # some editors begin a file with a mark, which would be part of the first name


@dataclass(frozen=True)
class Labelled:
    """Images to evaluate on, and the names of their classes."""

    name: str
    classes: list[str]
    images: ImageSet


def load_images(spec: str, root: str | None = None, classes: str | None = None) -> Labelled:
    """The test images of a data set of `visionpeft.data` or, as "coop:SET", in CoOp's layout; or with "folder-all:PATH"
    every image below class folders.

    Args:
        classes: as in `read_classes`.

    Raises:
        DataError, ClipError: data that are missing, or a class list that does not fit.
    """
    kind, _, path = spec.partition(":")
    if kind == "folder-all":
        folder = existing(Path(root or "", Path(path).expanduser()), "image folder")
        names = class_folders(folder)
        found = Labelled(spec, names, read_part(folder, names))
    elif kind == "coop":
        splits = load_coop(path, root)
        found = Labelled(spec, splits.classes, splits.test)
    else:
        splits = data.load(spec, root=root_of(spec, root))
        if splits.multi_label:
            raise ClipError(f"{spec} has several labels for an image: zero-shot classification gives one")
        found = Labelled(spec, splits.classes, splits.test)
    return found if classes is None else Labelled(found.name, read_classes(classes, found.classes), found.images)


def root_of(spec: str, root: str | None) -> str | None:
    """`root` for data that lie below one; sets with a place of their own may stand beside those in a list."""
    return root if spec.partition("?")[0].partition(":")[0] not in ("bundled", "digits") else None


def read_classes(file: str, known: Sequence[str]) -> list[str]:
    """Names for the classes `known`, in their order.

    Args:
        file: one name a line, or a JSON list, in the order of the data's classes; or a JSON object from the data's
            class to the name; or "imagenet", open_clip's names for folders called n01440764 and so on.

    Raises:
        ClipError: too few or too many names, names of classes that the data do not have, or the data's own names in
            another order, which would swap labels.
    """
    path, value = _listed(file)
    if isinstance(value, dict):
        unknown, missing = sorted(set(value) - set(known)), [name for name in known if name not in value]
        if unknown or missing:
            what = f"unknown class {unknown[0]!r}" if unknown else f"no name for class {missing[0]!r}"
            raise ClipError(f"{path}: {what}; the data have {len(known)} classes: {', '.join(list(known)[:6])} ...")
        value = [value[name] for name in known]
    elif isinstance(value, list) and len(value) == len(known):
        _check_order(path, [str(name) for name in value], known)
    if not isinstance(value, list) or len(value) != len(known):
        count = len(value) if isinstance(value, list) else "no"
        raise ClipError(f"{path}: {count} names for {len(known)} classes: {', '.join(list(known)[:6])} ...")
    return [str(name) for name in value]


def _check_order(path: Path, names: Sequence[str], known: Sequence[str]) -> None:
    def plain(name: str) -> str:
        return name.replace("_", " ").casefold()

    place = {plain(name): i for i, name in enumerate(known, start=1)}
    for i, (name, own) in enumerate(zip(names, known, strict=True), start=1):
        if plain(name) != plain(own) and plain(name) in place:
            raise ClipError(
                f"{path}: name {i} is {name!r}, which is class {place[plain(name)]} of the data, where class {i} is "
                f"{own!r}: write them in that order, or as a JSON object from class to name"
            )


def read_names(file: str) -> list[str]:
    """Class names, one a line or a JSON list, or "imagenet" for open_clip's.

    Raises:
        ClipError: neither.
    """
    path, names = _listed(file)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ClipError(f"{path}: expected a JSON list of names")
    return names


def _listed(file: str) -> tuple[Path, Any]:
    """The path of a class list, and its lines or, of a .json, its value."""
    if file == "imagenet":
        return Path(file), list(require("open_clip", extra="clip").IMAGENET_CLASSNAMES)
    path = existing(file, "class list")
    text = path.read_text(encoding=_UTF8)
    if path.suffix != ".json":
        return path, [line.strip() for line in text.splitlines() if line.strip()]
    try:
        return path, json.loads(text)
    except ValueError as error:
        raise ClipError(f"{path}: no JSON ({error})") from error


# ---- CoOp -----------------------------------------------------------------------------------------------------------


def load_coop(name: str, root: str | Path | None, shots: int | None = None, seed: int = 1) -> Splits:
    """A data set in CoOp's layout, mostly `root/<folder>/split_zhou_*.json`, with K images a class to train on.

    With `shots`, train is K images of every class (all of a class that has fewer), val is min(K, 4) of CoOp's own
    validation list; train_val is train, so that K shots stay K shots. Draws come from `seed` by numpy's PCG64: they are
    not CoOp's own, whose splits depend on the state of Python's generator.

    Raises:
        ClipError: no root.
        DataError: an unknown set, a missing file, an image that is gone, labels that do not count from 0.
    """
    if root is None:
        raise ClipError(f"'coop:{name}' needs root=, the folder that holds CoOp's data sets")
    if name in COOP_LISTS:
        folder, read = COOP_LISTS[name]
        path = existing(Path(root).expanduser() / folder, "folder of CoOp's layout")
        return _to_splits(path, read(path), path, shots, seed)
    if name not in COOP_LAYOUT:
        raise DataError(f"no CoOp layout for {name!r}: one of {', '.join([*COOP_LAYOUT, *COOP_LISTS])}")
    folder, images, file = COOP_LAYOUT[name]
    return read_split(existing(Path(root).expanduser() / folder / file, "CoOp split file"), images, shots, seed)


def read_split(path: Path, images: str = "", shots: int | None = None, seed: int = 1) -> Splits:
    """Splits of a file {"train": [[path, label, class name], ...], "val": ..., "test": ...}, see `load_coop`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = {part: [(str(p), int(y), str(c)) for p, y, c in content[part]] for part in ("train", "val", "test")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no CoOp split file ({type(error).__name__}: {error})") from error
    return _to_splits(path, entries, path.parent / images, shots, seed)


def _to_splits(path: Path, entries: Entries, base: Path, shots: int | None, seed: int) -> Splits:
    """Splits of (image, label, class name) with images below `base`; `path` is what lists them."""
    names: dict[int, str] = {}
    for _, label, name in (entry for part in entries.values() for entry in part):
        if names.setdefault(label, name) != name:
            raise DataError(f"{path}: label {label} is {names[label]!r} and {name!r}")
    if sorted(names) != list(range(len(names))):
        raise DataError(f"{path}: labels do not count from 0: {sorted(names)[:5]} ...")
    parts = {part: _image_set(found, path, base) for part, found in entries.items()}
    train, val = parts["train"], parts["val"]
    if shots is not None:
        train = draw_shots(train, shots, seed)
        val = draw_shots(val, min(shots, VAL_SHOTS), seed)
    classes = [names[i] for i in range(len(names))]
    train_val = join(train, val) if shots is None else train
    return Splits(path.stem, classes, None, False, train, val, train_val, parts["test"])


def _image_set(entries: list[tuple[str, int, str]], file: Path, base: Path) -> ImageSet:
    paths = [str(base / path) for path, *_ in entries]
    for path in paths:
        if not Path(path).is_file():
            raise DataError(f"{path} (listed in {file}): no such image file")
    return ImageSet(FileSource(paths, [str(file)] * len(paths)), np.array([y for _, y, _ in entries], dtype=np.int64))


def draw_shots(images: ImageSet, shots: int, seed: int) -> ImageSet:
    """`shots` images of every class, or all that a class has.

    Raises:
        DataError: fewer than one shot.
    """
    if shots < 1:
        raise DataError(f"shots={shots}: at least 1 image a class")
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(np.flatnonzero(images.labels == c))[:shots] for c in np.unique(images.labels)]
    return images.take(np.sort(np.concatenate(rows)))


def base_and_new(splits: Splits) -> tuple[Splits, Splits]:
    """The first ceil(n / 2) classes by label, and the rest relabelled from 0, as CoCoOp splits them."""
    half = math.ceil(splits.num_classes / 2)
    return _only(splits, 0, half, "base"), _only(splits, half, splits.num_classes, "new")


def _only(splits: Splits, lo: int, hi: int, name: str) -> Splits:
    def part(images: ImageSet) -> ImageSet:
        kept = images.take(np.flatnonzero((images.labels >= lo) & (images.labels < hi)))
        return ImageSet(kept.source, kept.labels - lo, kept.transform, kept.indices)

    sets = (part(s) for s in (splits.train, splits.val, splits.train_val, splits.test))
    return Splits(f"{splits.name}-{name}", splits.classes[lo:hi], splits.group, False, *sets)


def harmonic(base: float, new: float) -> float:
    """2 b n / (b + n); over several sets, average each first and take this of the two averages."""
    return 2 * base * new / (base + new) if base + new else 0.0


# ---- pairs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """Images and captions; caption j describes image owner[j]."""

    images: ImageSet
    captions: list[str]
    owner: np.ndarray

    def __len__(self) -> int:
        return len(self.captions)

    def take(self, images: np.ndarray) -> Pairs:
        """The images of these indices, with all their captions."""
        new = {int(i): n for n, i in enumerate(images)}
        kept = [j for j, i in enumerate(self.owner) if int(i) in new]
        owner = np.array([new[int(self.owner[j])] for j in kept], dtype=np.int64)
        return Pairs(self.images.take(images), [self.captions[j] for j in kept], owner)


def read_pairs(source: str | Path, images: str | Path | None = None) -> Pairs:
    """Image-caption pairs of a CSV (columns image or filepath, and caption or title), of a JSON list of objects with
    those keys (caption may be a list), or of a folder where each image has a .txt beside it.

    Args:
        images: folder of the images, if it is not that of the file.

    Raises:
        DataError: missing files, columns, captions or images; file and line are named.
    """
    path = existing(source, "captions")
    if path.is_dir():
        rows = [(p, Path(p).with_suffix(".txt")) for p in images_below(path)]
        if gone := [p for p, text in rows if not text.is_file()]:
            raise DataError(f"{gone[0]}: no caption beside it ({Path(gone[0]).stem}.txt is missing)")
        return _pairs([(p, text.read_text(encoding=_UTF8), str(text)) for p, text in rows], path)
    folder = Path(images).expanduser() if images is not None else path.parent
    entries = _csv_rows(path) if path.suffix.lower() != ".json" else _json_rows(path)
    return _pairs([(str(folder / name), text, where) for name, text, where in entries], path)


def _csv_rows(path: Path) -> list[tuple[str, str, str]]:
    """Of a file with commas, or with tabs as open_clip's own training has them."""
    with path.open(encoding=_UTF8, newline="") as file:
        delimiter = "\t" if "\t" in file.readline() else ","
        file.seek(0)
        reader = csv.DictReader(file, delimiter=delimiter)
        columns = reader.fieldnames or []
        image, text = (next((c for c in names if c in columns), None) for names in _COLUMNS)
        if image is None or text is None:
            raise DataError(f"{path}: columns {columns}; expected one of {_COLUMNS[0]} and one of {_COLUMNS[1]}")
        rows = []
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row:  # what is behind the last column
                raise DataError(f"{where}: more fields than columns {columns}; a caption with a comma needs quotes")
            rows.append((row[image] or "", row[text] or "", where))
        return rows


_COLUMNS = (("image", "filepath", "file_name", "path"), ("caption", "title", "text"))


def _json_rows(path: Path) -> list[tuple[str, str, str]]:
    try:
        items: Any = json.loads(path.read_text(encoding=_UTF8))
    except ValueError as error:
        raise DataError(f"{path}: no JSON ({error})") from error
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise DataError(f'{path}: expected a JSON list of objects such as {{"image": "a.jpg", "caption": "a dog"}}')
    rows = []
    for number, item in enumerate(items):
        image, text = (next((item[c] for c in names if c in item), None) for names in _COLUMNS)
        if image is None or text is None:
            raise DataError(f"{path}: entry {number} has {sorted(item)}; expected an image and a caption")
        rows += [(str(image), str(t), f"{path}[{number}]") for t in (text if isinstance(text, list) else [text])]
    return rows


def _pairs(rows: list[tuple[str, str, str]], source: Path) -> Pairs:
    if not rows:
        raise DataError(f"{source}: no image with a caption")
    index: dict[str, int] = {}
    where: list[str] = []
    for path, text, line in rows:
        if not text.strip():
            raise DataError(f"{line}: empty caption of {path}")
        if path not in index:
            if not Path(path).is_file():
                raise DataError(f"{path} (listed in {line}): no such image file")
            index[path] = len(index)
            where.append(line)
    found = ImageSet(FileSource(list(index), where), np.zeros(len(index), dtype=np.int64))
    owner = np.array([index[path] for path, *_ in rows], dtype=np.int64)
    return Pairs(found, [" ".join(text.split()) for _, text, _ in rows], owner)
