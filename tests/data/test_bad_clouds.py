"""What is wrong with clouds is said with the file, and with the command that helps."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from visionpeft import cli
from visionpeft.data.cloud_files import read_cloud, read_npz
from visionpeft.data.clouds import load_clouds
from visionpeft.data.parts import load_parts
from visionpeft.errors import DataError
from visionpeft.models.point_ops import PointError
from visionpeft.models.point_transformer import create
from visionpeft.pipelines.point_pretraining import unlabelled

GOOD = np.random.default_rng(0).normal(size=(10, 6, 3)).astype(np.float32)
LABELS = np.arange(10) % 2


def save(path: Path, **arrays) -> str:
    np.savez(path, **arrays)
    return str(path)


def first_clouds(spec: str) -> None:
    splits = load_clouds(spec)
    for part in (splits.train_val, splits.test):
        for i in range(len(part)):
            part[i]


def bad(where: tuple[int, int, int], value: float) -> np.ndarray:
    points = GOOD.copy()
    points[where] = value
    return points


# ---- columns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("points", [GOOD[..., :2], GOOD[0], GOOD[:, :, 0]])
def test_arrays_with_too_few_columns(tmp_path, points):
    path = save(tmp_path / "a.npz", points=points, label=LABELS)
    with pytest.raises(DataError, match=r"a.npz.*\[clouds, points, 3\], got"):
        load_clouds(f"npz:{path}")
    with pytest.raises(DataError, match=r"a.npz.*\[clouds, points, 3\], got"):
        unlabelled(path)


@pytest.mark.parametrize("columns", [0, 1, 2])
def test_files_with_too_few_columns(tmp_path, columns):
    np.save(tmp_path / "a.npy", GOOD[0, :, :columns])
    with pytest.raises(DataError, match="a.npy: expected points .N, 3 or more columns., got .6, "):
        read_cloud(tmp_path / "a.npy")
    np.savetxt(tmp_path / "a.xyz", GOOD[0, :, : max(columns, 1)])
    with pytest.raises(DataError, match="a.xyz"):
        read_cloud(tmp_path / "a.xyz")


def test_models_say_which_columns_they_take():
    model = create("nano_point_mae", 4)
    for shape in ((2, 64, 6), (2, 64, 2), (64, 3)):
        with pytest.raises(PointError, match="keep the columns x y z"):
            model(torch.zeros(shape))


# ---- numbers that are none -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_points_that_are_not_finite(tmp_path, value):
    path = save(tmp_path / "a.npz", points=bad((3, 4, 1), value), label=LABELS)
    with pytest.raises(DataError, match=r"a.npz.*\[3\]: 1 of 6 points are not finite, the first is number 4"):
        first_clouds(f"npz:{path}")
    np.savetxt(tmp_path / "a.xyz", bad((0, 2, 0), value)[0])
    with pytest.raises(DataError, match="a.xyz: 1 of 6 points are not finite, the first is number 2"):
        read_cloud(tmp_path / "a.xyz")
    with pytest.raises(PointError, match="cloud 1 of the batch"):
        create("nano_point_mae", 4)(torch.from_numpy(np.concatenate([GOOD[:1], bad((0, 0, 0), value)[:1]])))


# ---- files cut off ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 50, 700])
def test_files_that_are_cut_off(tmp_path, kept):
    h5py = pytest.importorskip("h5py")
    for part in ("train0", "test0"):
        with h5py.File(tmp_path / f"ply_data_{part}.h5", "w") as file:
            file["data"], file["label"] = GOOD, LABELS
    cut = tmp_path / "ply_data_test0.h5"
    cut.write_bytes(cut.read_bytes()[:kept])
    with pytest.raises(DataError, match="ply_data_test0.h5: truncated, or no h5"):
        load_clouds(f"modelnet:{tmp_path}")
    path = Path(save(tmp_path / "a.npz", points=GOOD, label=LABELS))
    path.write_bytes(path.read_bytes()[:kept])
    readers = (read_cloud, read_npz, unlabelled, lambda p: load_clouds(f"npz:{p}"), lambda p: load_parts(f"parts:{p}"))
    for read in readers:
        with pytest.raises(DataError, match="a.npz: truncated, or no npz"):
            read(path)
    np.save(tmp_path / "b.npy", GOOD[0])
    (tmp_path / "b.npy").write_bytes((tmp_path / "b.npy").read_bytes()[: min(kept, 100)])
    with pytest.raises(DataError, match="b.npy: cannot be read"):
        read_cloud(tmp_path / "b.npy")


def test_npz_whose_inside_is_damaged(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", points=GOOD, label=LABELS)
    raw = bytearray((tmp_path / "a.npz").read_bytes())
    raw[120:200] = bytes(80)
    (tmp_path / "a.npz").write_bytes(raw)
    with pytest.raises(DataError, match="a.npz: truncated, or no npz"):
        load_clouds(f"npz:{tmp_path / 'a.npz'}")


def test_h5_without_labels(tmp_path):
    h5py = pytest.importorskip("h5py")
    for part in ("train0", "test0"):
        with h5py.File(tmp_path / f"ply_data_{part}.h5", "w") as file:
            file["data"] = GOOD
    with pytest.raises(DataError, match="ply_data_train0.h5.*data and label"):
        load_clouds(f"modelnet:{tmp_path}")


# ---- pickles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", ["a.pkl", "a.npz", "a.dat"])
def test_a_pickle_where_data_are_expected_names_the_command(tmp_path, name, protocol):
    path = tmp_path / name
    path.write_bytes(pickle.dumps({"train": [(GOOD[0], 0, "x")], "test": []}, protocol=protocol))
    for read in (read_cloud, unlabelled, lambda p: load_clouds(f"npz:{p}"), lambda p: load_parts(f"parts:{p}")):
        with pytest.raises(DataError, match="is a pickle.*visionpeft points convert"):
            read(path)


def test_a_pickle_in_a_folder_of_clouds_names_the_command_and_the_run_fails_by_name(tmp_path, capsys):
    for name in ("ball", "cube"):
        for i in range(5):
            (tmp_path / "clouds" / name).mkdir(parents=True, exist_ok=True)
            np.savetxt(tmp_path / "clouds" / name / f"{i}.xyz", GOOD[i])
    (tmp_path / "clouds" / "cube" / "5.pkl").write_bytes(pickle.dumps([1]))
    given = ["points", "--data", f"folder:{tmp_path / 'clouds'}", "--method", "raw", "--jobs", "1", "--out"]
    assert cli.main([*given, str(tmp_path / "runs")]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "5.pkl is a pickle" in printed.replace("- ", "-") and "convert" in printed


# ---- classes ---------------------------------------------------------------------------------------------------------


def test_labels_that_do_not_fit_the_clouds_or_the_classes(tmp_path):
    for arrays, words in [
        ({"label": LABELS[:9]}, "10 clouds but 9 labels"),
        ({"label": LABELS, "is_train": LABELS[:9]}, "10 clouds but 9 entries of is_train"),
        ({"label": np.array(["a", "b"] * 5)}, "labels are whole numbers, 0, 1, 2"),
        ({"label": LABELS + 0.5}, "labels are whole numbers, 0, 1, 2"),
        ({"label": LABELS * 0 - 1}, "no cloud of train or of test has a label"),
        ({"label": LABELS, "is_train": LABELS * 0}, "no cloud of train or of test has a label"),
        ({"label": LABELS * 4, "classes": np.array(["a", "b"])}, "has label 4, outside 0..1"),
    ]:
        path = save(tmp_path / "a.npz", points=GOOD, **arrays)
        with pytest.raises(DataError, match=words) as error:
            load_clouds(f"npz:{path}")
        assert "a.npz" in str(error.value)


def test_lists_of_classes_that_are_too_short(tmp_path):
    h5py = pytest.importorskip("h5py")
    for part in ("train0", "test0"):
        with h5py.File(tmp_path / f"ply_data_{part}.h5", "w") as file:
            file["data"], file["label"] = GOOD, LABELS
    (tmp_path / "shape_names.txt").write_text("chair\n")
    with pytest.raises(DataError, match=r"has label 1, outside 0\.\.0"):
        load_clouds(f"modelnet:{tmp_path}")
    text = tmp_path / "text"
    text.mkdir()
    (text / "modelnet40_shape_names.txt").write_text("chair\n")
    for part in ("train", "test"):
        (text / f"modelnet40_{part}.txt").write_text("chair_0001\nsofa_0001\n")
    with pytest.raises(DataError, match="'sofa' is listed but not in modelnet40_shape_names.txt"):
        load_clouds(f"modelnet:{text}")
