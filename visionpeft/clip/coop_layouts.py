"""The two sets of CoOp whose folders have no split_zhou_*.json: FGVC-Aircraft has lists, ImageNet folders.

Both give {"train" | "val" | "test": [(path of the image, label, class name), ...]}, paths below the set's folder.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from visionpeft.data.sets import existing
from visionpeft.errors import DataError

Entries = dict[str, list[tuple[str, int, str]]]

SUFFIXES = (".jpeg", ".jpg", ".png")


def aircraft(folder: Path) -> Entries:
    """FGVC-Aircraft: variants.txt names the 100 classes, images_variant_{train,val,test}.txt have "id class name".

    Raises:
        DataError: a list is missing, or a line that names no class of variants.txt.
    """
    labels = {name: i for i, name in enumerate(_lines(folder / "variants.txt"))}
    found: Entries = {}
    for part in ("train", "val", "test"):
        file = folder / f"images_variant_{part}.txt"
        rows = []
        for number, line in enumerate(_lines(file), start=1):
            image, _, name = line.partition(" ")
            if name not in labels:
                raise DataError(f"{file}:{number}: class {name!r} is not in variants.txt")
            rows.append((f"images/{image}.jpg", labels[name], name))
        found[part] = rows
    return found


def imagenet(folder: Path) -> Entries:
    """ImageNet: classnames.txt has "wnid class name", images below images/train/<wnid> and images/val/<wnid>.

    images/val is the test set. To validate on, a tenth of each class (at most 50, at least one image) is held out of
    images/train, by seed 0; CoOp validates on the test images themselves. Two classes of ImageNet have one name: the
    second gets its wnid behind it, which zero-shot classifiers need to tell them apart.

    Raises:
        DataError: classnames.txt or a class's folder is missing, or a class has fewer than two images.
    """
    found: Entries = {"train": [], "val": [], "test": []}
    names: set[str] = set()
    for label, line in enumerate(_lines(folder / "classnames.txt")):
        wnid, _, name = line.partition(" ")
        name = f"{name} ({wnid})" if name in names else name
        names.add(name)
        inside = _images(folder, "train", wnid)
        if len(inside) < 2:
            raise DataError(f"{folder / 'images' / 'train' / wnid}: {len(inside)} images; one is held out to validate")
        order = np.random.default_rng((0, label)).permutation(len(inside))
        held = set(order[: min(max(len(inside) // 10, 1), 50)].tolist())
        for i, path in enumerate(inside):
            found["val" if i in held else "train"].append((path, label, name))
        found["test"] += [(path, label, name) for path in _images(folder, "val", wnid)]
    return found


def _images(folder: Path, part: str, wnid: str) -> list[str]:
    inside = existing(folder / "images" / part / wnid, "folder of a class")
    files = sorted(p.name for p in inside.iterdir() if p.suffix.lower() in SUFFIXES)
    return [f"images/{part}/{wnid}/{name}" for name in files]


def _lines(file: Path) -> list[str]:
    text = existing(file, "list of CoOp's layout").read_text(encoding="utf-8")
    return [line.strip() for line in text.splitlines() if line.strip()]
