"""load and expand: arrays, folders, tables, torchvision sets, and specs that are wrong."""

import gzip
import importlib.resources
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_data import truncate, write_image

from visionpeft.data import ImageSet, Splits, check_num_classes, class_weights, expand, load
from visionpeft.data.arrays import FASHION_ROOTS
from visionpeft.data.check import check
from visionpeft.data.sets import ArraySource
from visionpeft.errors import DataError

SHARED = Path(__file__).resolve().parents[2].parent / "shared"


def sizes(splits):
    return [len(p) for p in (splits.train, splits.val, splits.train_val, splits.test)]


def pixel_npz(path, **changes):
    data = {
        "train_x": np.arange(40, dtype=np.uint8).repeat(4).reshape(40, 2, 2),
        "train_y": np.arange(40) % 4,
        "test_x": np.zeros((8, 2, 2, 3), np.uint8),
        "test_y": np.arange(8) % 4,
        "classes": np.array(list("abcd")),
    }
    np.savez(path, **{k: v for k, v in {**data, **changes}.items() if v is not None})
    return path


def test_pixel_npz(tmp_path):
    splits = load(f"npz:{pixel_npz(tmp_path / 'x.npz')}")
    assert (splits.name, splits.classes, splits.group, splits.multi_label) == ("x", list("abcd"), None, False)
    assert sizes(splits) == [32, 8, 40, 8]
    image, label = splits.train_val[7]
    assert image.getpixel((1, 1)) == (7, 7, 7) and label == 3 and isinstance(label, int)
    assert splits.test[0][0].mode == "RGB"
    assert splits.train.path(0).endswith("x.npz:train[0]")


def test_jpeg_npz(tmp_path):
    files = []
    for c in range(10):
        file = io.BytesIO()
        Image.new("L", (4, 4), 20 * c).save(file, "JPEG", quality=95)
        files.append(file.getvalue())
    data = {"bytes": np.frombuffer(b"".join(files), np.uint8), "off": np.cumsum([0, *map(len, files)]),
            "y": np.arange(10) % 2}
    np.savez(tmp_path / "j.npz", classes=["e", "o"], **{f"{p}_{k}": v for p in ("train", "test")
                                                       for k, v in data.items()})
    splits = load(f"npz:{tmp_path / 'j.npz'}")
    assert abs(splits.test[9][0].getpixel((0, 0))[0] - 180) < 3
    broken = {**data, "bytes": data["bytes"].copy()}
    broken["bytes"][data["off"][3] : data["off"][3] + 8] = 0
    np.savez(tmp_path / "j.npz", classes=["e", "o"], **{f"{p}_{k}": v for p in ("train", "test")
                                                       for k, v in broken.items()})
    with pytest.raises(DataError, match=r"j.npz:test\[3\]: cannot read"):
        load(f"npz:{tmp_path / 'j.npz'}").test[3]


@pytest.mark.parametrize("changes, message", [
    ({"classes": None}, "no key 'classes'"),
    ({"test_y": None}, r"lacks \['test_y'\]"),
    ({"train_y": np.arange(40)}, r"x.npz:train\[\d+\] in train has label \d+, outside 0..3"),
    ({"train_y": np.arange(39) % 4}, "40 images but 39 labels"),
    ({"train_x": np.zeros((40, 2, 2))}, "expected uint8"),
])  # fmt: skip
def test_malformed_npz(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        load(f"npz:{pixel_npz(tmp_path / 'x.npz', **changes)}")


def test_damaged_npz(tmp_path):
    path = pixel_npz(tmp_path / "x.npz")
    truncate(path)
    with pytest.raises(DataError, match="x.npz: not a readable npz"):
        load(f"npz:{path}")
    with pytest.raises(DataError, match="nothing.npz: npz file not found"):
        load(f"npz:{tmp_path / 'nothing.npz'}")
    np.savez(path, classes=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match="not a readable npz"):  # nothing is ever unpickled
        load(f"npz:{path}")


def write_idx(path, array):
    header = bytes((0, 0, 8, array.ndim)) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    data = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def fashion(folder, suffix=".gz"):
    for prefix, count in (("train", 50), ("t10k", 20)):
        pixels = np.full((count, 28, 28), 9)
        write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", pixels)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", np.arange(count) % 10)
    return str(folder)


@pytest.mark.parametrize("suffix", [".gz", ""])
def test_fashion_mnist_files(tmp_path, suffix):
    splits = load("fashion-mnist", root=fashion(tmp_path, suffix))
    assert sizes(splits) == [40, 10, 50, 20] and splits.classes[9] == "Ankle boot"
    assert splits.test[3][0].getpixel((0, 0)) == (9, 9, 9) and splits.test[3][1] == 3


def test_damaged_fashion_mnist(tmp_path):
    root = fashion(tmp_path)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    truncate(path)
    with pytest.raises(DataError, match="t10k-images-idx3-ubyte.gz: truncated"):
        load("fashion-mnist", root=root)
    path.unlink()
    with pytest.raises(DataError, match="t10k-images-idx3-ubyte: idx file not found"):
        load("fashion-mnist", root=root)
    write_idx(path.with_suffix(""), np.zeros((20, 28)))
    with pytest.raises(DataError, match="not an idx file of 3 dimensions"):
        load("fashion-mnist", root=root)
    write_idx(path.with_suffix(""), np.zeros((20, 28, 28)))
    truncate(path.with_suffix(""))
    with pytest.raises(DataError, match="idx3-ubyte: .*truncated"):
        load("fashion-mnist", root=root)


@pytest.mark.skipif(not Path(FASHION_ROOTS[0]).is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_installed_fashion_mnist():
    splits = load("fashion-mnist?train=1000&test=2000")
    assert sizes(splits) == [800, 200, 1000, 2000]
    assert set(np.bincount(splits.test.labels)) == {200}


@pytest.mark.skipif(not (SHARED / "data" / "cifar10").is_dir(), reason="../shared/data/cifar10 is absent")
def test_real_cifar10():
    splits = load(f"npz:{SHARED / 'data/cifar10/cifar10_jpeg.npz'}?train=1000&test=2000&seed=0")
    assert sizes(splits) == [800, 200, 1000, 2000] and splits.classes[0] == "airplane"
    assert splits.test[0][0].size == (32, 32)


def test_bundled():
    if not (importlib.resources.files("visionpeft.assets") / "fashion_mnist_small.npz").is_file():
        pytest.skip("the bundled images have not been built")
    splits = load("bundled")
    assert sizes(splits) == [800, 200, 1000, 2000] and splits.num_classes == 10
    assert set(np.bincount(splits.train.labels)) == {80}


def test_digits():
    splits = load("digits", seed=3)
    assert sizes(splits) == [1150, 288, 1438, 359]
    assert splits.test.labels.tolist() == load("digits", seed=4).test.labels.tolist()
    assert max(max(splits.train[i][0].getextrema()) for i in range(9)) == (0, 255)


def test_folder_per_class(small_folder):
    splits = load(f"folder:{small_folder}")
    assert splits.classes == ["ant", "bee", "cat"] and sizes(splits) == [19, 5, 24, 6]
    assert np.bincount(splits.test.labels).tolist() == [2, 2, 2]
    for part in (splits.train, splits.val, splits.test):
        assert all(Path(part.path(i)).parent.name == splits.classes[part.labels[i]] for i in range(len(part)))


def test_folder_with_parts(tmp_path):
    for part, name in (("train", "a"), ("train", "b/deep"), ("validation", "b"), ("test", "a"), ("train", ".git")):
        write_image(tmp_path / "d" / part / name / "x.PNG")
    (tmp_path / "d" / "test" / "a" / "notes.txt").write_text("not an image")
    splits = load("folder:d", root=str(tmp_path))
    assert (splits.classes, sizes(splits)) == (["a", "b"], [2, 1, 3, 1])
    assert splits.val.labels.tolist() == [1]
    write_image(tmp_path / "d" / "test" / "zebra" / "x.png")
    with pytest.raises(DataError, match="test/zebra: class 'zebra' does not occur in train"):
        load("folder:d", root=str(tmp_path))


def test_folder_that_is_wrong(small_folder, tmp_path):
    (small_folder / "dog").mkdir()
    with pytest.raises(DataError, match="pets/dog: no image in this class folder"):
        load(f"folder:{small_folder}")
    with pytest.raises(DataError, match=r"1 class folder\(s\) \['pets'\]"):
        load(f"folder:{tmp_path}")


def test_truncated_image_in_a_folder(small_folder):
    truncate(small_folder / "bee" / "4.png")
    splits = load(f"folder:{small_folder}")
    with pytest.raises(DataError, match="bee/4.png: cannot read"):
        [p[i] for p in (splits.train_val, splits.test) for i in range(len(p))]


def table(folder, text):
    for i in range(6):
        write_image(folder / f"{i}.png", seed=i)
    (folder / "t.csv").write_text(text, encoding="utf-8-sig")
    return f"csv:{folder / 't.csv'}"


def test_csv_with_splits(tmp_path):
    spec = table(tmp_path, "path,split,label\n0.png,train,10\n1.png,train,9\n2.png,val,9\n3.png,test,10\n4.png,,9\n")
    splits = load(spec)
    assert splits.classes == ["9", "10"] and sizes(splits) == [3, 1, 4, 1]
    assert splits.test.labels.tolist() == [1] and not splits.multi_label


def test_csv_multi_label(tmp_path):
    rows = ("0.png,cat;dog", "1.png,dog | owl", "2.png,", "3.png,cat", "4.png,owl", "5.png,dog")
    splits = load(table(tmp_path, "\n".join(("path,label", *rows))))
    assert splits.multi_label and splits.classes == ["cat", "dog", "owl"]
    labels = {splits.train_val.path(i)[-5]: splits.train_val.labels[i].tolist() for i in range(len(splits.train_val))}
    expected = {"0": [1, 1, 0], "1": [0, 1, 1], "2": [0, 0, 0], "3": [1, 0, 0], "4": [0, 0, 1], "5": [0, 1, 0]}
    assert labels.items() <= expected.items() and len(labels) == 5
    label = splits.train[0][1]
    assert label.dtype == torch.float32 and label.shape == (3,)


@pytest.mark.parametrize("text, message", [
    ("file,label\n0.png,a\n", "t.csv:1: the header must have path and label"),
    ("path,label\n", "t.csv: table has no rows"),
    ("path,label\n0.png,a\n9.png,b\n", "t.csv:3: image .*9.png is missing"),
    ("path,label\n0.png,a\n1.png,\n", "t.csv:3: label is empty"),
    ("path,label\n,a\n", "t.csv:2: path is empty"),
    ("path,label,split\n0.png,a,dev\n", "t.csv:2: split 'dev' is none of"),
    ("path,label,split\n0.png,a,val\n", "no row is of split 'train'"),
    ("path,label,split\n0.png,a,train\n1.png,b,train\n2.png,c,test\n", "class 'c' has no row of split 'train'"),
    ("path,label\n0.png,a\n1.png,a\n", "only one class"),
])  # fmt: skip
def test_malformed_csv(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        load(table(tmp_path, text))


def test_torchvision_set_of_folders(small_folder, tmp_path):
    (tmp_path / "eurosat").mkdir()
    small_folder.rename(tmp_path / "eurosat" / "2750")
    splits = load("torchvision:EuroSAT?train=10", root=str(tmp_path))
    assert splits.classes == ["ant", "bee", "cat"] and sizes(splits) == [8, 2, 10, 6]
    assert splits.train[0][0].mode == "RGB"


def test_torchvision_idx_files_without_download(tmp_path):
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    fashion(tmp_path / "MNIST" / "raw", suffix="")
    splits = load("torchvision:MNIST", root=str(tmp_path))
    assert sizes(splits) == [40, 10, 50, 20] and splits.classes[3] == "3 - three"


@pytest.mark.parametrize("name, message", [
    ("NoSuchSet", "no data set 'NoSuchSet'"), ("VisionDataset", "VisionDataset"), ("ImageNet", "ImageNet in"),
])  # fmt: skip
def test_torchvision_sets_that_fail(tmp_path, name, message):
    with pytest.raises(DataError, match=message):
        load(f"torchvision:{name}", root=str(tmp_path))


@pytest.mark.parametrize("spec, arguments, message", [
    ("imagenet", {}, "unknown data 'imagenet'"),
    ("vtab", {"root": "x"}, "write vtab:<name>"),
    ("folder", {}, "write folder:<path>"),
    ("digits:3", {}, "digits takes no name"),
    ("vtab:cifar", {}, "needs root="),
    ("vtab:cifra", {"root": "x"}, "unknown vtab task 'cifra': one of cifar, "),
    ("digits", {"shots": 1}, "only 'fewshot:<set>' takes it"),
    ("digits", {"root": "x"}, "root='x' has no meaning"),
    ("digits?trian=10", {}, "the ending must be like"),
    ("digits?train=x", {}, "the ending must be like"),
    ("digits?seed=1", {}, "needs train= or test="),
    ("digits?train=100000", {}, "subset of 100000 .* 1438 images"),
    ("digits?train=0", {}, "subset of 0"),
    ("folder:/no/such", {}, "/no/such: image folder not found"),
])  # fmt: skip
def test_specs_that_are_wrong(spec, arguments, message):
    with pytest.raises(DataError, match=message):
        load(spec, **arguments)


def test_a_subset_follows_its_own_seed_only():
    def drawn(spec, seed):
        train = load(spec, seed=seed).train
        return [train.path(i) for i in range(len(train))]

    assert drawn("digits?train=50", 1) == drawn("digits?train=50", 2) == drawn("digits?train=50&seed=0", 3)
    assert drawn("digits?train=50&seed=1", 0) != drawn("digits?train=50", 0)


def test_expand():
    assert len(expand("vtab")) == 19 and expand("vtab")[0] == "vtab:cifar"
    assert expand("vtab", ["dtd", "pets"]) == ["vtab:dtd", "vtab:oxford_iiit_pet"]
    assert expand("vtab?test=9", "svhn, dtd") == ["vtab:svhn?test=9", "vtab:dtd?test=9"]
    assert len(expand("fgvc")) == len(expand("fewshot")) == 5
    assert expand("digits?train=9") == ["digits?train=9"] and expand("vtab:dtd") == ["vtab:dtd"]
    for spec, tasks in (("digits", ["dtd"]), ("vtab", ["nope"]), ("what", "all")):
        with pytest.raises(DataError):
            expand(spec, tasks)


def test_image_set_with_transform_is_a_copy():
    images = ImageSet(ArraySource(np.zeros((3, 2, 2), np.uint8), "x"), np.arange(3))
    doubled = images.with_transform(lambda image: image.size)
    assert doubled[1] == ((2, 2), 1) and images[1][0].size == (2, 2) and images[-1][1] == 2
    with pytest.raises(IndexError):
        images[3]
    loader = torch.utils.data.DataLoader(images.with_transform(lambda image: 0), batch_size=3)
    assert next(iter(loader))[1].tolist() == [0, 1, 2]


def test_an_empty_part_is_an_error():
    images = ImageSet(ArraySource(np.zeros((1, 2, 2), np.uint8), "x"), np.zeros(1, dtype=np.int64))
    with pytest.raises(DataError, match="the val split is empty"):
        Splits("x", ["a"], None, False, images, images.take(np.array([], dtype=int)), images, images)


def test_num_classes_mismatch():
    splits = load("digits")
    check_num_classes(splits, 10)
    with pytest.raises(DataError, match="the model has 37 outputs but digits has 10 classes"):
        check_num_classes(splits, 37)


def test_class_weights():
    labels = np.array([0, 0, 0, 2])
    weights = class_weights(labels, 4)
    assert torch.allclose(weights, torch.tensor([4 / 6, 0, 2, 0])) and weights[labels].mean() == 1
    assert class_weights(np.array([[1.0, 0], [1, 0], [0, 0]], dtype=np.float32), 2).tolist() == [0.5, 1]
    for wrong in (labels, np.eye(5, dtype=np.float32)):
        with pytest.raises(DataError):
            class_weights(wrong, 2)


def test_import_needs_neither_torchvision_nor_pillow():
    heavy = ("PIL", "torchvision", "timm", "sklearn")
    code = f"import sys, visionpeft.data; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_parts_are_no_classes(tmp_path):
    """Known in any letters; without one for training refused; but a class may be called "train"."""
    for part, count in (("Train", 4), ("Testing", 2)):
        for name in ("cat", "dog"):
            for i in range(count):
                write_image(tmp_path / "a" / part / name / f"{i}.png", seed=i)
    splits = load(f"folder:{tmp_path}/a")
    assert splits.classes == ["cat", "dog"] and len(splits.test) == 4 and len(splits.train_val) == 8
    (tmp_path / "a" / "Train").rename(tmp_path / "a" / "val")
    with pytest.raises(DataError, match="found Testing, val/ but no train/"):
        load(f"folder:{tmp_path}/a")
    assert [p.message for p in check(tmp_path / "a", "folder")] == [
        f"{tmp_path}/a: found Testing, val/ but no train/"]
    for name in ("bus", "train", "car"):
        for i in range(4):
            write_image(tmp_path / "b" / name / f"{i}.png", seed=i)
    assert load(f"folder:{tmp_path}/b").classes == ["bus", "car", "train"]
