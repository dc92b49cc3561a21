"""Clouds with parts from files written here, and what is wrong with them named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from visionpeft.data import made_clouds
from visionpeft.data.clouds import unit
from visionpeft.data.parts import SHAPENET, check_parts, load_parts
from visionpeft.errors import DataError

RNG = np.random.default_rng(0)


def cloud(parts, normals: bool = True, count: int = 12) -> np.ndarray:
    columns = [RNG.normal(size=(count, 6 if normals else 3)), np.resize(parts, count)[:, None]]
    return np.concatenate(columns, 1).astype(np.float32)


def save(path: Path, rows: np.ndarray) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savetxt(path, rows, fmt="%.8g")
    return rows


@pytest.fixture
def shapenet(tmp_path):
    synsets = {"Table": "04379243", "Mug": "03797390"}
    (tmp_path / "synsetoffset2category.txt").write_text("".join(f"{n}\t{s}\n" for n, s in synsets.items()))
    rows = {}
    for part, count in (("train", 3), ("val", 2), ("test", 1)):
        ids = [(name, f"{part}{i}") for name in synsets for i in range(count)]
        listed = [f"shape_data/{synsets[name]}/{i}" for name, i in ids]
        (tmp_path / "train_test_split").mkdir(exist_ok=True)
        (tmp_path / "train_test_split" / f"shuffled_{part}_file_list.json").write_text(json.dumps(listed))
        for name, i in ids:
            parts = [36, 37] if name == "Mug" else [47, 48, 49]
            rows[name, i] = save(tmp_path / synsets[name] / f"{i}.txt", cloud(parts))
    return tmp_path, rows


def test_shapenetpart_as_the_official_folder_has_it(shapenet):
    root, rows = shapenet
    splits = load_parts(f"shapenetpart:{root}")
    assert splits.classes == ["Mug", "Table"] and splits.owned == ((36, 37), (47, 48, 49)) and len(splits.parts) == 50
    assert [len(part) for part in (splits.train, splits.val, splits.train_val, splits.test)] == [6, 4, 10, 2]
    for index, name in enumerate(("Table", "Mug")):
        found, label = splits.test[index]
        given = rows[name, "test0"]
        np.testing.assert_allclose(found[:, :3], unit(given[:, :3]), atol=1e-6)
        assert found[:, 3].tolist() == given[:, 6].tolist() and splits.classes[label] == name
        check_parts(found[None], splits, splits.test.take(np.array([index])))
    assert sum(SHAPENET.values()) == 50 and len(SHAPENET) == 16


def test_shapes_and_categories_that_do_not_match_are_named(shapenet):
    root, _ = shapenet
    splits = load_parts(f"shapenetpart:{root}")
    clouds = np.stack([splits.test[i][0] for i in range(2)])
    clouds[1, 5, 3] = 48
    with pytest.raises(DataError, match=r"03797390/test0.txt: part 48 is none of the category Mug, which has 36, 37"):
        check_parts(clouds, splits, splits.test)
    listed = root / "train_test_split" / "shuffled_val_file_list.json"
    listed.write_text(json.dumps(["shape_data/00000000/x"]))
    with pytest.raises(DataError, match="shuffled_val_file_list.json.*00000000"):
        load_parts(f"shapenetpart:{root}")
    listed.write_text("[")
    with pytest.raises(DataError, match="shuffled_val_file_list.json"):
        load_parts(f"shapenetpart:{root}")
    with open(root / "synsetoffset2category.txt", "a") as file:
        file.write("Toaster\t123\n")
    with pytest.raises(DataError, match="'Toaster' is no category"):
        load_parts(f"shapenetpart:{root}")


def test_folders_whose_last_column_is_the_part(tmp_path):
    rows = {}
    for part, count in (("train", 4), ("test", 2)):
        for name, parts in (("cup", [0, 1]), ("pan", [2])):
            for i in range(count):
                rows[part, name, i] = save(tmp_path / part / name / f"{i}.xyz", cloud(parts, normals=i % 2 == 0))
    splits = load_parts(f"parts:{tmp_path}")
    assert splits.classes == ["cup", "pan"] and splits.owned == ((0, 1), (2,)) and splits.parts == ("0", "1", "2")
    found, label = splits.test[1]
    assert label == 0 and found[:, 3].tolist() == rows["test", "cup", 1][:, -1].tolist()


@pytest.mark.parametrize(("rows", "words"), [
    (np.zeros((5, 3)), "expected x y z ... part, 4 or more columns, got 3"),
    (np.c_[np.eye(4)[:, :3], [0, 1, 0.5, 1]], "row 3 has 0.5"),
    (np.c_[np.eye(4)[:, :3], [0, -1, 0, 1]], "row 2 has -1"),
    (np.c_[np.eye(4)[:, :3], [0, np.nan, 0, 1]], "row 2 has nan"),
])  # fmt: skip
def test_columns_that_are_no_parts_are_named(tmp_path, rows, words):
    for part in ("train", "test"):
        save(tmp_path / part / "cup" / "0.xyz", rows)
    with pytest.raises(DataError, match=words) as error:
        load_parts(f"parts:{tmp_path}")
    assert "cup/0.xyz" in str(error.value)


def test_npz_with_parts(tmp_path):
    arrays = {f"{p}_points": RNG.normal(size=(8, 10, 3)).astype(np.float32) for p in ("train", "test")}
    arrays |= {f"{p}_label": np.arange(8) % 2 for p in ("train", "test")}
    arrays |= {f"{p}_part": np.repeat(np.arange(8)[:, None] % 2 * 2, 10, 1) + np.arange(10) % 2
               for p in ("train", "test")}  # fmt: skip
    np.savez(tmp_path / "a.npz", classes=np.array(["x", "y"]), **arrays)
    splits = load_parts(f"parts:{tmp_path / 'a.npz'}")
    assert splits.classes == ["x", "y"] and splits.owned == ((0, 1), (2, 3)) and splits.parts == ("0", "1", "2", "3")
    found, label = splits.test[3]
    np.testing.assert_allclose(found[:, :3], unit(arrays["test_points"][3]), atol=1e-6)
    assert label == 1 and found[:, 3].tolist() == [2, 3] * 5
    np.savez(tmp_path / "b.npz", **(arrays | {"test_part": arrays["test_part"][:, :9]}))
    with pytest.raises(DataError, match="one part for each point"):
        load_parts(f"parts:{tmp_path / 'b.npz'}")
    np.savez(tmp_path / "b.npz", parts=np.array(["a", "b", "c"]), **arrays)
    with pytest.raises(DataError, match="b.npz: there are parts up to 3 but only 3 names"):
        load_parts(f"parts:{tmp_path / 'b.npz'}")
    for key, value, words in (("train_part", arrays["train_part"] + 0.5, "parts are whole numbers"),
                              ("test_part", arrays["test_part"] - 1, "parts are counted from 0, and there is -1"),
                              ("test_label", np.array(["x", "y"] * 4), "labels are whole numbers")):  # fmt: skip
        np.savez(tmp_path / "b.npz", **(arrays | {key: value}))
        with pytest.raises(DataError, match=f"b.npz {key.partition('_')[0]}: {words}"):
            load_parts(f"parts:{tmp_path / 'b.npz'}")
    del arrays["test_part"]
    np.savez(tmp_path / "c.npz", **arrays)
    with pytest.raises(DataError, match="c.npz: no array 'test_part'"):
        load_parts(f"parts:{tmp_path / 'c.npz'}")
    (tmp_path / "d.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:300])
    with pytest.raises(DataError, match="d.npz"):
        load_parts(f"parts:{tmp_path / 'd.npz'}")
    for spec in ("parts", "bundled-parts:x", "part:x"):
        with pytest.raises(DataError, match="unknown clouds with parts"):
            load_parts(spec)


def test_parts_of_made_up_furniture_are_where_they_belong():
    splits = load_parts("bundled-parts")
    assert len(splits.parts) == 24 and splits.owned[0] == (0, 1, 2, 3) and len(splits.classes) == 8
    plain = made_clouds.made((1, 1))
    assert plain["train_part"].shape == plain["train_points"].shape[:2]
    for name in ("table", "chair", "stool", "bed"):
        i, label = next((i, int(y)) for i, y in enumerate(splits.test.labels) if splits.classes[y] == name)
        found, _ = splits.test[i]
        legs = splits.parts.index(f"{name} legs")
        top = splits.owned[label][0]
        assert found[found[:, 3] == legs][:, 1].mean() < found[found[:, 3] == top][:, 1].mean()
        assert set(np.unique(found[:, 3]).astype(int)) <= set(splits.owned[label])
