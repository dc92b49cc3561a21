"""A folder per class: `root/<class>/image`, or `root/{train,val,test}/<class>/image`."""

from __future__ import annotations

import os
from itertools import chain
from pathlib import Path

import numpy as np

from visionpeft.data.images import EXTENSIONS
from visionpeft.data.sets import FileSource, ImageSet, Splits, existing
from visionpeft.data.splitting import complete
from visionpeft.errors import DataError

PARTS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


def load_folder(root: str | Path, seed: int = 0) -> Splits:
    """Images in folders named after their class; missing parts are held out as `splitting.complete` says.

    Classes are the sorted folder names of train. Images deeper inside a class folder count. EXIF rotation is applied.

    Raises:
        DataError: no class folder, an empty one (named), a class of val or test that train lacks, or these without
            train.
    """
    root = existing(root, "image folder")
    folders = class_parts(root)
    if not folders:
        classes = class_folders(root)
        return complete(root.name, classes, read_part(root, classes), seed=seed)
    classes = class_folders(folders["train"])
    parts = {part: read_part(folder, classes) for part, folder in folders.items()}
    return complete(root.name, classes, parts["train"], parts.get("val"), parts.get("test"), seed=seed)


def class_folders(folder: Path) -> list[str]:
    """Sorted names of the class folders in `folder`, two at least."""
    names = visible_folders(folder)
    if len(names) < 2:
        raise DataError(f"{folder}: found {len(names)} class folder(s) {names}; expected one folder per class, "
                        "each with its images")
    return names


def visible_folders(folder: Path) -> list[str]:
    """Sorted names of the folders in `folder`, without those that start with a dot or an underscore."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] not in "._")


def read_part(folder: Path, classes: list[str]) -> ImageSet:
    """All images below `folder`, by class and then by path."""
    if unknown := sorted(set(visible_folders(folder)) - set(classes)):
        raise DataError(f"{folder / unknown[0]}: class {unknown[0]!r} does not occur in train")
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        if not (folder / name).is_dir():
            continue  # a class may be absent from val or test; train defines `classes`
        found = images_below(folder / name)
        if not found:
            raise DataError(f"{folder / name}: no image in this class folder ({', '.join(EXTENSIONS)}); "
                            "add images or remove the folder")
        paths += found
        labels += [label] * len(found)
    return ImageSet(FileSource(paths, exif=True), np.array(labels, dtype=np.int64))


def images_below(folder: Path) -> list[str]:
    """Sorted paths of the image files in `folder` and below."""
    return sorted(
        os.path.join(where, file)
        for where, _, files in os.walk(folder, followlinks=True)
        for file in files
        if file.lower().endswith(EXTENSIONS) and not file.startswith(".")
    )


def class_parts(root: Path) -> dict[str, Path]:
    """The folders in `root` that hold parts; none where all are classes, of which one may be called "train"."""
    names = visible_folders(root)
    called = [name for name in names if name.lower() in chain(*PARTS.values())]
    if len(called) < len(names) and not any(visible_folders(root / name) for name in called):
        return {}
    return part_folders(root)


def part_folders(root: Path) -> dict[str, Path]:
    """The folders in `root` that are called as parts are, in any case of letters.

    Raises:
        DataError: there are such, and none for training.
    """
    here = {name.lower(): root / name for name in visible_folders(root)}
    found = {part: here[name] for part, names in PARTS.items() for name in names if name in here}
    if found and "train" not in found:
        raise DataError(f"{root}: found {', '.join(sorted(p.name for p in found.values()))}/ but no train/")
    return found
