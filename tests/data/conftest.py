"""Tiny copies of the benchmark layouts. The tables of tasks shrink with them: a sound tree has no problem."""

from __future__ import annotations

import json

import pytest
from small_data import write_image

from visionpeft.data import fewshot, fgvc, vtab


@pytest.fixture
def small_vtab(tmp_path, monkeypatch):
    """All 19 tasks, three classes each: 6 train, 3 val, 9 train_val, 4 test images."""
    sizes = {"train": 6, "val": 3, "train_val": 9, "test": 4}
    for name, task in vtab.TASKS.items():
        monkeypatch.setitem(vtab.TASKS, name, vtab.Task(task.group, 3, (4,)))
        for part, count in sizes.items():
            split = vtab.LISTS[part]
            lines = [f"images/{split}/{i:06d}.jpg {i % 3}" for i in range(count)]
            for i in range(count):
                write_image(tmp_path / name / "images" / split / f"{i:06d}.jpg", seed=i)
            (tmp_path / name / f"{split}.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(vtab.Task, "counts", lambda self, part: (sizes[part],))
    return tmp_path


@pytest.fixture
def small_fgvc(tmp_path, monkeypatch):
    """The five sets with three classes, labelled 5, 7, 9 as StanfordCars and CUB count from other bases."""
    for name, known in fgvc.SETS.items():
        monkeypatch.setitem(fgvc.SETS, name, fgvc.FineGrained(3, known.images))
        for part, count in (("train", 6), ("val", 3), ("test", 4)):
            entries = {f"{part}/{i}.jpg": 5 + 2 * (i % 3) for i in range(count)}
            for i, image in enumerate(entries):
                write_image(tmp_path / name / known.images / image, seed=i)
            (tmp_path / name / f"{part}.json").write_text(json.dumps(entries))
    return tmp_path


@pytest.fixture
def small_fewshot(tmp_path, monkeypatch):
    """Oxford Pets as published (37 classes, 1-shot lists of 74 lines) and the other sets with three classes."""
    for name, known in fewshot.SETS.items():
        classes = 37 if name == "oxford-pets" else 3
        monkeypatch.setitem(fewshot.SETS, name, fewshot.FewShot(classes, classes, known.images))
        lists = tmp_path / name / "annotations"
        lists.mkdir(parents=True)
        for c in range(classes):
            write_image(tmp_path / name / known.images / f"{c} x.jpg", seed=c)
        for shots in fewshot.SHOTS:
            repeats = 2 if classes == 37 and shots == 1 else shots
            text = "".join(f"{c} x.jpg {c}\n" * repeats for c in range(classes))
            for seed in fewshot.SEEDS:
                (lists / f"train_meta.list.num_shot_{shots}.seed_{seed}").write_text(text)
        for part in ("val", "test"):
            (lists / f"{part}_meta.list").write_text("".join(f"{c} x.jpg {c}\n" for c in range(classes)))
    return tmp_path


@pytest.fixture
def small_folder(tmp_path):
    """`root/<class>/image`: ten images of each of three classes."""
    for c, name in enumerate(("ant", "bee", "cat")):
        for i in range(10):
            write_image(tmp_path / "pets" / name / f"{i}.png", seed=10 * c + i)
    return tmp_path / "pets"
