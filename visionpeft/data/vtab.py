"""VTAB-1k as the folders that NOAH, SSF and PETL-ViT share.

    <root>/<task>/images/{train800,val200,train800val200,test}/000000.jpg
    <root>/<task>/{train800,val200,train800val200,test}.txt     lines: images/test/000000.jpg 42

The published loaders open the file and convert to RGB: EXIF is ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from visionpeft.data.lists import Problem, image_list, read_list, warn_count
from visionpeft.data.sets import ImageSet, Splits, existing

LISTS = {"train": "train800", "val": "val200", "train_val": "train800val200", "test": "test"}


@dataclass(frozen=True)
class Task:
    """One task: its group, number of classes, and the sizes that its test list may have."""

    group: str
    num_classes: int
    test: tuple[int, ...]

    def counts(self, part: str) -> tuple[int, ...]:
        """The number of images that a part may have."""
        return {"train": (800,), "val": (200,), "train_val": (1000,), "test": self.test}[part]


TASKS = {
    "cifar": Task("natural", 100, (10_000,)),
    "caltech101": Task("natural", 102, (6_084, 6_085)),  # two exports are in circulation
    "dtd": Task("natural", 47, (1_880,)),
    "oxford_flowers102": Task("natural", 102, (6_149,)),
    "oxford_iiit_pet": Task("natural", 37, (3_669,)),
    "svhn": Task("natural", 10, (26_032,)),
    "sun397": Task("natural", 397, (21_750,)),
    "patch_camelyon": Task("specialised", 2, (32_768,)),
    "eurosat": Task("specialised", 10, (5_400,)),
    "resisc45": Task("specialised", 45, (6_300,)),
    "diabetic_retinopathy": Task("specialised", 5, (42_670,)),
    "clevr_count": Task("structured", 8, (15_000,)),
    "clevr_dist": Task("structured", 6, (15_000,)),
    "dmlab": Task("structured", 6, (22_735,)),
    "kitti": Task("structured", 4, (711,)),
    "dsprites_loc": Task("structured", 16, (73_728,)),
    "dsprites_ori": Task("structured", 16, (73_728,)),
    "smallnorb_azi": Task("structured", 18, (12_150,)),
    "smallnorb_ele": Task("structured", 9, (12_150,)),
}
ALIASES = {"cifar100": "cifar", "oxford_pet": "oxford_iiit_pet", "pets": "oxford_iiit_pet",
           "flowers102": "oxford_flowers102"}
GROUPS = ("natural", "specialised", "structured")


def load_vtab(task: str, root: str | Path) -> Splits:
    """One task. `train_val` is its own list of 1,000 images. A count that differs from the benchmark is a warning.

    Raises:
        DataError: a missing folder, list or image, or a label out of range; file and line are named.
    """
    folder = existing(Path(root).expanduser() / task, "VTAB task folder")
    parts = {part: _read_part(folder, part, task) for part in LISTS}
    classes = [str(c) for c in range(TASKS[task].num_classes)]
    return Splits(name=task, classes=classes, group=TASKS[task].group, multi_label=False, **parts)


def check_task(root: Path, task: str) -> tuple[list[Problem], dict[str, str]]:
    """All that is wrong with a task's lists, and its images with the line that names each."""
    folder = root / task
    if not folder.is_dir():
        return [Problem(str(folder), None, "task folder is missing")], {}
    problems: list[Problem] = []
    images: dict[str, str] = {}
    for part, name in LISTS.items():
        listing = read_list(folder / f"{name}.txt", folder, TASKS[task].num_classes)
        problems += listing.problems + listing.wrong_count(TASKS[task].counts(part))
        images.update(zip(listing.paths, listing.where, strict=True))
    return problems, images


def _read_part(folder: Path, part: str, task: str) -> ImageSet:
    listing = read_list(folder / f"{LISTS[part]}.txt", folder, TASKS[task].num_classes)
    warn_count(listing, TASKS[task].counts(part))
    return image_list(listing)
