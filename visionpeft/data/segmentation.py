"""Data sets with masks, from a spec to Splits.

    splits = load_segmentation("folder:camvid")
    splits = load_segmentation("folder:cells?train=100", mask_values=(0, 255))

Layouts:

    folder       root/{train,val,test}/x.jpg with root/{train,val,test}annot/x.png (CamVid; also _masks, _labels), or
                 root/images/ and root/masks/ (also annotations, labels), each with folders train, val, test or without
    voc          root/JPEGImages, SegmentationClass, ImageSets/Segmentation/{train,val}.txt; 255 is ignored
    ade20k       root/images/{training,validation}, root/annotations/...; 0 is ignored, 1 to 150 are the classes
    cityscapes   root/leftImg8bit/{train,val}/city, root/gtFine/...labelIds.png; the 19 classes of its benchmark

Where the published test masks are secret, val is the test set. A missing val is held out of train, a missing test too.
A folder may hold classes.txt with a line per class: `name`, for colour masks `name red green blue`; a line
`name(ignore=11)`, or `name(ignore) red green blue`, is no class.
"""

from __future__ import annotations

import importlib.resources
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from visionpeft.data.folder import PARTS, images_below, part_folders
from visionpeft.data.masks import Colour, MaskedSet, MaskFormat, PairArrays, PairFiles, masked_set, read_mask
from visionpeft.data.registry import subset_options
from visionpeft.data.sets import Splits, existing
from visionpeft.data.splitting import complete, subset
from visionpeft.errors import DataError

BUNDLED = "textured_shapes"
VOC = ("background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
       "pottedplant sheep sofa train tvmonitor").split()
CITYSCAPES = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19,
    "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26, "truck": 27,
    "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
}  # fmt: skip
IMAGES, MASKS = ("images", "JPEGImages"), ("masks", "annotations", "labels")
SUFFIXES = ("annot", "_annot", "_masks", "_labels", "masks", "labels")


def load_segmentation(spec: str, *, root: str | None = None, mask_values: Sequence[int] = (),
                      ignore_index: int | None = None, seed: int = 0) -> Splits:
    """Load a data set of images and masks; its parts are MaskedSets.

    Args:
        spec: "bundled", "bundled-shift" (the same classes, drawn otherwise), or a layout and a path, such as
            "folder:<path>"; an ending "?train=100&test=50" draws a fixed subset.
        root: folder that paths are relative to.
        mask_values: for folders, the number that stands for each class in the masks.
        ignore_index: for folders, a number in the masks that means no class.

    Raises:
        DataError: unknown spec, missing or unfit files (named), or masks with values that stand for nothing.
    """
    base, options = subset_options(spec)
    kind, _, name = base.partition(":")
    if kind != "folder" and (mask_values or ignore_index is not None):
        raise DataError(f"{spec!r} says itself what its masks mean: mask values and ignore index go with folder:<path>")
    if kind not in LAYOUTS or bool(name) == kind.startswith("bundled"):
        raise DataError(f"unknown data {spec!r}: use bundled, bundled-shift, "
                        + ", ".join(f"{k}:<path>" for k in LAYOUTS if not k.startswith("bundled")))
    path = Path(root or "", Path(name).expanduser())
    if kind == "folder":
        splits = load_folder(path, mask_values, ignore_index, seed)
    else:
        splits = LAYOUTS[kind](path, seed)
    return subset(splits, options.get("train"), options.get("test"), options.get("seed", 0)) if options else splits


def load_folder(root: Path, mask_values: Sequence[int] = (), ignore_index: int | None = None, seed: int = 0) -> Splits:
    """Folders of images with folders of masks; files belong together by name."""
    root = existing(root, "folder of images and masks")
    pairs = {part: _pairs(*folders) for part, folders in _part_folders(root).items()}
    form = _format(root, pairs["train"][1], tuple(mask_values), ignore_index)
    if len(form.classes) < 2:
        raise DataError(f"{root}: its masks hold {form.classes[0]!r} and nothing else that counts, so that there is "
                        "nothing to learn; look at --ignore-index, --mask-values and classes.txt")
    parts = {part: masked_set(PairFiles(*both, form)) for part, both in pairs.items()}
    return complete(root.name, list(form.classes), parts["train"], parts.get("val"), parts.get("test"), seed=seed)


def _part_folders(root: Path) -> dict[str, tuple[Path, Path]]:
    """Folders of images and of masks of each part that there is."""
    both = [_first(root, names) for names in (IMAGES, MASKS)]
    if both[0] and both[1]:
        images, masks = both[0], both[1]
        found = {part: (folder, masks / folder.name) for part, folder in part_folders(images).items()}
        return found or {"train": (images, masks)}
    found = {}
    for part, names in PARTS.items():
        folder = _first(root, names)
        annotated = folder and _first(root, [folder.name + suffix for suffix in SUFFIXES])
        if folder and annotated:
            found[part] = (folder, annotated)
        elif folder and part != "train":
            raise DataError(f"{folder}: no folder of masks beside it ({folder.name}annot, ...): add it, or take these "
                            "images away to have some of train held out instead")
    if "train" not in found:
        raise DataError(f"{root}: found neither train/ with trainannot/ nor images/ with masks/; see "
                        "visionpeft.data.segmentation for the layouts")
    return found


def _first(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _pairs(images: Path, masks: Path) -> tuple[list[str], list[str]]:
    """Image files and the mask of each, found by name without ending."""
    existing(masks, "folder of masks")
    by_name = {_stem(path, masks): path for path in images_below(masks)}
    found = images_below(images)
    if not found:
        raise DataError(f"{images}: no image here")
    if missing := [path for path in found if _stem(path, images) not in by_name]:
        raise DataError(f"{missing[0]}: has no mask {masks / _stem(missing[0], images)}.png"
                        + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""))
    if extra := sorted(by_name.keys() - {_stem(path, images) for path in found}):
        raise DataError(f"{by_name[extra[0]]}: this mask has no image in {images}")
    return found, [by_name[_stem(path, images)] for path in found]


def _stem(path: str, folder: Path) -> str:
    return os.path.splitext(os.path.relpath(path, folder))[0]


def _format(root: Path, masks: Sequence[str], values: tuple[int, ...], ignore: int | None) -> MaskFormat:
    """What the masks of a folder mean: from classes.txt, the values given, or else the values found in train."""
    ignored = () if ignore is None else (ignore,)
    if (root / "classes.txt").is_file():
        return _classes_file(root / "classes.txt", values or None, ignored)
    if values:
        return MaskFormat(tuple(f"class {v}" for v in values), values, ignored)
    found = sorted(set().union(*(_numbers(mask) for mask in masks)) - set(ignored))
    if found != list(range(len(found))):
        given = " ".join(map(str, found[:8])) + (" ..." if len(found) > 8 else "")
        raise DataError(f"{root}: masks hold the values {given}, which are no class numbers 0, 1, 2, ...: pass "
                        f"--mask-values {given}, or --ignore-index for one that means no class")
    return MaskFormat(tuple(f"class {v}" for v in found), ignore=ignored)


def _numbers(mask: str) -> set[int]:
    pixels = read_mask(mask)
    if pixels.ndim == 3:
        raise DataError(f"{mask}: this mask is a colour picture: write classes.txt with lines 'name red green blue'")
    return set(np.unique(pixels).tolist())


_LINE = re.compile(r"(?P<name>.*?)\s*(?P<ignored>\(ignore(=(?P<value>\d+))?\))?(\s+(?P<colour>\d+\s+\d+\s+\d+))?")


def _classes_file(file: Path, values: tuple[int, ...] | None, ignored: tuple[int, ...]) -> MaskFormat:
    names: list[str] = []
    colours: list[Colour] = []
    no_colours: list[Colour] = []
    no_values = list(ignored)
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        part = _LINE.fullmatch(line.strip())
        assert part is not None
        colour = [_colour(part["colour"])] if part["colour"] else []
        if part["ignored"]:
            no_colours += colour
            no_values += [int(part["value"])] if part["value"] else []
            continue
        names.append(part["name"])
        colours += colour
        if colours and len(colours) != len(names):
            raise DataError(f"{file}:{number}: some classes have a colour and this one has none")
    return MaskFormat(tuple(names), values, tuple(no_values), tuple(colours) or None, tuple(no_colours))


def _colour(text: str) -> Colour:
    red, green, blue = map(int, text.split())
    return red, green, blue


# ---- benchmarks ------------------------------------------------------------------------------------------------------


def load_voc(root: Path, seed: int = 0) -> Splits:
    """Pascal VOC 2012; `root` is the folder of the year, or VOCdevkit."""
    root = existing(root, "VOC folder")
    root = root / "VOC2012" if (root / "VOC2012").is_dir() else root
    form = MaskFormat(tuple(VOC), ignore=(255,))
    train, val = (_voc_part(root, part, form) for part in ("train", "val"))
    return complete("voc", VOC, train, test=val, seed=seed)


def _voc_part(root: Path, part: str, form: MaskFormat) -> MaskedSet:
    listed = existing(root / "ImageSets" / "Segmentation" / f"{part}.txt", "VOC list").read_text().split()
    images, masks = ([str(root / folder / f"{name}{ending}") for name in listed]
                     for folder, ending in (("JPEGImages", ".jpg"), ("SegmentationClass", ".png")))
    return masked_set(PairFiles(images, masks, form))


def load_ade20k(root: Path, seed: int = 0) -> Splits:
    """ADEChallengeData2016; class names come from objectInfo150.txt where that is there."""
    root = existing(root, "ADE20K folder")
    info = root / "objectInfo150.txt"
    names = [f"class {i}" for i in range(1, 151)]
    if info.is_file():
        names = [line.split("\t")[-1].split(",")[0].strip() for line in info.read_text().splitlines()[1:151]]
    form = MaskFormat(tuple(names), tuple(range(1, 151)), ignore=(0,))
    train, val = (masked_set(PairFiles(*_pairs(root / "images" / part, root / "annotations" / part), form))
                  for part in ("training", "validation"))
    return complete("ade20k", names, train, test=val, seed=seed)


def load_cityscapes(root: Path, seed: int = 0) -> Splits:
    """Cityscapes with fine labels; all ids but those of the 19 classes are ignored, as its benchmark does."""
    root = existing(root, "Cityscapes folder")
    others = tuple(sorted({*range(34), 255} - set(CITYSCAPES.values())))
    form = MaskFormat(tuple(CITYSCAPES), tuple(CITYSCAPES.values()), ignore=others)
    train, val = (_cityscapes_part(root, part, form) for part in ("train", "val"))
    return complete("cityscapes", list(CITYSCAPES), train, test=val, seed=seed)


def _cityscapes_part(root: Path, part: str, form: MaskFormat) -> MaskedSet:
    images = images_below(existing(root / "leftImg8bit" / part, "Cityscapes images"))
    masks = [str(root / "gtFine" / os.path.relpath(image, root / "leftImg8bit").replace(
        "_leftImg8bit.png", "_gtFine_labelIds.png")) for image in images]
    if missing := [mask for mask in masks if not os.path.isfile(mask)]:
        raise DataError(f"{missing[0]}: this mask is missing ({len(missing)} in all)")
    if not images:
        raise DataError(f"{root / 'leftImg8bit' / part}: no image here")
    return masked_set(PairFiles(images, masks, form))


def load_bundled(test: str = "test", seed: int = 0) -> Splits:
    """The drawn shapes that come with the library; `test` names the part to test on, "test" or "shift"."""
    resource = importlib.resources.files("visionpeft.assets") / f"{BUNDLED}.npz"
    if not resource.is_file():
        raise DataError(f"{BUNDLED}.npz is not among the installed assets; run scripts/draw_shapes.py or reinstall")
    with resource.open("rb") as file, np.load(file, allow_pickle=False) as archive:  # type: ignore[arg-type]
        arrays = {key: archive[key] for key in archive.files}
    form = MaskFormat(tuple(str(c) for c in arrays["classes"]))
    train, tested = (masked_set(PairArrays(arrays[f"{p}_x"], arrays[f"{p}_mask"], form, f"{BUNDLED}:{p}"))
                     for p in ("train", test))
    return complete(BUNDLED, list(form.classes), train, test=tested, seed=seed)


LAYOUTS: dict[str, Callable[[Path, int], Splits]] = {
    "bundled": lambda path, seed: load_bundled("test", seed),
    "bundled-shift": lambda path, seed: load_bundled("shift", seed),
    "folder": lambda path, seed: load_folder(path, seed=seed),
    "voc": load_voc,
    "ade20k": load_ade20k,
    "cityscapes": load_cityscapes,
}
