"""Zero-shot evaluation end to end on a tiny random CLIP model and small folders."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import tiny_clip
import torch
from open_clip.model import CustomTextCLIP
from PIL import Image
from tiny_clip import PREPARE, tokenizer

import visionpeft as vp
from visionpeft import cli
from visionpeft.clip import ClipError
from visionpeft.clip.data import load_images
from visionpeft.clip.scores import classification_scores
from visionpeft.data.preprocessing import Preprocessing
from visionpeft.errors import AdapterFileError, DataError
from visionpeft.pipelines import zero_shot
from visionpeft.pipelines.zero_shot import Config, run

CLASSES = ("ant", "bee", "cat", "dog", "elk", "fly")


def tiny(width: int = 16):
    return tiny_clip.tiny({"width": width})


@pytest.fixture(autouse=True)
def _models(monkeypatch):
    monkeypatch.setattr(zero_shot, "build", lambda name, checkpoint=None: tiny_clip.clip(tiny(), name))


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 256, (20, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path


def adapter(path, tower=None, width=16):
    model = tiny(width)
    tuner = vp.attach(model, vp.LoRA(rank=2, targets="query value mlp_in", tower=tower))
    with torch.no_grad():
        for p in tuner.parameters():
            p.normal_(std=0.7)
    tuner.save(path)
    return str(path)


def spec(folder):
    return f"folder-all:{folder / 'images'}"


def test_scores_are_those_of_open_clips_classifier(folder):
    result = run(Config("tiny", data=(spec(folder),), templates="simple", out=str(folder / "out")))
    model, images = tiny(), load_images(spec(folder)).images
    weights = open_clip.build_zero_shot_classifier(model, tokenizer, CLASSES, open_clip.SIMPLE_IMAGENET_TEMPLATES)
    transform = PREPARE.transform()
    with torch.no_grad():
        pixels = torch.stack([transform(images[i][0]) for i in range(24)])
        logits = model.encode_image(pixels, normalize=True) @ weights
    order, labels = logits.argsort(1, descending=True), torch.from_numpy(images.labels)
    scores = result.before[spec(folder)]
    assert scores["top1"] == pytest.approx(float((order[:, 0] == labels).float().mean()), abs=1e-6)
    assert scores["top5"] == pytest.approx(float((order[:, :5] == labels[:, None]).any(1).float().mean()), abs=1e-6)
    scaled = classification_scores(model.logit_scale.exp().detach() * logits, labels)
    assert scores["ece"] == pytest.approx(scaled["ece"], abs=1e-5)
    assert result.templates == 7 and result.images == {spec(folder): 24} and not result.after


def test_an_adapter_shows_before_after_difference_and_a_curve_that_joins_them(folder):
    file = adapter(folder / "a.safetensors")
    config = Config("tiny", data=(spec(folder), "digits?test=20"), adapter=file, points=5, templates="{}",
                    out=str(folder / "out"))  # fmt: skip
    result = run(config)
    alone = run(Config("tiny", data=config.data, templates="{}", out=str(folder / "alone")))
    assert result.before == alone.before
    assert [point["scale"] for point in result.curve] == [0.0, 0.25, 0.5, 0.75, 1.0]
    for name in result.before:
        assert result.curve[0]["scores"][name] == result.before[name]["top1"]
        assert result.curve[-1]["scores"][name] == result.after[name]["top1"]
        assert result.difference()[name]["ece"] == result.after[name]["ece"] - result.before[name]["ece"] != 0
    stored = json.loads((folder / "out" / "result.json").read_text())
    assert stored["after"] == result.after and stored["parameters"] == 2 * (2 * 64 + 160)
    page = (folder / "out" / "report.html").read_text()
    assert "<svg" in page and "difference" in page and "http" not in page.replace("http://www.w3.org", "")


def test_an_adapter_of_the_text_tower_encodes_each_image_once(folder, monkeypatch):
    from visionpeft.clip import features

    calls = []
    real = features.encode_images
    monkeypatch.setattr(features, "encode_images", lambda *a: calls.append(1) or real(*a))
    run(Config("tiny", data=(spec(folder),), adapter=adapter(folder / "a.safetensors", "text"), points=3,
               templates="{}", out=str(folder / "out")))  # fmt: skip
    assert len(calls) == 1
    run(Config("tiny", data=(spec(folder),), adapter=adapter(folder / "b.safetensors", "image"), points=3,
               templates="{}", out=str(folder / "out2")))  # fmt: skip
    assert len(calls) == 1 + 3  # alone (as at scale 0), with the adapter (as at 1), 0.5


def test_at_scale_zero_the_model_is_as_without_the_adapter(folder):
    """What lets the curve begin with the scores that are known."""
    evaluator = zero_shot.Evaluator(
        tiny_clip.clip(tiny()), [load_images(spec(folder))], {}, ["{}"], zero_shot.FeatureCache()
    )
    before = evaluator.scores()
    tuner = vp.load(evaluator.clip.model, adapter(folder / "a.safetensors"))
    after = evaluator.scores()
    found = zero_shot.curve(tuner, evaluator, 2, {})
    assert [point["scores"] for point in found] == [
        {name: scores["top1"] for name, scores in end.items()} for end in (before, after)
    ]
    assert tuner.scale == 1


def test_tensors_that_learnt_besides_have_no_scale_and_the_curve_says_so(folder, capsys):
    model = tiny()
    tuner = vp.attach(model, vp.LoRA(rank=2, targets="query"), train="visual.proj")
    with torch.no_grad():
        for p in tuner.parameters():
            p.normal_()
        changed = tiny()
        changed.visual.proj.copy_(model.visual.proj)
    tuner.save(folder / "a.safetensors")
    arguments = ["--model", "tiny", "--data", spec(folder), "digits?test=40", "--templates", "{}", "--points", "2"]
    arguments += ["--adapter", str(folder / "a.safetensors"), "--out", str(folder / "out")]
    assert cli.main(["zero-shot", *arguments]) == 0
    result = json.loads((folder / "out" / "result.json").read_text())
    sets = [load_images(spec(folder)), load_images("digits?test=40")]
    expected = zero_shot.Evaluator(tiny_clip.clip(changed), sets, {}, ["{}"], zero_shot.FeatureCache()).scores()
    assert result["curve"][0]["scores"] == {name: scores["top1"] for name, scores in expected.items()}
    assert expected != result["before"]
    (note,) = result["notes"]
    assert note == "at every scale as tuned: 1 tensors of the model, learnt by train="
    assert note in (folder / "out" / "report.html").read_text() and note in " ".join(capsys.readouterr().out.split())


def test_what_acts_wholly_or_not_at_all_has_no_curve_and_is_evaluated_all_the_same(folder, monkeypatch):
    trunk = dict(image_size=32, timm_model_name="test_vit", timm_pool="avg", timm_proj="linear")

    def build(name="", checkpoint=None):
        return tiny_clip.clip(tiny_clip.tiny(trunk, cls=CustomTextCLIP))._replace(preprocessing=Preprocessing(
            (0.5,) * 3, (0.5,) * 3, (32, 32)))  # fmt: skip

    monkeypatch.setattr(zero_shot, "build", build)
    tuner = vp.attach(build().model, vp.methods.VPT(tokens=2, tower="image"))
    with torch.no_grad():
        for p in tuner.parameters():
            p.normal_()
    tuner.save(folder / "a.safetensors")
    result = run(Config("tiny", data=(spec(folder),), adapter=str(folder / "a.safetensors"), templates="{}",
                        out=str(folder / "out")))  # fmt: skip
    assert not result.curve and result.before != result.after
    assert result.notes[0].startswith("no curve: VPT acts wholly or not at all")
    assert "no curve: VPT" in (folder / "out" / "report.html").read_text()


def test_models_go_where_accelerate_has_its_device(folder, monkeypatch):
    seen = []
    accelerator = SimpleNamespace(device=torch.device("meta"), num_processes=1)
    monkeypatch.setattr(zero_shot, "make_accelerator", lambda: accelerator)
    monkeypatch.setattr(zero_shot.Evaluator, "scores", lambda e: seen.append(e.clip.model.logit_scale.device) or {})
    run(Config("tiny", data=(spec(folder),), templates="{}", out=str(folder / "out")))
    assert seen == [torch.device("meta")]


def test_a_curve_over_what_learns_in_place_warns_of_nothing(folder, recwarn):
    """Nobody learns there, so it need not be said of every tensor that a blend does not."""
    model = tiny()
    tuner = vp.attach(model, vp.methods.LNTuning())
    with torch.no_grad():
        for p in tuner.parameters():
            p.normal_()
    tuner.save(folder / "a.safetensors")
    result = run(Config("tiny", data=(spec(folder),), adapter=str(folder / "a.safetensors"), points=3, templates="{}",
                        out=str(folder / "out")))  # fmt: skip
    assert len(result.curve) == 3 and not result.notes
    assert not [str(w.message) for w in recwarn if "learns" in str(w.message)]


@pytest.mark.parametrize("file, error, message", [
    ("head.safetensors", ClipError, "holds a head or prompts, no adapter: .*`visionpeft predict`"),
    ("none.safetensors", AdapterFileError, "none.safetensors: no readable safetensors file"),
])  # fmt: skip
def test_what_is_no_adapter_is_refused_before_anything_is_computed(folder, file, error, message, monkeypatch):
    monkeypatch.setattr(zero_shot, "build", None)
    with pytest.raises(error, match=message):
        run(Config("tiny", data=(spec(folder),), adapter=str(folder / file), out=str(folder / "out")))


def test_tuning_first_gives_the_adapter_that_is_compared(folder, monkeypatch):
    from visionpeft.pipelines import few_shot

    monkeypatch.setattr(few_shot, "build", zero_shot.build)
    config = Config("tiny", data=("digits?train=200&test=50", spec(folder)), tune="lora:rank=1,tower=image", shots=2,
                    iterations=3, points=2, templates="{}", out=str(folder / "out"))  # fmt: skip
    told = []
    result = run(config, told.append)
    assert told[0].startswith("tuning on digits") and told[3].startswith("3 of 3 updates, loss ")
    (file,) = (folder / "out" / "tuning").glob("*/adapter.safetensors")
    assert result.adapter.startswith("LoRA(")
    again = run(Config("tiny", data=config.data, adapter=str(file), points=2, templates="{}",
                       out=str(folder / "again")))  # fmt: skip
    assert result.after == again.after != result.before
    for bad in (dict(data=(spec(folder),)), dict(tune="gda"), dict(adapter="a.safetensors"), dict(data=())):
        with pytest.raises(ClipError, match="needs data with training images|nothing to evaluate"):
            run(dataclasses.replace(config, **bad))


@pytest.mark.parametrize("arguments", [[], ["--out", "here"], ["--root", "there"], ["--root", "there", "--out", "x"]])
def test_without_arguments_the_nano_clip_is_evaluated_and_tuned(arguments, monkeypatch, capsys):
    seen = []
    result = zero_shot.Result("nano_clip", 80)
    monkeypatch.setattr(zero_shot, "run", lambda config, watch: seen.append(config) or result)
    assert cli.main(["zero-shot", *arguments]) == 0
    (config,) = seen
    assert config.model == "nano_clip" and config.tune == "clip_lora" and config.shots == 16
    assert config.data[0].startswith("bundled")
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert config.out == given.get("--out", Config().out) and config.root == given.get("--root")
    assert config.data[1].startswith("torchvision:CIFAR10?" if "--root" in given else "digits?")
    assert ("visionpeft zero-shot --root data" in capsys.readouterr().out) == ("--root" not in given)


def test_any_other_argument_is_no_demo(monkeypatch):
    seen = []
    monkeypatch.setattr(zero_shot, "run", lambda config, watch: seen.append(config) or zero_shot.Result("nano_clip", 1))
    assert cli.main(["zero-shot", "--templates", "{}", "--root", "there"]) == 0
    assert seen[0] == Config(templates="{}", root="there")


def test_a_root_goes_to_the_sets_that_lie_below_one(folder):
    """The bundled set and scikit-learn's digits refuse one, and often stand beside others."""
    assert len(load_images("digits?test=20", root=str(folder)).images) == 20
    from visionpeft.pipelines import few_shot

    assert len(few_shot.load(few_shot.Config(data="digits?train=100&test=20", root=str(folder), shots=1)).test) == 20
    for kind, files in (("folder-all", 24), ("folder", len(load_images(f"folder:{folder / 'images'}").images))):
        assert len(load_images(f"{kind}:images", root=str(folder)).images) == files
    with pytest.raises(DataError, match="needs root="):
        load_images("torchvision:CIFAR10")


def test_retrieval_on_captioned_images(folder):
    rows = [f"images/{c}/{i}.png,{c} number {i}" + " and so on" * 20 for c in CLASSES for i in range(2)]
    (folder / "captions.csv").write_text("image,caption\n" + "\n".join(rows))
    result = run(Config("tiny", data=(), captions=(str(folder / "captions.csv"),), out=str(folder / "out")))
    (scores,) = result.before.values()
    assert set(scores) == {f"{way}_r@{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)}


def test_the_command_prints_the_table_and_the_curve(folder, capsys):
    file = adapter(folder / "a.safetensors")
    arguments = ["--data", spec(folder), "digits?test=20", "--templates", "{}", "--adapter", file, "--points", "3"]
    assert cli.main(["zero-shot", "--model", "tiny", *arguments, "--out", str(folder / "out")]) == 0
    shown = capsys.readouterr().out
    assert "difference" in shown and "0.50" in shown and "mean per class" in shown and "digits" in shown
    assert "tiny, 1 template" in shown and "templates" not in shown
    assert cli.main(["zero-shot", "--model", "tiny", "--data", "folder-all:nowhere"]) == 2
    assert "nowhere: image folder not found" in capsys.readouterr().err


def test_class_lists_rename_and_are_checked(folder):
    (folder / "names.txt").write_text("\n".join(f"a {c}" for c in CLASSES))
    (folder / "names.json").write_text(json.dumps({c: f"a {c}" for c in CLASSES}))
    expected = [f"a {c}" for c in CLASSES]
    assert load_images(spec(folder), classes=str(folder / "names.txt")).classes == expected
    assert load_images(spec(folder), classes=str(folder / "names.json")).classes == expected
    (folder / "short.txt").write_text("ant\nbee\n")
    (folder / "other.json").write_text(json.dumps({c: c for c in (*CLASSES, "gnu")}))
    (folder / "less.json").write_text(json.dumps({"ant": "ant"}))
    for file, message in (("short.txt", "2 names for 6 classes"), ("other.json", "unknown class 'gnu'"),
                          ("less.json", "no name for class 'bee'")):  # fmt: skip
        with pytest.raises(ClipError, match=message):
            load_images(spec(folder), classes=str(folder / file))


def test_names_of_imagenet_are_at_hand(tmp_path):
    """For a thousand folders called n00000000 and so on, whose order is that of the names."""
    for i in range(1000):
        (tmp_path / f"n{i:08}").mkdir()
        Image.new("RGB", (2, 2)).save(tmp_path / f"n{i:08}" / "a.png")
    found = load_images(f"folder-all:{tmp_path}", classes="imagenet")
    assert found.classes == list(open_clip.IMAGENET_CLASSNAMES) and found.images.labels.tolist() == list(range(1000))
    with pytest.raises(ClipError, match="imagenet: 1000 names for 10 classes"):
        load_images("digits?test=20", classes="imagenet")


def test_tuning_first_learns_the_names_that_it_is_evaluated_with(folder, monkeypatch):
    from visionpeft.clip.text import class_prompts
    from visionpeft.pipelines import few_shot, fitting

    monkeypatch.setattr(few_shot, "build", zero_shot.build)
    seen = []
    for module in (fitting, zero_shot):
        monkeypatch.setattr(module, "class_prompts", lambda names, t: seen.append(names) or class_prompts(names, t))
    names = [f"an {c}" for c in CLASSES]
    (folder / "names.txt").write_text("\n".join(names))
    run(Config("tiny", data=(f"folder:{folder / 'images'}",), classes=str(folder / "names.txt"), points=0, shots=1,
               tune="lora:rank=1", iterations=1, templates="{}", out=str(folder / "out")))  # fmt: skip
    assert seen and all(list(found) == names for found in seen)
    (out,) = (folder / "out" / "tuning").iterdir()
    assert json.loads((out / "config.json").read_text())["classes"] == str(folder / "names.txt")
    assert "classes" not in few_shot.Config().identity()


def test_bad_input_is_named(folder):
    other = adapter(folder / "wide.safetensors", "image", width=24)
    with pytest.raises(AdapterFileError, match="made for another model"):
        run(Config("tiny", data=(spec(folder),), adapter=other, out=str(folder / "o")))
    with pytest.raises(ClipError, match="write {} or {c} once"):
        run(Config("tiny", data=(spec(folder),), templates="a photo", out=str(folder / "o")))
    with pytest.raises(ClipError, match="a curve needs 2"):
        run(Config("tiny", data=(spec(folder),), adapter=adapter(folder / "a.safetensors"), points=1,
                   out=str(folder / "o")))  # fmt: skip
    with pytest.raises(ClipError, match="nothing to evaluate"):
        run(Config("tiny", data=(), out=str(folder / "o")))
    with pytest.raises(ClipError, match="more tokens than the context of 32"):
        run(Config("tiny", data=(spec(folder),), templates="{} " + "and " * 40, out=str(folder / "o")))
    (folder / "captions.csv").write_text("image,caption\nimages/ant/9.png,an ant\n")
    with pytest.raises(DataError, match=r"9.png \(listed in .*captions.csv:2\): no such image file"):
        run(Config("tiny", data=(), captions=(str(folder / "captions.csv"),), out=str(folder / "o")))
