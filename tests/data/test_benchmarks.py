"""VTAB-1k, FGVC and few-shot trees: sound ones load, each kind of damage is named by load and by check."""

import json
import re
import shutil
import warnings

import numpy as np
import pytest
from small_data import edit_line, truncate, write_image

from visionpeft.data import fewshot, fgvc, load, vtab
from visionpeft.data.check import check
from visionpeft.errors import DataError


def test_vtab_table():
    groups = [task.group for task in vtab.TASKS.values()]
    assert [groups.count(g) for g in vtab.GROUPS] == [7, 4, 8]
    assert sum(task.num_classes for task in vtab.TASKS.values()) == 940


def test_fgvc_and_fewshot_tables():
    assert {name: (s.num_classes, s.images) for name, s in fgvc.SETS.items()} == {
        "CUB_200_2011": (200, "images"), "nabirds": (555, "images"), "OxfordFlowers": (102, ""),
        "StanfordDogs": (120, "Images"), "StanfordCars": (196, ""),
    }  # fmt: skip
    assert {name: (s.num_classes, s.test, s.images) for name, s in fewshot.SETS.items()} == {
        "fgvc-aircraft": (100, 3333, "images"), "food101": (101, 30300, "images"), "standford-cars": (196, 8041, ""),
        "oxford-flowers102": (102, 2463, "images"), "oxford-pets": (37, 3669, "images"),
    }  # fmt: skip


def test_sound_trees_have_no_problem(small_vtab):
    assert check(small_vtab) == []


def test_vtab_task(small_vtab):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        splits = load("vtab:cifar100", root=str(small_vtab))
    assert (splits.name, splits.group, splits.classes) == ("cifar", "natural", ["0", "1", "2"])
    assert [len(p) for p in (splits.train, splits.val, splits.train_val, splits.test)] == [6, 3, 9, 4]
    image, label = splits.test[2]
    assert image.mode == "RGB" and label == 2
    assert splits.test.path(2).endswith("cifar/images/test/000002.jpg")


DAMAGE = {
    "label out of range": (lambda t: edit_line(t / "test.txt", 2, "images/test/000001.jpg 3"),
                           r"svhn/test.txt:2: label 3 is outside 0\.\.2"),
    "negative label": (lambda t: edit_line(t / "val200.txt", 1, "images/val200/000000.jpg -1"),
                       r"svhn/val200.txt:1: label -1 is outside"),
    "not a label": (lambda t: edit_line(t / "test.txt", 3, "images/test/000002.jpg"),
                    r"svhn/test.txt:3: expected '<path> <label>'"),
    "missing image": (lambda t: (t / "images/train800/000004.jpg").unlink(),
                      r"svhn/train800.txt:5: image .*000004.jpg is missing"),
    "missing list": (lambda t: (t / "test.txt").unlink(), r"svhn/test.txt: list is missing"),
    "empty list": (lambda t: (t / "test.txt").write_text("\n"), r"svhn/test.txt: list is empty"),
    "missing task": (shutil.rmtree, r"svhn: .*(missing|not found)"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_vtab_is_named(small_vtab, name):
    damage, message = DAMAGE[name]
    damage(small_vtab / "svhn")
    with pytest.raises(DataError, match=message):
        load("vtab:svhn", root=str(small_vtab))
    problems = [str(p) for p in check(small_vtab)]
    assert all("svhn" in p for p in problems)
    assert re.search(message, problems[0]) and len(problems) <= 2


def test_wrong_count_warns_and_is_a_problem(small_vtab):
    file = small_vtab / "dtd" / "test.txt"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]))
    with pytest.warns(UserWarning, match=r"dtd/test.txt: 3 lines, expected 4; results will not compare"):
        load("vtab:dtd", root=str(small_vtab))
    assert [str(p) for p in check(small_vtab)] == [f"{file}: 3 lines, expected 4"]


def test_truncated_image_is_named_with_its_line(small_vtab):
    image = small_vtab / "dmlab/images/test/000003.jpg"
    truncate(image)
    splits = load("vtab:dmlab", root=str(small_vtab))
    with pytest.raises(DataError, match=r"test/000003.jpg \(listed in .*dmlab/test.txt:4\): cannot read"):
        splits.test[3]
    (problem,) = check(small_vtab)
    assert (problem.file, problem.line) == (str(small_vtab / "dmlab/test.txt"), 4)
    assert "000003.jpg: cannot read this image" in problem.message
    assert check(small_vtab, images=False) == []


def test_published_counts_of_the_table():
    assert vtab.TASKS["caltech101"].counts("test") == (6084, 6085)
    assert vtab.TASKS["kitti"].counts("train_val") == (1000,)


def test_fgvc_labels_become_zero_based_and_val_joins(small_fgvc):
    assert check(small_fgvc, "fgvc") == []
    for name in fgvc.SETS:
        splits = load(f"fgvc:{name}", root=str(small_fgvc))
        assert splits.classes == ["5", "7", "9"]
        assert splits.test.labels.tolist() == [0, 1, 2, 0] and splits.test[0][1] == 0
        assert [len(p) for p in (splits.train, splits.val, splits.train_val)] == [6, 3, 9]


def test_fgvc_without_val_holds_out_of_train(small_fgvc):
    (small_fgvc / "nabirds" / "val.json").unlink()
    splits = load("fgvc:nabirds", root=str(small_fgvc))
    assert (len(splits.train), len(splits.val), len(splits.train_val)) == (5, 1, 6)


def test_damaged_fgvc_is_named(small_fgvc):
    folder = small_fgvc / "StanfordDogs"
    entries = json.loads((folder / "test.json").read_text())
    (folder / "test.json").write_text(json.dumps({**entries, "test/0.jpg": 6, "test/no.jpg": 5, "test/1.jpg": "x"}))
    found = [str(p) for p in check(small_fgvc, "fgvc")]
    assert len(found) == 3
    assert "label 'x' of test/1.jpg is not a whole number" in found[0]
    assert "Images/test/no.jpg is missing" in found[1]
    assert "label 6 does not occur in train.json" in found[2]
    with pytest.raises(DataError, match=r"test.json: .*and 2 more"):
        load("fgvc:StanfordDogs", root=str(small_fgvc))
    (folder / "train.json").write_text("{")
    with pytest.raises(DataError, match="train.json: not a readable JSON"):
        load("fgvc:StanfordDogs", root=str(small_fgvc))


def test_fgvc_with_other_classes_warns(small_fgvc, monkeypatch):
    monkeypatch.setitem(fgvc.SETS, "nabirds", fgvc.FineGrained(555, "images"))
    with pytest.warns(UserWarning, match="3 classes, expected 555"):
        load("fgvc:nabirds", root=str(small_fgvc))
    assert "3 classes, expected 555" in str(check(small_fgvc, "fgvc")[0])


def test_fewshot_pets_has_74_lines_of_37_images(small_fewshot):
    assert check(small_fewshot, "fewshot") == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        splits = load("fewshot:oxford-pets", root=str(small_fewshot), shots=1, seed=2)
    assert len(splits.train) == 74 and len({splits.train.path(i) for i in range(74)}) == 37
    assert splits.train_val is splits.train and splits.num_classes == 37


@pytest.mark.parametrize("shots", fewshot.SHOTS)
def test_fewshot_cars_are_below_the_root_of_the_set(small_fewshot, shots):
    splits = load("fewshot:standford-cars", root=str(small_fewshot), shots=shots)
    assert np.bincount(splits.train.labels).tolist() == [shots] * 3
    assert splits.train[0][0].size == (8, 8)


def test_a_double_list_elsewhere_is_a_wrong_count(small_fewshot):
    file = small_fewshot / "food101/annotations/train_meta.list.num_shot_1.seed_1"
    file.write_text(file.read_text() * 2)
    assert [str(p) for p in check(small_fewshot, "fewshot")] == [f"{file}: 6 lines, expected 3"]


@pytest.mark.parametrize("shots, seed", [(None, 0), (3, 0), (1, 3)])
def test_fewshot_lists_that_do_not_exist(small_fewshot, shots, seed):
    with pytest.raises(DataError, match="lists exist for shots"):
        load("fewshot:food101", root=str(small_fewshot), shots=shots, seed=seed)


def test_paths_with_spaces(small_fewshot):
    assert load("fewshot:food101", root=str(small_fewshot), shots=1).val.path(0).endswith("food101/images/0 x.jpg")


def test_check_of_folders_and_tables(tmp_path):
    for part, name in (("train", "a"), ("train", "b"), ("val", "a"), ("val", "new")):
        write_image(tmp_path / "f" / part / name / "0.jpg")
    (tmp_path / "f" / "train" / "empty").mkdir()
    truncate(tmp_path / "f" / "val" / "a" / "0.jpg")
    found = [str(p) for p in check(tmp_path / "f", "folder")]
    assert len(found) == 3
    assert found[0].endswith("train/empty: no image in this class folder")
    assert found[1].endswith("val/new: this class does not occur in train")
    assert "val/a/0.jpg: cannot read" in found[2]
    table = tmp_path / "t.csv"
    table.write_text("path,label\nf/train/a/0.jpg,x\nf/val/a/0.jpg,y\nnone.jpg,y\n")
    found = [str(p) for p in check(table, "csv")]
    assert found[0].startswith(f"{table}:4: image") and found[1].startswith(f"{table}:3: ") and len(found) == 2


def test_check_of_nothing(tmp_path):
    with pytest.raises(DataError, match="not found"):
        check(tmp_path / "no")
    with pytest.raises(DataError, match="kind 'x'"):
        check(tmp_path, "x")
    assert len(check(tmp_path)) == 19
