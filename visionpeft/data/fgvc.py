"""The five fine-grained sets in the layout of VPT (KMnP/vpt).

    <root>/<set>/{train,val,test}.json     {"relative image name": label, ...}

Labels are any integers; sorted, they become 0..C-1. The published loaders ignore EXIF.
"""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from visionpeft.data.lists import Listing, Problem, raise_first
from visionpeft.data.sets import FileSource, ImageSet, Splits, existing
from visionpeft.data.splitting import complete


@dataclass(frozen=True)
class FineGrained:
    """Number of classes, and where the images are below the folder of the set."""

    num_classes: int
    images: str


SETS = {
    "CUB_200_2011": FineGrained(200, "images"),
    "nabirds": FineGrained(555, "images"),
    "OxfordFlowers": FineGrained(102, ""),
    "StanfordDogs": FineGrained(120, "Images"),
    "StanfordCars": FineGrained(196, ""),
}


def load_fgvc(name: str, root: str | Path, seed: int = 0) -> Splits:
    """One set; `train_val` is train and val together. Without a val.json, 20 % of train is held out by `seed`.

    Raises:
        DataError: a missing list or image, or a class of val or test that train lacks; the file is named.
    """
    folder = existing(Path(root).expanduser() / name, "FGVC folder")
    listings = _read(folder, name)
    for listing in listings.values():
        raise_first(listing.problems)
    found = sorted(set(listings["train"].labels))
    expected = SETS[name].num_classes
    if len(found) != expected:
        warnings.warn(f"{folder / 'train.json'}: {len(found)} classes, expected {expected}; "
                      "results will not compare with published ones", stacklevel=2)
    parts = {part: _image_set(listing, found) for part, listing in listings.items()}
    return complete(name, [str(c) for c in found], parts["train"], parts.get("val"), parts["test"], seed=seed)


def check_set(root: Path, name: str) -> tuple[list[Problem], dict[str, str]]:
    """All that is wrong with a set's lists, and its images with the list that names each."""
    folder = root / name
    if not folder.is_dir():
        return [Problem(str(folder), None, "folder of the set is missing")], {}
    problems: list[Problem] = []
    images: dict[str, str] = {}
    listings = _read(folder, name)
    for listing in listings.values():
        problems += listing.problems
        images.update(zip(listing.paths, listing.where, strict=True))
    classes, expected = len(set(listings["train"].labels)), SETS[name].num_classes
    if classes and classes != expected:
        problems.append(Problem(listings["train"].file, None, f"{classes} classes, expected {expected}"))
    return problems, images


def _read(folder: Path, name: str) -> dict[str, Listing]:
    """The lists of a set; val is optional, and val and test may only have classes of train."""
    images = folder / SETS[name].images
    listings = {part: _read_json(folder / f"{part}.json", images) for part in ("train", "test")}
    if (folder / "val.json").exists():
        listings["val"] = _read_json(folder / "val.json", images)
    known = set(listings["train"].labels)
    for listing in listings.values():
        unknown = sorted(set(listing.labels) - known)
        if unknown and known:
            listing.problems.append(Problem(listing.file, None, f"label {unknown[0]} does not occur in train.json"))
    return listings


def _read_json(file: Path, images: Path) -> Listing:
    listing = Listing(str(file))
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = "list is missing" if isinstance(error, FileNotFoundError) else f"not a readable JSON file ({error})"
        listing.problems.append(Problem(str(file), None, reason))
        return listing
    if not isinstance(entries, dict) or not entries:
        listing.problems.append(Problem(str(file), None, 'expected {"image name": label, ...}'))
        return listing
    for name, label in entries.items():
        _add(listing, name, label, images)
    return listing


def _add(listing: Listing, name: str, label: object, images: Path) -> None:
    listing.lines += 1
    if not str(label).isdigit():
        listing.problems.append(Problem(listing.file, None, f"label {label!r} of {name} is not a whole number"))
    elif not os.path.isfile(images / name):
        listing.problems.append(Problem(listing.file, None, f"image {images / name} is missing"))
    else:
        listing.paths.append(str(images / name))
        listing.labels.append(int(str(label)))
        listing.where.append(listing.file)


def _image_set(listing: Listing, classes: list[int]) -> ImageSet:
    return ImageSet(FileSource(listing.paths, listing.where), np.searchsorted(classes, listing.labels).astype(np.int64))
