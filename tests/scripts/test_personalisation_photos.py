"""The table of real photos: its judge, its arithmetic, and that finished cells are kept; nothing is drawn or learnt."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")
pytest.importorskip("timm")

from PIL import Image  # noqa: E402

from visionpeft.data.subjects import Crop, Picture, pixels  # noqa: E402
from visionpeft.errors import DataError  # noqa: E402
from visionpeft.training.runs import RunError  # noqa: E402

COLOURS = {"ant": (200, 0, 0), "bee": (0, 200, 0), "cow": (0, 0, 200)}


@pytest.fixture
def script(monkeypatch: Any) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "scripts"))
    import personalisation_photos

    return personalisation_photos


def plain(colour: tuple[int, int, int], size: tuple[int, int] = (40, 50)) -> Any:
    return Image.new("RGB", size, colour)


def mean_colour(images: Any) -> Any:
    return np.stack([np.asarray(image).mean((0, 1)) / 255 for image in images])


def test_the_judge_tells_colours_apart(script: Any) -> None:
    photos = {name: [plain(tuple(max(0, c - 20 * i) for c in colour)) for i in range(3)]
              for name, colour in COLOURS.items()}  # fmt: skip
    model, accuracy = script.judge(mean_colour, photos)
    assert accuracy == 1
    others = [plain(colour, (32, 32)) for colour in ((30, 10, 150), (180, 60, 10), (0, 120, 40))]
    assert model.predict(mean_colour(others)).tolist() == [2, 0, 1]


def test_a_photo_left_out_is_not_known_from_its_copies(script: Any) -> None:
    """Every photo a direction of its own: all are known by heart, and one that was left out has nothing to go by but
    which subject has more photos."""
    photos = {"ant": [plain((40 * i, 0, 0)) for i in (0, 1)], "bee": [plain((40 * i, 0, 0)) for i in (2, 3, 4, 5)]}

    def features(images: Any) -> Any:
        return np.stack([np.eye(6)[np.asarray(image)[0, 0, 0] // 40] for image in images])

    model, accuracy = script.judge(features, photos)
    assert accuracy == 4 / 6
    assert model.predict(np.eye(6)).tolist() == [0, 0, 1, 1, 1, 1]


def test_copies_begin_with_what_training_sees(script: Any, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    picture = Picture(tmp_path / "a.png", (tmp_path / "a.png").read_bytes(), (50, 70))
    found = [np.asarray(image) for image in script.copies(picture.open())]
    assert len(found) == 12 and {image.shape for image in found} == {(32, 32, 3)}
    learnt = pixels(picture, (32, 32), Crop())[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(found[0].astype(np.float32) / 127.5 - 1, learnt)
    larger = np.asarray(script.small(picture.open(), 36))
    for image, (x, y) in zip(found[1:6], ((0, 0), (0, 4), (4, 0), (4, 4), (2, 2)), strict=True):
        np.testing.assert_array_equal(image, larger[y : y + 32, x : x + 32])
    np.testing.assert_array_equal(found[6:], [image[:, ::-1] for image in found[:6]])


def test_the_table_is_of_means_over_subjects_and_seeds(script: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(script.demo, "METHODS", {"lora:rank=4": 1e-3})
    given = {("ant", None, 0): (0.1, 0.5), ("bee", None, 0): (0.3, 0.6), ("ant", "lora:rank=4", 3): (0.4, 0.5),
             ("bee", "lora:rank=4", 3): (0.8, 0.4), ("ant", "lora:rank=4", 5): (0.6, 0.5),
             ("bee", "lora:rank=4", 5): (1.0, 0.3)}  # fmt: skip

    def cell(*asked: Any) -> dict[str, float]:
        recognised, others = given[(*asked, None, 0)[:3]]
        return {"recognised": recognised, "others": others, "parameters": 1234, "bytes": 5678}

    study = SimpleNamespace(nouns={"ant": "toy", "bee": "dog"}, cell=cell)
    assert script.table(study, (3, 5)) == (
        "| method | rate | parameters | file, bytes | recognised % | others % |\n"
        "|---|---:|---:|---:|---:|---:|\n"
        "| before | | | | 20.0 | 55.0 |\n"
        "| lora:rank=4 | 0.001 | 1,234 | 5,678 | 70.0 ± 14.1 | 42.5 ± 3.5 |")
    assert script.table(study, (3,)).endswith("| 60.0 | 45.0 |")


class Stand:
    """In the place of the pipeline: what it draws depends on what has been learnt, a learnt toy is drawn three times in
    four; counts what was asked for."""

    def __init__(self, script: Any, monkeypatch: Any) -> None:
        self.learnt: list[Any] = []
        self.measured: list[str] = []
        for name in ("load_pipeline", "family_of"):
            monkeypatch.setattr(script, name, lambda *given: None)
        monkeypatch.setattr(script, "image_encoder", lambda *given: SimpleNamespace(images=mean_colour))
        monkeypatch.setattr(script.demo, "class_head", lambda: None)
        monkeypatch.setattr(script.demo, "learnt", self.learn)
        monkeypatch.setattr(script.demo, "draw_subject", self.draw)
        monkeypatch.setattr(script.demo, "others", lambda family, config, classes: 0.5 if config.method else 0.75)
        monkeypatch.setattr(script.demo, "METHODS", {"lora:rank=4": 1e-3, "difffit": 2e-3})

    @contextmanager
    def learn(self, family: Any, config: Any) -> Any:
        self.learnt.append(config)
        yield SimpleNamespace(parameters=10, file_bytes=20), f"<subject> {config.class_name}"

    def draw(self, family: Any, config: Any, name: str) -> list[Any]:
        self.measured.append(name)
        subject = Path(config.images).name
        right, wrong = (plain(COLOURS[s], (32, 32)) for s in (subject, "bee" if subject == "ant" else "ant"))
        return [right, right, right, wrong] if name.startswith("<subject>") else [wrong] * 12


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name, colour in COLOURS.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(2):
            plain((*colour[:2], colour[2] + i)).save(tmp_path / "photos" / name / f"{i}.png")
    (tmp_path / "photos" / "classes.json").write_text(json.dumps({"ant": "toy", "bee": "dog", "cow": "dog"}))
    return tmp_path / "photos"


def test_finished_cells_are_kept(script: Any, monkeypatch: Any, photos: Path, tmp_path: Path) -> None:
    stand, page, out = Stand(script, monkeypatch), tmp_path / "page.md", tmp_path / "out"
    page.write_text("# Page\n\n## Real photos\n\nold\n\n## Results\n\nkept\n")

    def main(*more: str) -> None:
        monkeypatch.setattr(sys, "argv", ["personalisation_photos.py", "--photos", str(photos), "--out", str(out),
                                          "--subjects", *COLOURS, "--into", str(page), *more])  # fmt: skip
        script.main()

    main()
    asked = [(c.method, c.lr, c.seed, c.class_name, c.images) for c in stand.learnt]
    assert asked == [(method, lr, 0, noun, f"{photos}/{name}") for method, lr in script.demo.METHODS.items()
                     for name, noun in (("ant", "toy"), ("bee", "dog"), ("cow", "dog"))]  # fmt: skip
    same = {(c.word_vectors, c.prior, c.steps, c.rates, c.schedule) for c in stand.learnt}
    demo = script.demo.DEMO
    assert same == {(demo.word_vectors, demo.prior, demo.steps, demo.rates, demo.schedule)}
    assert stand.measured == ["toy", "dog", "dog"] + 2 * ["<subject> toy", "<subject> dog", "<subject> dog"]
    text = page.read_text()
    assert "old" not in text and text.endswith("\n\n## Results\n\nkept\n")
    assert text.startswith("# Page\n\n## Real photos\n\n6 photos of ant, bee, cow; 600 updates; seeds 0; ")
    assert "it knows 100 %" in text
    assert "| before | | | | 0.0 | 75.0 |\n| lora:rank=4 | 0.001 | 10 | 20 | 75.0 | 50.0 |\n| difffit | 0.002" in text
    for method in ("lora-rank=4", "difffit"):
        with Image.open(out / f"sheet-{method}.png") as sheet:
            assert sheet.size == (150 + 8 * 68, 9 * 68)  # three lines for each subject, eight images in the longest
    with Image.open(out / "sheet-difffit.png") as sheet:  # of ant: a photo, the wrong toy before, the right one after
        assert [sheet.getpixel((160, 68 * i + 32)) for i in range(3)] == [COLOURS[n] for n in ("ant", "bee", "ant")]
    main()
    assert len(stand.learnt) == 6 and page.read_text() == text, "a finished cell was learnt again"
    (out / "difffit-bee-0" / "figures.json").unlink()
    main("--seeds", "0", "1")
    assert [(c.method, Path(c.images).name, c.seed) for c in stand.learnt[6:]] == [
        ("lora:rank=4", "ant", 1), ("lora:rank=4", "bee", 1), ("lora:rank=4", "cow", 1), ("difffit", "bee", 0),
        ("difffit", "ant", 1), ("difffit", "bee", 1), ("difffit", "cow", 1)]  # fmt: skip
    assert "seeds 0, 1; " in page.read_text() and "| 75.0 ± 0.0 | 50.0 ± 0.0 |" in page.read_text()
    with pytest.raises(RunError, match="encoder"):
        main("--encoder", "another")
    plain((9, 9, 9)).save(photos / "cow" / "2.png")
    with pytest.raises(RunError, match="photos"):
        main()


def test_a_subject_without_a_noun_is_refused(script: Any, photos: Path) -> None:
    with pytest.raises(DataError, match="no noun for 'dodo'.*it has ant, bee, cow"):
        script.read(str(photos), ("ant", "dodo"))
    (photos / "classes.json").unlink()
    with pytest.raises(DataError, match="no noun for 'ant'.*it has none"):
        script.read(str(photos), ("ant",))
