"""FGVC-Aircraft's lists and ImageNet's folders as CoOp lays them out, on a few small pictures."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from visionpeft.clip.data import COOP_LAYOUT, COOP_LISTS, load_coop
from visionpeft.clip.templates import COOP
from visionpeft.errors import DataError


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)


@pytest.fixture
def root(tmp_path):
    planes = tmp_path / "fgvc_aircraft"
    planes.mkdir()
    names = ["707-320", "A300B4", "Boeing 717"]
    (planes / "variants.txt").write_text("\n".join(names) + "\n")
    for start, part in ((0, "train"), (100, "val"), (200, "test")):
        rows = [f"{start + 10 * i + j} {name}" for i, name in enumerate(names) for j in range(6)]
        (planes / f"images_variant_{part}.txt").write_text("\n".join(rows) + "\n")
        for row in rows:
            picture(planes / "images" / f"{row.split()[0]}.jpg")
    net = tmp_path / "imagenet"
    for wnid in ("n01", "n02", "n03"):
        for i in range(20):
            picture(net / "images" / "train" / wnid / f"{wnid}_{i}.JPEG")
        for i in range(3):
            picture(net / "images" / "val" / wnid / f"v{i}.JPEG")
    (net / "classnames.txt").write_text("n02 tench\nn03 crane\nn01 crane\n")
    return tmp_path


def test_all_eleven_sets_have_a_layout_and_a_template():
    assert {*COOP_LAYOUT, *COOP_LISTS} == set(COOP)


def test_aircraft(root):
    splits = load_coop("fgvc_aircraft", root, shots=5, seed=1)
    assert splits.classes == ["707-320", "A300B4", "Boeing 717"]
    counts = [np.bincount(part.labels).tolist() for part in (splits.train, splits.val, splits.test)]
    assert counts == [[5] * 3, [4] * 3, [6] * 3]
    test = [(splits.test.path(i), int(splits.test.labels[i])) for i in range(18)]
    assert test == [(str(root / "fgvc_aircraft" / "images" / f"{200 + 10 * c + j}.jpg"), c)
                    for c in range(3) for j in range(6)]  # fmt: skip


def test_imagenet_validates_on_images_held_out_of_train(root):
    splits = load_coop("imagenet", root)
    assert splits.classes == ["tench", "crane", "crane (n01)"]
    paths = [{part.path(i) for i in range(len(part))} for part in (splits.train, splits.val, splits.test)]
    assert [len(p) for p in paths] == [54, 6, 9] and not paths[0] & paths[1]
    assert all("/train/" in p for p in paths[0] | paths[1]) and all("/val/" in p for p in paths[2])
    folders = [splits.train.path(i).split("/")[-2] for i in range(54)]
    assert [("n02", "n03", "n01")[label] for label in splits.train.labels] == folders
    again = load_coop("imagenet", root)
    assert [again.val.path(i) for i in range(6)] == [splits.val.path(i) for i in range(6)]


def test_what_is_missing_is_named(root):
    with pytest.raises(DataError, match="no CoOp layout for 'cars': one of .*fgvc_aircraft, imagenet"):
        load_coop("cars", root)
    with open(root / "fgvc_aircraft" / "images_variant_val.txt", "a") as file:
        file.write("7 Spitfire\n")
    with pytest.raises(DataError, match=r"images_variant_val.txt:19: class 'Spitfire' is not in variants.txt"):
        load_coop("fgvc_aircraft", root)
    (root / "fgvc_aircraft" / "variants.txt").unlink()
    with pytest.raises(DataError, match="variants.txt"):
        load_coop("fgvc_aircraft", root)
    with open(root / "imagenet" / "classnames.txt", "a") as file:
        file.write("n04 shark\n")
    with pytest.raises(DataError, match="n04"):
        load_coop("imagenet", root)
