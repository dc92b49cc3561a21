"""`visionpeft predict` on a folder gives what the run itself would say of these images."""

from __future__ import annotations

import csv
import json

import numpy as np
import open_clip
import pytest
import tiny_clip
import torch
from PIL import Image
from tiny_clip import PREPARE, tokenizer

import visionpeft as vp
from visionpeft import cli
from visionpeft.clip import ClipError
from visionpeft.errors import AdapterFileError, DataError
from visionpeft.pipelines import clip_deploy, contrastive, few_shot, zero_shot

CLASSES = ["ant", "bee", "cat"]


def tiny():
    return tiny_clip.tiny({"layers": 2}, {"layers": 2})


@pytest.fixture(autouse=True)
def _models(monkeypatch):
    for job in (few_shot, zero_shot, contrastive):
        monkeypatch.setattr(job, "build", lambda name, checkpoint=None: tiny_clip.clip(tiny(), name))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Folders train and test of class folders; a caption beside every image of train."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 7)):
        for name in CLASSES:
            folder = root / "set" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(60 * len(name) * rng.random() + rng.integers(0, 200, (16, 16, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    for i in range(24):
        name = CLASSES[i % 3]
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"{name} number {i}")
    (root / "pairs").mkdir()
    for file in [*root.glob("*.png"), *root.glob("*.txt")]:
        file.rename(root / "pairs" / file.name)
    return root


def tuned(root, out, method, **other):
    settings = dict(shots=3, iterations=8, batch_size=6, lr=2e-2, views=2, augment=False)
    return few_shot.run(few_shot.Config("tiny", data=f"folder:{root / 'set'}", method=method, out=str(out),
                                        **{**settings, **other}))  # fmt: skip


def accuracy(found, root):
    names = {str(p): p.parent.name for p in (root / "set" / "test").rglob("*.png")}
    assert sorted(p.path for p in found) == sorted(names)
    return sum(p.label == names[p.path] for p in found) / len(names)


@pytest.mark.parametrize("method", ["clip_lora", "clipfit", "ln_tuning", "gda", "tip_f", "clip_adapter", "linear_probe",
                                    "coop", "ivlp", "promptsrc"])  # fmt: skip
def test_few_shot_runs_predict_as_they_scored(root, tmp_path, method):
    result = tuned(root, tmp_path, method)
    found = clip_deploy.predict(tmp_path, root / "set" / "test")
    assert accuracy(found, root) == pytest.approx(result.after["test"]["top1"], abs=1e-6)
    assert all(0 < p.probability <= 1 and len(p.others) == 2 for p in found)
    plain = clip_deploy.predict(untuned(tmp_path), root / "set" / "test")
    assert max(abs(a.probability - b.probability) for a, b in zip(found, plain, strict=True)) > 1e-4


def untuned(out):
    """A run of zero-shot without an adapter, with few-shot's factor 100 not among it."""
    folder = out / "plain"
    zero_shot.run(zero_shot.Config("tiny", data=("digits?test=10",), templates="{}", out=str(folder)))
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | {"classes": CLASSES}))
    return folder


def test_other_classes_may_be_asked_for_where_the_text_tower_says_what_they_are(root, tmp_path):
    for method in ("clip_lora", "coop", "ivlp", "clip_adapter"):
        tuned(root, tmp_path / method, method)
    tuned(root, tmp_path / "gda", "gda")
    (tmp_path / "names.txt").write_text("dog\nsnake\n\nbee\n")
    (tmp_path / "names.json").write_text('["dog", "snake", "bee"]')
    for method in ("clip_lora", "coop", "ivlp", "clip_adapter"):
        found = [clip_deploy.predict(tmp_path / method, root / "set" / "test", str(tmp_path / f"names.{kind}"))
                 for kind in ("txt", "json")]  # fmt: skip
        assert found[0] == found[1] and {p.label for p in found[0]} <= {"dog", "snake", "bee"}
    with pytest.raises(ClipError, match="gda knows only the classes that it was made for"):
        clip_deploy.predict(tmp_path / "gda", root / "set" / "test", str(tmp_path / "names.txt"))


def test_zero_shot_and_contrastive_runs_predict_with_the_models_own_scale(root, tmp_path):
    contrastive.run(contrastive.Config(captions=str(root / "pairs"), batch_size=10, piece=5, epochs=2, held_out=0.45,
                                       method="lora:rank=2", out=str(tmp_path / "contrast"), lr=1e-2))  # fmt: skip
    file = tmp_path / "contrast" / "adapter.safetensors"
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))
    zero_shot.run(zero_shot.Config("tiny", data=(f"folder:{root / 'set'}",), templates="a photo of a {}.", points=0,
                                   adapter=str(file), out=str(tmp_path / "zero")))  # fmt: skip
    model = tiny()
    vp.load(model, file)
    images = sorted((root / "set" / "test").rglob("*.png"))
    weights = open_clip.build_zero_shot_classifier(model, tokenizer, CLASSES, ["a photo of a {}."])
    with torch.no_grad():
        pixels = torch.stack([PREPARE.transform()(Image.open(p)) for p in images])
        logits = model.logit_scale.exp() * model.encode_image(pixels, normalize=True) @ weights
    expected = logits.softmax(1).max(1)
    for run, names in (("contrast", str(tmp_path / "names.txt")), ("zero", None)):
        found = clip_deploy.predict(tmp_path / run, root / "set" / "test", names)
        assert [p.path for p in found] == [str(p) for p in images]
        assert [p.label for p in found] == [CLASSES[int(i)] for i in expected.indices]
        assert [p.probability for p in found] == pytest.approx(expected.values.tolist(), abs=1e-5)
    with pytest.raises(ClipError, match="adapter.safetensors names no classes: give a file of them"):
        clip_deploy.predict(tmp_path / "contrast", root / "set" / "test")


def test_the_command_writes_a_table_and_an_image_alone_will_do(root, tmp_path, capsys):
    tuned(root, tmp_path / "run", "gda")
    image = root / "set" / "test" / "ant" / "0.png"
    assert cli.main(["predict", str(tmp_path / "run"), str(image), "--out", str(tmp_path / "p.csv")]) == 0
    with (tmp_path / "p.csv").open() as file:
        (row,) = list(csv.DictReader(file))
    assert row["path"] == str(image) and row["label"] in CLASSES and "1 images" in capsys.readouterr().out
    assert cli.main(["predict", str(tmp_path), str(image), "--classes", str(image)]) == 2
    assert "is no run of few-shot, contrast or zero-shot" in capsys.readouterr().err


def test_bad_input_is_named(root, tmp_path):
    with pytest.raises(AdapterFileError, match="no run of `visionpeft few-shot`"):
        clip_deploy.predict(tmp_path, root / "set")
    (tmp_path / "adapter.safetensors").write_bytes(b"no")
    with pytest.raises(AdapterFileError, match="no readable adapter file"):
        clip_deploy.predict(tmp_path, root / "set")
    tuned(root, tmp_path / "run", "gda")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="none: no images"):
        clip_deploy.predict(tmp_path / "run", tmp_path / "none")
    (tmp_path / "none" / "a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="a.png: cannot read this image"):
        clip_deploy.predict(tmp_path / "run", tmp_path / "none")
    (tmp_path / "names.json").write_text('{"a": 1}')
    with pytest.raises(ClipError, match="expected a JSON list of names"):
        clip_deploy.predict(tmp_path / "run", root / "set", str(tmp_path / "names.json"))
