"""Readers of clouds against files written here, and pickles that must not be opened."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from visionpeft.data import clouds, made_clouds, unpickle
from visionpeft.data.cloud_files import read_cloud, surface
from visionpeft.data.clouds import load_clouds, unit
from visionpeft.errors import DataError

RNG = np.random.default_rng(0)
POINTS = RNG.normal(size=(7, 3)).astype(np.float32)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def rows(points, separator=" ") -> str:
    return "".join(separator.join(repr(float(v)) for v in row) + "\n" for row in points)


def test_every_kind_of_point_file_gives_the_same_points(tmp_path):
    paths = [write(tmp_path / "a.xyz", "# comment\n" + rows(POINTS)), write(tmp_path / "b.txt", rows(POINTS, ",")),
             write(tmp_path / "c.pts", "7\n" + rows(POINTS))]  # fmt: skip
    np.save(tmp_path / "d.npy", POINTS)
    np.savez(tmp_path / "e.npz", other=np.zeros(3), points=POINTS)
    header = "ply\nformat ascii 1.0\nelement vertex 7\n"
    header += "".join(f"property float {c}\n" for c in "xyz") + "end_header\n"
    paths += [tmp_path / "d.npy", tmp_path / "e.npz", write(tmp_path / "f.ply", header + rows(POINTS))]
    for path in paths:
        np.testing.assert_allclose(read_cloud(path), POINTS, rtol=1e-6)


SQUARE = "4 1 0\n0 0 0\n2 0 0\n2 2 0\n0 2 0\n4 0 1 2 3\n"


@pytest.mark.parametrize("head", ["OFF\n", "OFF"])
def test_a_mesh_becomes_points_on_its_surface(tmp_path, head):
    points = read_cloud(write(tmp_path / "a.off", head + SQUARE))
    assert points.shape == (8192, 3) and (points[:, 2] == 0).all()
    assert points.min() >= 0 and points.max() <= 2
    counts = np.histogram2d(points[:, 0], points[:, 1], bins=4, range=[[0, 2], [0, 2]])[0]
    assert abs(counts - 512).max() < 5 * 512**0.5
    np.testing.assert_array_equal(points, read_cloud(tmp_path / "a.off"))


def test_larger_triangles_get_more_points(tmp_path):
    corners = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 5], [3, 0, 5], [0, 3, 5]], float)
    points = surface(corners, np.array([[0, 1, 2], [3, 4, 5]]))
    assert abs((points[:, 2] == 5).mean() - 0.9) < 0.02
    obj = "".join(f"v {x} {y} {z}\n" for x, y, z in corners) + "f 1 2 3\nf 4 5 6\n"
    np.testing.assert_allclose(read_cloud(write(tmp_path / "a.obj", obj)), points, atol=1e-6)
    trimesh = pytest.importorskip("trimesh")
    mesh = trimesh.Trimesh(corners, [[0, 1, 2], [3, 4, 5]], process=False)
    for name in ("a.stl", "b.ply"):  # binary both
        mesh.export(tmp_path / name)
        np.testing.assert_allclose(read_cloud(tmp_path / name), points, atol=1e-6)


@pytest.mark.parametrize(("name", "text", "words"), [
    ("a.xyz", "1 2\n3 4\n", "3 or more columns"),
    ("a.xyz", "1 2 3\n4 5\n", "row 2 has 2 columns"),
    ("a.xyz", "1 2 3\nnan 5 6\n", "the first is number 1"),
    ("a.xyz", "one two three\n", "cannot be read"),
    ("a.xyz", "", "cannot be read"),
    ("a.off", "PLY\n", "begins with OFF"),
    ("a.off", "OFF 3 1 0 0 0 0", "cannot be read"),
    ("a.jpg", "", "no kind of cloud"),
    ("a.pkl", "", "visionpeft points convert"),
])  # fmt: skip
def test_bad_files_are_named(tmp_path, name, text, words):
    with pytest.raises(DataError, match=words) as error:
        read_cloud(write(tmp_path / name, text))
    assert name in str(error.value)


def test_folders_with_and_without_a_split(tmp_path):
    for part in ("train", "test"):
        for name in ("ball", "cube"):
            for i in range(3):
                write(tmp_path / part / name / f"{i}.xyz", rows(POINTS + i))
    splits = load_clouds(f"folder:{tmp_path}")
    assert splits.classes == ["ball", "cube"] and len(splits.train_val) == 6 and len(splits.test) == 6
    cloud, label = splits.test[5]
    np.testing.assert_allclose(cloud, unit(POINTS + 2), atol=1e-6)
    assert label == 1
    alone = load_clouds(f"folder:{tmp_path / 'train'}")
    assert len(alone.train_val) + len(alone.test) == 6
    write(tmp_path / "test" / "cone" / "0.xyz", rows(POINTS))
    with pytest.raises(DataError, match="cone"):
        load_clouds(f"folder:{tmp_path}")


def test_modelnet_in_its_three_layouts(tmp_path):
    h5py = pytest.importorskip("h5py")
    names = ("chair", "night_stand")
    ids = [f"{name}_{i:04}" for name in names for i in range(3)]
    for i in ids:
        name = i[:-5]
        for part in ("train", "test"):
            write(tmp_path / "off" / name / part / f"{i}.off", "OFF" + SQUARE)
            write(tmp_path / "text" / f"modelnet40_{part}.txt", "\n".join(ids))
        write(tmp_path / "text" / name / f"{i}.txt", rows(np.hstack([POINTS, POINTS]), ","))
    write(tmp_path / "text" / "modelnet40_shape_names.txt", "chair\nnight_stand\n")
    (tmp_path / "h5").mkdir()
    for part in ("train0", "train1", "test0"):
        with h5py.File(tmp_path / "h5" / f"ply_data_{part}.h5", "w") as file:
            file["data"], file["label"] = np.stack([POINTS] * 6), np.repeat([[0], [1]], 3, 0).astype(np.uint8)
    write(tmp_path / "h5" / "shape_names.txt", "chair\nnight_stand\n")
    for layout, train, points in (("off", 6, 8192), ("text", 6, 7), ("h5", 12, 7)):
        splits = load_clouds(f"modelnet:{tmp_path / layout}")
        assert splits.classes == ["chair", "night_stand"] and len(splits.train_val) == train and len(splits.test) == 6
        cloud, label = splits.test[5]
        assert cloud.shape == (points, 3) and label == 1
        assert abs(cloud.mean(0)).max() < 1e-5 and np.isclose(np.linalg.norm(cloud, axis=1).max(), 1)


def test_modelnets_cache_is_converted_and_has_modelnet40s_classes(tmp_path):
    """Both kinds of list lie in the official folder; numbers are those of the 40."""
    cache = [[np.hstack([POINTS + i, POINTS]) for i in range(10)], [np.array([i % 2], np.int32) for i in range(10)]]
    for part in ("train", "test"):
        path = tmp_path / f"modelnet40_{part}_8192pts_fps.dat"
        path.write_bytes(pickle.dumps(cache))
        with pytest.raises(DataError, match="8192pts_fps.dat is a pickle.*visionpeft points convert"):
            load_clouds(f"modelnet:{tmp_path}")
    for kind, names in (("10", "bed\nsofa\n"), ("40", "airplane\nsofa\n")):
        write(tmp_path / f"modelnet{kind}_shape_names.txt", names)
        for part in ("train", "test"):
            write(tmp_path / f"modelnet{kind}_{part}.txt", f"{names.split()[0]}_0001\nsofa_0001\n" * 5)
    assert load_clouds(f"modelnet:{tmp_path}").classes == ["airplane", "sofa"]
    unpickle.convert(tmp_path / "modelnet40_train_8192pts_fps.dat")
    with pytest.raises(DataError, match="modelnet40_test_8192pts_fps.npz"):
        load_clouds(f"modelnet:{tmp_path}")
    unpickle.convert(tmp_path / "modelnet40_test_8192pts_fps.dat")
    splits = load_clouds(f"modelnet:{tmp_path}")
    assert splits.classes == ["airplane", "sofa"] and len(splits.train_val) == len(splits.test) == 10
    cloud, label = splits.test[3]
    np.testing.assert_allclose(cloud, unit(POINTS + 3), atol=1e-6)
    assert label == 1


def test_scanobjectnn_is_used_as_it_is(tmp_path):
    h5py = pytest.importorskip("h5py")
    for folder, ending in clouds.VARIANTS.values():
        (tmp_path / folder).mkdir(exist_ok=True)
        for part in ("training", "test"):
            with h5py.File(tmp_path / folder / f"{part}_objectdataset{ending}.h5", "w") as file:
                file["data"] = np.tile(POINTS + len(folder + ending), (30, 1, 1))
                file["label"] = np.arange(30) // 2
    for variant, (folder, ending) in clouds.VARIANTS.items():
        splits = load_clouds(f"scanobjectnn:{variant}", root=str(tmp_path))
        cloud, label = splits.test[29]
        np.testing.assert_array_equal(cloud, POINTS + len(folder + ending))
        assert label == 14 and splits.classes[14] == "toilet" and len(splits.classes) == 15
    cut = tmp_path / "main_split" / "test_objectdataset.h5"
    cut.write_bytes(cut.read_bytes()[:500])
    with pytest.raises(DataError, match="truncated"):
        load_clouds("scanobjectnn:obj_bg", root=str(tmp_path))


def test_npz_by_flag_leaves_out_what_has_no_label(tmp_path):
    points = np.stack([POINTS + i for i in range(12)])
    labels = np.array([0, 1] * 5 + [-1, -1])
    flag = np.array([True] * 8 + [False, False, True, False])
    np.savez(tmp_path / "a.npz", xyz=points, label=labels, is_train=flag, label_names=np.array(["a", "b"]))
    splits = load_clouds(f"npz:{tmp_path / 'a.npz'}")
    assert (len(splits.train_val), len(splits.test), splits.classes) == (8, 2, ["a", "b"])
    np.testing.assert_allclose(splits.test[1][0], unit(points[9]))
    np.savez(tmp_path / "b.npz", points=(POINTS[None] / 10 * 32767).astype(np.int16).repeat(10, 0), label=labels[:10])
    assert np.abs(load_clouds(f"npz:{tmp_path / 'b.npz'}").test[0][0] - unit(POINTS)).max() < 1e-3
    np.savez(tmp_path / "c.npz", points=points, label=np.array([0, 5] * 6), classes=np.array(["a", "b"]))
    with pytest.raises(DataError, match="label 5, outside 0..1"):
        load_clouds(f"npz:{tmp_path / 'c.npz'}")


def few_shot(ways: int = 2) -> dict:
    clouds = [(np.hstack([POINTS + i, POINTS]), i % ways, f"key{i}") for i in range(4)]
    return {"train": clouds, "test": clouds}


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_arrays_are_converted(tmp_path, protocol):
    folder = tmp_path / "2way_10shot"
    folder.mkdir()
    (folder / "0.pkl").write_bytes(pickle.dumps(few_shot(), protocol=protocol))
    with pytest.raises(DataError, match="visionpeft points convert"):
        load_clouds("fewshot:2way10shot/0", root=str(tmp_path))
    assert unpickle.convert(folder / "0.pkl") == folder / "0.npz"
    splits = load_clouds("fewshot:2way10shot/0", root=str(tmp_path))
    np.testing.assert_allclose(splits.test[3][0], unit(POINTS + 3), atol=1e-6)
    cache = [[np.hstack([POINTS, POINTS]).astype(np.float32)] * 5, [np.array([k], np.int32) for k in (0, 1, 0, 1, 0)]]
    (tmp_path / "modelnet40_test.dat").write_bytes(pickle.dumps(cache, protocol=protocol))
    assert unpickle.convert(tmp_path / "modelnet40_test.dat", tmp_path / "out") == tmp_path / "out"
    with np.load(tmp_path / "out") as file:
        assert file["label"].tolist() == [0, 1, 0, 1, 0] and file["points"].shape == (5, 7, 3)


class Evil:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("call", [
    (os.system, ("touch opened",)), (eval, ("open('opened', 'w')",)), (getattr, ("", "join")),
    (np.load, ("x.npy",)), (np.fromfile, ("x",)), (np.memmap, ("opened", "uint8", "w+", 0, (4,))),
], ids=lambda call: call[0].__name__)  # fmt: skip
def test_pickles_that_call_anything_are_refused(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    Path("evil.pkl").write_bytes(pickle.dumps({"train": [Evil(call)], "test": []}))
    with pytest.raises(DataError, match="is not opened"):
        unpickle.convert("evil.pkl")
    assert not Path("opened").exists()


@pytest.mark.parametrize("raw", [
    b"cos\nsystem\n(S'touch opened'\ntR.",
    b"\x80\x04\x8c\x05numpy\x8c\x1etesting._private.utils.os.system\x93\x8c\x0ctouch opened\x85R.",
    b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncbuiltins\neval\n\x85R.", b"P0\n.", b"\x80\x02N\x82\x01.",
], ids=["old", "dotted", "nested", "persistent", "extension"])  # fmt: skip
def test_pickles_written_to_deceive_are_refused(tmp_path, monkeypatch, raw):
    monkeypatch.chdir(tmp_path)
    Path("evil.pkl").write_bytes(raw)
    with pytest.raises(DataError, match="is not opened|no readable pickle"):
        unpickle.convert("evil.pkl")
    assert not Path("opened").exists()


@pytest.mark.parametrize(("value", "words"), [
    ({"train": []}, "neither a few-shot set"), (3, "neither a few-shot set"),
    (np.array([1, "a"], dtype=object), "array of objects"),
])  # fmt: skip
def test_pickles_of_something_else_are_named(tmp_path, value, words):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(value))
    with pytest.raises(DataError, match=words):
        unpickle.convert(tmp_path / "a.pkl")
    (tmp_path / "a.pkl").write_bytes(b"\x80\x04nonsense")
    with pytest.raises(DataError, match="no readable pickle"):
        unpickle.convert(tmp_path / "a.pkl")


def test_made_up_furniture_is_the_same_each_time_and_labelled():
    splits = load_clouds("bundled")
    assert splits.classes == sorted(made_clouds.MAKERS) and len(splits.train_val) == len(splits.test) == 8 * 40
    again = load_clouds("bundled")
    np.testing.assert_array_equal(splits.test[17][0], again.test[17][0])
    assert not np.array_equal(splits.train_val[0][0], splits.test[0][0])
    assert splits.test[0][0].shape == (1024, 3)


@pytest.mark.parametrize("spec", ["bundled:x", "npz", "modelnet40:x", "scanobjectnn:obj_bg", "fewshot:a/0"])
def test_specs_that_mean_nothing_are_refused(spec):
    with pytest.raises(DataError):
        load_clouds(spec)
