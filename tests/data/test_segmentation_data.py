"""Images with masks: what mask values mean, layouts on disk, errors that name the file, crops of both together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from visionpeft.data import Preprocessing
from visionpeft.data.mask_transforms import AUGMENTATIONS, together
from visionpeft.data.masks import (
    IGNORE,
    MaskedSet,
    MaskFormat,
    PairArrays,
    PairFiles,
    masked_set,
    pixel_counts,
    read_mask,
)
from visionpeft.data.segmentation import CITYSCAPES, VOC, load_segmentation
from visionpeft.data.weights import class_weights, weights_of_counts
from visionpeft.errors import DataError
from visionpeft.training.order import seed_all

SPEC = Preprocessing((0.0, 0.0, 0.0), (1 / 255,) * 3, (8, 8))
CAMVID = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "camvid"


def write(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def pair(root: Path, images: str, masks: str, name: str, mask: np.ndarray, ending: str = ".png") -> None:
    picture = np.random.default_rng(len(name)).integers(0, 256, (*mask.shape[:2], 3), dtype=np.uint8)
    write(root / images / f"{name}{ending}", picture)
    write(root / masks / f"{name}.png", mask)


@pytest.fixture
def camvid(tmp_path: Path) -> Path:
    """Three parts in CamVid's layout, ids 0 to 2 and 11 for nothing."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 2), ("test", 3)):
        for i in range(count):
            pair(tmp_path, part, f"{part}annot", f"{i}", rng.choice([0, 1, 2, 11], (6, 7)).astype(np.uint8))
    (tmp_path / "classes.txt").write_text("Sky\nRoad\nTree\nVoid(ignore=11)\n")
    return tmp_path


# ---- what values mean ------------------------------------------------------------------------------------------------


def test_values_become_classes_and_ignored_ones_255() -> None:
    form = MaskFormat(("a", "b", "c"), values=(7, 0, 300), ignore=(9,))
    pixels = np.array([[7, 0], [300, 9]], np.uint16)
    assert form.decode(pixels, "m").tolist() == [[0, 1], [2, IGNORE]]


def test_colours_become_classes() -> None:
    form = MaskFormat(("a", "b"), colours=((255, 0, 0), (0, 0, 1)), ignored_colours=((9, 9, 9),))
    pixels = np.array([[[0, 0, 1], [255, 0, 0]], [[9, 9, 9], [0, 0, 1]]], np.uint8)
    assert form.decode(pixels, "m").tolist() == [[1, 0], [IGNORE, 1]]
    with pytest.raises(DataError, match=r"m: colour \(1, 2, 3\) is not in classes.txt"):
        form.decode(np.full((1, 1, 3), (1, 2, 3), np.uint8), "m")


@pytest.mark.parametrize("values, told", [
    ([0, 255], "m.png: holds 0 and 255 only.*--mask-values 0 255"), ([0, 1, 255], "--ignore-index 255"),
    ([0, 5], r"m.png: value 5 is none of the classes 0..1")])
def test_values_without_meaning_are_told(values: list[int], told: str) -> None:
    with pytest.raises(DataError, match=told):
        MaskFormat(("a", "b")).decode(np.array([values], np.uint8), "m.png")


@pytest.mark.parametrize("fields", [
    {"values": (1,)}, {"values": (1, 1)}, {"colours": ((0, 0, 0),)}, {"values": (1, 2), "ignore": (2,)}])
def test_formats_that_contradict_themselves_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        MaskFormat(("a", "b"), **fields)


def test_palette_pictures_give_their_indices(tmp_path: Path) -> None:
    mask = np.array([[0, 3], [2, 1]], np.uint8)
    image = Image.fromarray(mask)
    image.putpalette([200, 30, 40, 1, 2, 3, 9, 9, 9, 70, 80, 90])
    image.save(tmp_path / "p.png")
    assert Image.open(tmp_path / "p.png").mode == "P" and np.array_equal(read_mask(tmp_path / "p.png"), mask)


def test_sixteen_bits_are_kept(tmp_path: Path) -> None:
    write(tmp_path / "m.png", np.array([[0, 1000], [40000, 7]], np.uint16))
    assert read_mask(tmp_path / "m.png").tolist() == [[0, 1000], [40000, 7]]


# ---- layouts ---------------------------------------------------------------------------------------------------------


def test_camvid_layout(camvid: Path) -> None:
    splits = load_segmentation(f"folder:{camvid}")
    assert splits.classes == ["Sky", "Road", "Tree"]
    assert [len(s) for s in (splits.train, splits.val, splits.train_val, splits.test)] == [4, 2, 6, 3]
    image, mask = splits.train_val[5]
    stored = np.asarray(Image.open(camvid / "valannot" / "1.png"))
    assert np.array_equal(mask, np.where(stored == 11, IGNORE, stored))
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(camvid / "val" / "1.png")))
    assert isinstance(splits.train_val, MaskedSet)


@pytest.mark.parametrize("parted", [False, True])
def test_images_and_masks_layout(tmp_path: Path, parted: bool) -> None:
    """Without parts a fifth is held out for the test, and a fifth of the rest for validation."""
    for i in range(10):
        below = ("train/" if i < 8 else "test/") if parted else ""
        pair(tmp_path, f"images/{below}", f"masks/{below}", f"{i}", np.full((4, 4), i % 2, np.uint8), ".jpg")
    splits = load_segmentation(f"folder:{tmp_path}")
    assert [len(s) for s in (splits.train, splits.val, splits.test)] == [6, 2, 2]
    assert splits.classes == ["class 0", "class 1"]
    paths = {s.path(i) for s in (splits.train, splits.val, splits.test) for i in range(len(s))}
    assert len(paths) == 10


def test_binary_masks_need_their_values(tmp_path: Path) -> None:
    for i in range(5):
        pair(tmp_path, "images", "masks", f"{i}", np.array([[0, 255], [255, 0]], np.uint8))
    with pytest.raises(DataError, match="--mask-values 0 255"):
        load_segmentation(f"folder:{tmp_path}")
    splits = load_segmentation(f"folder:{tmp_path}", mask_values=(0, 255))
    assert splits.train[0][1].tolist() == [[0, 1], [1, 0]]
    (tmp_path / "classes.txt").write_text("ground\nthing\n")
    with pytest.raises(DataError, match="0.png: holds 0 and 255.*--mask-values 0 255"):
        load_segmentation(f"folder:{tmp_path}").train_val[0]
    assert load_segmentation(f"folder:{tmp_path}", mask_values=(0, 255)).classes == ["ground", "thing"]


@pytest.mark.parametrize("values, options", [([0, 255], {"ignore_index": 255}), ([0, 0], {})])
def test_one_class_is_nothing_to_learn(tmp_path: Path, values: list[int], options: dict[str, Any]) -> None:
    for i in range(5):
        pair(tmp_path, "images", "masks", f"{i}", np.array([values, values], np.uint8))
    with pytest.raises(DataError, match="masks hold 'class 0' and nothing else that counts.*--ignore-index"):
        load_segmentation(f"folder:{tmp_path}", **options)


def test_colour_masks_need_their_colours(tmp_path: Path) -> None:
    colours = np.array([[[10, 0, 0], [0, 20, 0]], [[0, 0, 0], [10, 0, 0]]], np.uint8)
    for i in range(5):
        pair(tmp_path, "images", "masks", f"{i}", colours)
    with pytest.raises(DataError, match="colour picture.*classes.txt"):
        load_segmentation(f"folder:{tmp_path}")
    (tmp_path / "classes.txt").write_text("red thing 10 0 0\ngreen 0 20 0\nvoid(ignore) 0 0 0\n")
    splits = load_segmentation(f"folder:{tmp_path}")
    assert splits.classes == ["red thing", "green"] and splits.train[0][1].tolist() == [[0, 1], [IGNORE, 0]]


def test_colours_decide_where_they_are_given(tmp_path: Path) -> None:
    """The numbers of a palette picture, or a grey one, need not be those of the lines in classes.txt."""
    mask = np.array([[2, 0], [1, 2]], np.uint8)
    for i in range(5):
        pair(tmp_path, "images", "masks", f"{i}", mask)
        image = Image.fromarray(mask)
        image.putpalette([0, 0, 0, 10, 0, 0, 0, 20, 0])
        image.save(tmp_path / "masks" / f"{i}.png")
    write(tmp_path / "masks" / "4.png", np.array([[0, 0], [0, 0]], np.uint8))
    (tmp_path / "classes.txt").write_text("green 0 20 0\nblack 0 0 0\nred 10 0 0\n")
    splits = load_segmentation(f"folder:{tmp_path}")
    every = {Path(part.path(i)).name: part[i][1].tolist() for part in (splits.train_val, splits.test)
             for i in range(len(part))}  # fmt: skip
    assert every == {f"{i}.png": [[0, 1], [2, 0]] for i in range(4)} | {"4.png": [[1, 1], [1, 1]]}
    write(tmp_path / "masks" / "4.png", np.array([[0, 1], [0, 0]], np.uint8))
    with pytest.raises(DataError, match=r"colour \(1, 1, 1\) is not in classes.txt; masks of class numbers need"):
        PairFiles([str(tmp_path / "images" / "4.png")], [str(tmp_path / "masks" / "4.png")],
                  splits.train.source.format).mask(0)  # type: ignore[attr-defined]


@pytest.mark.parametrize("part", ["val", "test"])
def test_a_part_without_masks_is_not_passed_over(camvid: Path, part: str) -> None:
    (camvid / f"{part}annot").rename(camvid / f"{part}-masks")
    with pytest.raises(DataError, match=rf"{part}: no folder of masks beside it \({part}annot, ...\): add it"):
        load_segmentation(f"folder:{camvid}")


def test_images_and_masks_need_a_train_part(tmp_path: Path) -> None:
    pair(tmp_path, "images/val", "masks/val", "1", np.array([[0, 1]], np.uint8))
    with pytest.raises(DataError, match="images: found val/ but no train/"):
        load_segmentation(f"folder:{tmp_path}")


@pytest.mark.parametrize("train, test", [("Train", "Test"), ("training", "testing")])
def test_parts_are_known_in_any_letters(tmp_path: Path, train: str, test: str) -> None:
    """They are not pooled with what is to be tested on."""
    mask = np.arange(12, dtype=np.uint8).reshape(3, 4) % 2
    for part, count in ((train, 5), (test, 2)):
        for index in range(count):
            pair(tmp_path, f"images/{part}", f"masks/{part}", f"{part}{index}", mask)
    splits = load_segmentation(f"folder:{tmp_path}")
    assert [Path(splits.test.path(i)).parent.name for i in range(2)] == [test, test] and len(splits.test) == 2


def test_what_is_wrong_with_masks_is_told_at_once(camvid: Path) -> None:
    splits = load_segmentation(f"folder:{camvid}")
    splits.test.check()
    path = Path(splits.test.path(0))
    write(path, np.zeros((9, 9, 3), np.uint8))
    with pytest.raises(DataError, match=f"{path.name}: the image is 9x9 but its mask"):
        splits.test.check()


@pytest.mark.parametrize("fields, told", [({"classes": ("car", "dog", "car")}, "two classes are called 'car'"),
                                          ({"classes": ("a", "b"), "values": (0, 70000)}, "70000: expected 0..65535"),
                                          ({"classes": ("a", "b"), "ignore": (-2,)}, "-2: expected 0..65535")])
def test_formats_that_no_file_can_have(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=told):
        MaskFormat(**fields)


def test_voc_layout(tmp_path: Path) -> None:
    root = tmp_path / "VOC2012"
    masks = {"2007_1": [[0, 255], [20, 1]], "2007_2": [[0, 0], [5, 5]], "2007_3": [[0, 2], [255, 2]],
             "2007_4": [[0, 3], [3, 3]], "2007_5": [[0, 4], [4, 4]]}
    for name, mask in masks.items():
        pair(root, "JPEGImages", "SegmentationClass", name, np.array(mask, np.uint8), ".jpg")
    for part, names in (("train", list(masks)[:4]), ("val", ["2007_5"])):
        (root / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
        (root / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("\n".join(names) + "\n")
    splits = load_segmentation(f"voc:{tmp_path}")
    assert splits.classes == VOC and len(splits.classes) == 21
    assert [len(s) for s in (splits.train, splits.val, splits.train_val, splits.test)] == [3, 1, 4, 1]
    assert splits.train_val[0][1].tolist() == [[0, 255], [20, 1]]


def test_ade20k_layout(tmp_path: Path) -> None:
    for part, count in (("training", 5), ("validation", 2)):
        for i in range(count):
            pair(tmp_path, f"images/{part}", f"annotations/{part}", f"ADE_{i}", np.array([[0, 1], [150, 7]], np.uint8),
                 ".jpg")
    rows = "".join(f"{i}\t0.1\t1\t2\tname{i}, other\n" for i in range(1, 151))
    (tmp_path / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n" + rows)
    splits = load_segmentation(f"ade20k:{tmp_path}")
    assert splits.classes[0] == "name1" and len(splits.classes) == 150 and len(splits.test) == 2
    assert splits.test[0][1].tolist() == [[IGNORE, 0], [149, 6]]


def test_cityscapes_layout(tmp_path: Path) -> None:
    for part, count in (("train", 5), ("val", 1)):
        for i in range(count):
            write(tmp_path / "leftImg8bit" / part / "ulm" / f"ulm_{i}_leftImg8bit.png", np.zeros((2, 2, 3), np.uint8))
            write(tmp_path / "gtFine" / part / "ulm" / f"ulm_{i}_gtFine_labelIds.png",
                  np.array([[7, 33], [0, 26]], np.uint8))
    splits = load_segmentation(f"cityscapes:{tmp_path}")
    assert splits.classes == list(CITYSCAPES) and len(CITYSCAPES) == 19
    assert splits.test[0][1].tolist() == [[0, 18], [IGNORE, 13]]
    (tmp_path / "gtFine" / "val" / "ulm" / "ulm_0_gtFine_labelIds.png").unlink()
    with pytest.raises(DataError, match="ulm_0_gtFine_labelIds.png: this mask is missing"):
        load_segmentation(f"cityscapes:{tmp_path}")


def test_the_bundled_set() -> None:
    splits = load_segmentation("bundled")
    assert splits.classes == ["ground", "stripes", "checks", "dots", "bricks"]
    assert [len(s) for s in (splits.train, splits.val, splits.train_val, splits.test)] == [192, 48, 240, 80]
    assert len(load_segmentation("bundled-shift").test) == 40
    assert set(np.unique(np.stack([splits.test[i][1] for i in range(80)]))) == set(range(5))
    assert len(load_segmentation("bundled?train=20&test=5").train_val) == 20


def test_the_script_draws_the_bundled_set(tmp_path: Path) -> None:
    """To the byte where the sines of numpy are the same; a few pixels at edges may differ elsewhere."""
    import runpy

    script = runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "draw_shapes.py"))
    script["main"](["--out", str(tmp_path / "drawn.npz")])
    bundled = Path(__file__).resolve().parents[2] / "assets" / "textured_shapes.npz"
    with np.load(tmp_path / "drawn.npz") as drawn, np.load(bundled) as kept:
        assert drawn.files == kept.files
        assert all((drawn[key] == kept[key]).mean() > 0.999 for key in kept.files)


@pytest.mark.skipif(not CAMVID.exists(), reason="needs ../shared/data/camvid")
def test_camvid_itself() -> None:
    splits = load_segmentation(f"folder:{CAMVID}")
    assert [len(s) for s in (splits.train, splits.val, splits.test)] == [367, 101, 233] and len(splits.classes) == 11
    image, mask = splits.train[0]
    assert image.size == (480, 360) and set(np.unique(mask)) <= {*range(11), IGNORE}


# ---- errors ----------------------------------------------------------------------------------------------------------


BROKEN = {
    "missing mask": "train/1.png: has no mask .*trainannot/1.png", "no image": "trainannot/9.png: this mask has no",
    "size": "train/1.png: the image is 7x6 but its mask 7x5", "value": "trainannot/1.png: value 3 is none of",
    "not a mask": "trainannot/1.png: cannot read this mask", "not an image": "train/1.png: cannot read this image",
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_errors_name_the_file(camvid: Path, what: str) -> None:
    mask = camvid / "trainannot" / "1.png"
    if what == "missing mask":
        mask.unlink()
    elif what == "no image":
        write(camvid / "trainannot" / "9.png", np.zeros((6, 7), np.uint8))
    elif what == "size":
        write(mask, np.zeros((5, 7), np.uint8))
    elif what == "value":
        write(mask, np.full((6, 7), 3, np.uint8))
    else:
        (mask if what == "not a mask" else camvid / "train" / "1.png").write_bytes(b"\x89PNG but no more")
    with pytest.raises(DataError, match=BROKEN[what]):
        load_segmentation(f"folder:{camvid}").train[1]


@pytest.mark.parametrize("spec, options, told", [
    ("bundled:x", {}, "unknown data"), ("folder", {}, "unknown data"), ("coco:x", {}, "unknown data"),
    ("bundled", {"mask_values": (0, 1)}, "says itself"), ("voc:x", {"ignore_index": 3}, "says itself"),
    ("folder:nowhere", {}, "nowhere: folder of images and masks not found")])
def test_specs_that_make_no_sense(spec: str, options: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=told):
        load_segmentation(spec, **options)


def test_a_folder_of_something_else_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found neither train/ with trainannot/ nor images/ with masks/"):
        load_segmentation(f"folder:{tmp_path}")


# ---- image and mask together -----------------------------------------------------------------------------------------


def numbered(height: int, width: int) -> MaskedSet:
    """An image whose red is the class of the pixel, so that it can be seen whether the two were moved alike."""
    mask = (np.arange(height * width) % 200).astype(np.uint8).reshape(1, height, width)
    pixels = np.stack([mask, 255 - mask, mask], -1)
    return masked_set(PairArrays(pixels, mask, MaskFormat(tuple(map(str, range(200)))), "numbers"))


@pytest.mark.parametrize("augment", [None, "crop", "flip"])
@pytest.mark.parametrize("size", [(20, 30), (5, 9), (8, 8)])
def test_both_are_moved_alike(augment: str | None, size: tuple[int, int]) -> None:
    images = numbered(*size).with_transform(together(SPEC, 8, augment))
    for seed in range(8):
        seed_all(seed)
        image, mask = images[0]
        assert image.shape == (3, 8, 8) and mask.shape == (8, 8)
        assert (image.dtype, mask.dtype, type(image), type(mask)) == (torch.float32, torch.int64, *2 * [torch.Tensor])
        inside = mask != IGNORE
        assert torch.equal(image[0].round().long()[inside], mask[inside])
        assert int((~inside).sum()) == 64 - min(size[0], 8) * min(size[1], 8)
        assert not image[:, ~inside].any()


def test_flips_happen_half_of_the_time() -> None:
    images = numbered(8, 8).with_transform(together(SPEC, 8, "flip"))
    plain = images.with_transform(together(SPEC, 8))[0][1]
    flipped = []
    for seed in range(40):
        seed_all(seed)
        mask = images[0][1]
        assert torch.equal(mask, plain) or torch.equal(mask, plain.flip(1))
        flipped.append(torch.equal(mask, plain.flip(1)))
    assert 8 <= sum(flipped) <= 32


@pytest.mark.parametrize("augment", ["scale", "colour"])
def test_scaled_masks_hold_no_new_classes(augment: str) -> None:
    mask = np.zeros((1, 30, 40), np.uint8)
    mask[:, :, 20:] = 100
    source = PairArrays(np.repeat(mask[..., None], 3, -1), mask, MaskFormat(("a", "b"), values=(0, 100)), "halves")
    images = masked_set(source).with_transform(together(SPEC, 16, augment))
    shares = []
    for seed in range(20):
        seed_all(seed)
        mask_seen = images[0][1]
        assert mask_seen.shape == (16, 16) and set(mask_seen.unique().tolist()) <= {0, 1, IGNORE}
        shares.append(float((mask_seen == 1).float().mean()))
    assert len(set(shares)) > 5


def test_whole_images_stay_as_they_are() -> None:
    image, mask = numbered(5, 9).with_transform(together(SPEC))[0]
    assert torch.equal(image[0].round().long(), mask) and mask.shape == (5, 9)


def test_an_unknown_augmentation_is_named() -> None:
    with pytest.raises(DataError, match=f"'mixup'.*{', '.join(AUGMENTATIONS)}"):
        together(SPEC, 8, "mixup")


# ---- class weights ---------------------------------------------------------------------------------------------------


def test_pixels_are_counted_and_weighed() -> None:
    masks = np.array([[[0, 0, 1, 9]], [[0, 1, 1, 1]]], np.uint8)
    form = MaskFormat(("a", "b", "c"), ignore=(9,))
    images = masked_set(PairArrays(np.zeros((2, 1, 4, 3), np.uint8), masks, form, "m"))
    counts = pixel_counts(images, 3)
    assert counts.tolist() == [3, 4, 0]
    weights = weights_of_counts(counts)
    assert torch.allclose(weights, torch.tensor([7 / 6, 7 / 8, 0.0])) and torch.equal(
        weights, class_weights(np.repeat([0, 1], [3, 4]), 3))
