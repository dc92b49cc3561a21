"""Text lists of "<relative path> <label>" lines. Loading raises the first problem, checking collects all of them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from visionpeft.data.sets import FileSource, ImageSet
from visionpeft.errors import DataError


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and where."""

    file: str
    line: int | None
    message: str

    def __str__(self) -> str:
        return f"{self.file}{f':{self.line}' if self.line else ''}: {self.message}"


@dataclass
class Listing:
    """The good lines of a list (paths, labels, "file:line" of each) and the problems with the rest."""

    file: str
    paths: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    where: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    lines: int = 0

    def wrong_count(self, expected: Sequence[int]) -> list[Problem]:
        """A problem if the list has another number of lines; none if the list itself is missing."""
        if not expected or self.lines in expected or (self.problems and not self.lines):
            return []
        return [Problem(self.file, None, f"{self.lines:,} lines, expected {' or '.join(f'{n:,}' for n in expected)}")]


def read_list(file: Path, folder: Path, num_classes: int) -> Listing:
    """Read `file`; its paths are relative to `folder`, its labels count from zero."""
    listing = Listing(str(file))
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "list is missing" if isinstance(error, FileNotFoundError) else f"cannot read this list ({error})"
        listing.problems.append(Problem(str(file), None, reason))
        return listing
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            listing.lines += 1
            _read_line(listing, number, line, folder, num_classes)
    if not listing.lines:
        listing.problems.append(Problem(str(file), None, "list is empty"))
    return listing


def image_list(listing: Listing) -> ImageSet:
    """The images of a list without problems.

    Raises:
        DataError: the first problem, and how many there are.
    """
    raise_first(listing.problems)
    return ImageSet(FileSource(listing.paths, listing.where), np.array(listing.labels, dtype=np.int64))


def raise_first(problems: Sequence[Problem]) -> None:
    """DataError for the first of `problems`, if any."""
    if problems:
        more = f" (and {len(problems) - 1} more; `visionpeft data check` lists them)" if len(problems) > 1 else ""
        raise DataError(f"{problems[0]}{more}")


def warn_count(listing: Listing, expected: Sequence[int]) -> None:
    """A list of another length than the benchmark's still loads, but its numbers do not compare: say so."""
    for problem in listing.wrong_count(expected):
        warnings.warn(f"{problem}; results will not compare with published ones", stacklevel=3)


def _read_line(listing: Listing, number: int, line: str, folder: Path, num_classes: int) -> None:
    name, _, label = line.strip().rpartition(" ")
    problem = None
    if not name or not label.lstrip("-").isdigit():
        problem = f"expected '<path> <label>', got {line.strip()!r}"
    elif not 0 <= int(label) < num_classes:
        problem = f"label {label} is outside 0..{num_classes - 1}"
    elif not os.path.isfile(folder / name):
        problem = f"image {folder / name} is missing"
    if problem:
        listing.problems.append(Problem(listing.file, number, problem))
        return
    listing.paths.append(str(folder / name))
    listing.labels.append(int(label))
    listing.where.append(f"{listing.file}:{number}")
