"""A table of image paths and labels.

    path,label,split
    cats/1.jpg,cat,train
    zoo/7.jpg,cat;dog,test

Paths are relative to the table. Labels with `;` or `|` make the whole table multi-label (an empty label is then "none
of them"); a column `split` with train, val and test is optional. EXIF rotation is applied.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from visionpeft.data.lists import Problem, raise_first
from visionpeft.data.sets import FileSource, ImageSet, Splits, existing
from visionpeft.data.splitting import complete
from visionpeft.errors import DataError

SEPARATORS = re.compile("[;|]")


@dataclass(frozen=True)
class Row:
    """One line: file, label as written, split or "", and its line number."""

    path: str
    label: str
    split: str
    line: int


def load_csv(file: str | Path, seed: int = 0) -> Splits:
    """Read a table; missing parts are held out as `splitting.complete` says.

    Classes are the sorted labels, by number if all are whole numbers.

    Raises:
        DataError: bad header, or a line with a missing image, an empty label or an unknown split (line named).
    """
    file = existing(file, "csv table")
    rows, problems = read_rows(file)
    raise_first(problems)
    multi = is_multi_label(rows)
    classes = _classes(rows, multi)
    parts = {}
    for part in ("train", "val", "test"):
        if chosen := [row for row in rows if (row.split or "train") == part]:
            parts[part] = _image_set(file, chosen, classes, multi)
    if "train" not in parts:
        raise DataError(f"{file}: no row is of split 'train'")
    _check_trained(file, parts["train"], classes)
    return complete(file.stem, classes, parts["train"], parts.get("val"), parts.get("test"), seed=seed)


def read_rows(file: Path) -> tuple[list[Row], list[Problem]]:
    """The good rows of a table, and what is wrong with the others."""
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            if not {"path", "label"} <= set(reader.fieldnames or ()):
                return [], [Problem(str(file), 1, f"the header must have path and label, found {reader.fieldnames}")]
            rows = [_row(entry, file, reader.line_num) for entry in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        return [], [Problem(str(file), None, f"cannot read this table ({error})")]
    if not rows:
        return [], [Problem(str(file), None, "table has no rows")]
    checked = [(row, _wrong(row, is_multi_label(rows))) for row in rows]
    return ([row for row, wrong in checked if not wrong],
            [Problem(str(file), row.line, wrong) for row, wrong in checked if wrong])


def is_multi_label(rows: list[Row]) -> bool:
    """Whether any row has several labels."""
    return any(SEPARATORS.search(row.label) for row in rows)


def _row(entry: dict[str, str | None], file: Path, line: int) -> Row:
    path, label, split = ((entry.get(key) or "").strip() for key in ("path", "label", "split"))
    return Row(str(file.parent / path) if path else "", label, split.lower(), line)


def _wrong(row: Row, multi: bool) -> str:
    if not row.path:
        return "path is empty"
    if not row.label and not multi:
        return "label is empty"
    if row.split not in ("", "train", "val", "test"):
        return f"split {row.split!r} is none of train, val, test"
    return "" if Path(row.path).is_file() else f"image {row.path} is missing"


def _labels(row: Row, multi: bool) -> list[str]:
    return [part.strip() for part in SEPARATORS.split(row.label) if part.strip()] if multi else [row.label]


def _classes(rows: list[Row], multi: bool) -> list[str]:
    names = {label for row in rows for label in _labels(row, multi)}
    return sorted(names, key=int) if all(re.fullmatch(r"\d+", name) for name in names) else sorted(names)


def _image_set(file: Path, rows: list[Row], classes: list[str], multi: bool) -> ImageSet:
    index = {name: i for i, name in enumerate(classes)}
    source = FileSource([row.path for row in rows], [f"{file}:{row.line}" for row in rows], exif=True)
    if not multi:
        return ImageSet(source, np.array([index[row.label] for row in rows], dtype=np.int64))
    labels = np.zeros((len(rows), len(classes)), dtype=np.float32)
    for i, row in enumerate(rows):
        labels[i, [index[label] for label in _labels(row, multi)]] = 1
    return ImageSet(source, labels)


def _check_trained(file: Path, train: ImageSet, classes: list[str]) -> None:
    multi = train.labels.ndim == 2
    seen = set(np.flatnonzero(train.labels.sum(0))) if multi else set(train.labels)
    if unseen := [name for i, name in enumerate(classes) if i not in seen]:
        raise DataError(f"{file}: class {unseen[0]!r} has no row of split 'train'")
    if len(classes) < 2 and not multi:
        raise DataError(f"{file}: only one class, {classes}")
