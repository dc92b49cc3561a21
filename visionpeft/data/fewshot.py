"""Few-shot fine-grained sets with the lists of NOAH (ZhangYuanhan-AI/NOAH).

    <root>/<set>/annotations/train_meta.list.num_shot_{1,2,4,8,16}.seed_{0,1,2}, val_meta.list, test_meta.list
    lines: <relative path> <label>, relative to <root>/<set>/images (Cars: to <root>/<set>)

The 1-shot lists of Oxford Pets name each of their 37 images twice (74 lines); they are used as published.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from visionpeft.data.lists import Listing, Problem, image_list, read_list, warn_count
from visionpeft.data.sets import Splits, existing
from visionpeft.errors import DataError

SHOTS = (1, 2, 4, 8, 16)
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class FewShot:
    """Number of classes, size of the test list, and where the images are below the folder of the set."""

    num_classes: int
    test: int
    images: str = "images"

    def train_lines(self, shots: int) -> tuple[int, ...]:
        """Lines of a training list: one per class and shot, or two in Pets' 1-shot lists."""
        doubled = (2 * self.num_classes,) if shots == 1 and self.num_classes == 37 else ()
        return (shots * self.num_classes, *doubled)


SETS = {
    "fgvc-aircraft": FewShot(100, 3_333),
    "food101": FewShot(101, 30_300),
    "oxford-flowers102": FewShot(102, 2_463),
    "oxford-pets": FewShot(37, 3_669),
    "standford-cars": FewShot(196, 8_041, images=""),  # spelt so in the lists' own folder
}


def load_fewshot(name: str, root: str | Path, shots: int | None, seed: int = 0) -> Splits:
    """One set with the list of `shots` and `seed`. `train_val` is that list too: K shots stay K shots.

    Raises:
        DataError: no `shots`, no such list, a missing image or a label out of range; file and line are named.
    """
    if shots not in SHOTS or seed not in SEEDS:
        raise DataError(f"fewshot:{name} with shots={shots}, seed={seed}: lists exist for shots {SHOTS}, seeds {SEEDS}")
    folder = existing(Path(root).expanduser() / name, "few-shot folder")
    listings = {part: _read(folder, name, file) for part, file in _files(shots, seed).items()}
    warn_count(listings["train"], SETS[name].train_lines(shots))
    warn_count(listings["test"], (SETS[name].test,))
    parts = {part: image_list(listing) for part, listing in listings.items()}
    classes = [str(c) for c in range(SETS[name].num_classes)]
    return Splits(name, classes, None, False, parts["train"], parts["val"], parts["train"], parts["test"])


def check_set(root: Path, name: str) -> tuple[list[Problem], dict[str, str]]:
    """All that is wrong with a set's lists (of every shot and seed), and its images with the line that names each."""
    folder = root / name
    if not folder.is_dir():
        return [Problem(str(folder), None, "folder of the set is missing")], {}
    problems: list[Problem] = []
    images: dict[str, str] = {}
    for file, expected in _expected(name).items():
        listing = _read(folder, name, file)
        problems += listing.problems + listing.wrong_count(expected)
        images.update(zip(listing.paths, listing.where, strict=True))
    return problems, images


def _expected(name: str) -> dict[str, tuple[int, ...]]:
    files = {_files(k, s)["train"]: SETS[name].train_lines(k) for k in SHOTS for s in SEEDS}
    return {**files, "val_meta.list": (), "test_meta.list": (SETS[name].test,)}


def _files(shots: int, seed: int) -> dict[str, str]:
    return {
        "train": f"train_meta.list.num_shot_{shots}.seed_{seed}",
        "val": "val_meta.list",
        "test": "test_meta.list",
    }


def _read(folder: Path, name: str, file: str) -> Listing:
    return read_list(folder / "annotations" / file, folder / SETS[name].images, SETS[name].num_classes)
