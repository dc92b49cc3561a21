"""Everything that is wrong with data on disk, before an experiment finds it one by one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from visionpeft.data import csv, fewshot, fgvc, folder, vtab
from visionpeft.data.images import read_image
from visionpeft.data.lists import Problem
from visionpeft.data.sets import existing
from visionpeft.errors import DataError

CheckOne = Callable[[Path, str], tuple[list[Problem], dict[str, str]]]
MEMBERS: dict[str, tuple[Iterable[str], CheckOne]] = {
    "vtab": (vtab.TASKS, vtab.check_task),
    "fgvc": (fgvc.SETS, fgvc.check_set),
    "fewshot": (fewshot.SETS, fewshot.check_set),
}
KINDS = (*MEMBERS, "folder", "csv")


def check(root: str | Path, kind: str = "vtab", images: bool = True) -> list[Problem]:
    """All problems of the data below `root`; an empty list is a clean bill.

    Missing tasks, lists and images, labels out of range, wrong counts, empty class folders, and, unless `images` is
    False, images that do not decode (VTAB-1k holds half a million: minutes to an hour).

    Raises:
        DataError: `root` does not exist, or `kind` is unknown.
    """
    root = existing(root, f"{kind} data")
    if kind in MEMBERS:
        names, check_one = MEMBERS[kind]
        return [problem for name in names for problem in _with_images(*check_one(root, name), images)]
    if kind == "folder":
        return _with_images(*_check_folder(root), images)
    if kind == "csv":
        rows, problems = csv.read_rows(root)
        return _with_images(problems, {row.path: f"{root}:{row.line}" for row in rows}, images)
    raise DataError(f"cannot check data of kind {kind!r}: use one of {', '.join(KINDS)}")


def _with_images(problems: list[Problem], images: Mapping[str, str], decode: bool) -> list[Problem]:
    """`problems` and those of the images; `images` maps each path to the "file:line" that names it."""
    if not decode:
        return problems
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter lock
        found = pool.map(_decoding_error, images)
        return problems + [_problem(images[path], why) for path, why in zip(images, found, strict=True) if why]


def _decoding_error(path: str) -> str:
    try:
        read_image(path)
    except DataError as error:
        return str(error)
    return ""


def _problem(where: str, message: str) -> Problem:
    named = re.fullmatch(r"(.+):(\d+)", where)
    return Problem(named[1], int(named[2]), message) if named else Problem(where, None, message)


def _check_folder(root: Path) -> tuple[list[Problem], dict[str, str]]:
    try:
        parts = list(folder.class_parts(root).values()) or [root]
    except DataError as error:
        return [Problem(str(root), None, str(error))], {}
    problems: list[Problem] = []
    images: dict[str, str] = {}
    trained: list[str] | None = None
    for part in parts:
        names = folder.visible_folders(part)
        trained = names if trained is None else trained
        if len(trained) < 2 and names is trained:
            problems.append(Problem(str(part), None, f"{len(names)} class folder(s), expected one per class"))
        for name in names:
            found = folder.images_below(part / name)
            images.update((path, str(part / name)) for path in found)
            if not found:
                problems.append(Problem(str(part / name), None, "no image in this class folder"))
            if name not in trained:
                problems.append(Problem(str(part / name), None, "this class does not occur in train"))
    return problems, images
