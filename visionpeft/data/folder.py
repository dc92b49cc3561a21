"""A folder per class: `root/<class>/image`, or `root/{train,val,test}/<class>/image`."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from visionpeft.data.images import EXTENSIONS
from visionpeft.data.sets import FileSource, ImageSet, Splits, existing
from visionpeft.data.splitting import complete
from visionpeft.errors import DataError

PARTS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


def load_folder(root: str | Path, seed: int = 0) -> Splits:
    """Images in folders named after their class; missing parts are held out as `splitting.complete` says.

    Classes are the sorted folder names of train. Images deeper inside a class folder count. EXIF rotation is applied.

    Raises:
        DataError: no class folder, an empty one (named), or a class of val or test that train lacks.
    """
    root = existing(root, "image folder")
    if not (root / "train").is_dir():
        classes = class_folders(root)
        return complete(root.name, classes, read_part(root, classes), seed=seed)
    classes = class_folders(root / "train")
    parts = {part: read_part(folder, classes) for part in PARTS if (folder := _part_folder(root, part))}
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


def _part_folder(root: Path, part: str) -> Path | None:
    found = [root / name for name in PARTS[part] if (root / name).is_dir()]
    return found[0] if found else None
