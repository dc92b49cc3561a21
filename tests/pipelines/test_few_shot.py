"""Few-shot tuning end to end on a tiny random CLIP model and coloured squares in CoOp's layout."""

from __future__ import annotations

import json

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import load_file

import visionpeft as vp
from visionpeft import cli
from visionpeft.clip import ClipError
from visionpeft.clip.data import base_and_new, harmonic, load_coop, load_images, read_split
from visionpeft.clip.model import Clip
from visionpeft.clip.scores import classification_scores
from visionpeft.clip.tuning import Steps
from visionpeft.data.preprocessing import Preprocessing
from visionpeft.errors import DataError
from visionpeft.pipelines import few_shot
from visionpeft.pipelines.few_shot import CLIP_LORA, Config, load, run
from visionpeft.pipelines.methods import parse_method

BPE = open_clip.SimpleTokenizer()
PREPARE = Preprocessing((0.5,) * 3, (0.5,) * 3, (16, 16))
COLOURS = {"red": (220, 30, 30), "lime": (30, 220, 30), "blue": (30, 30, 220), "grey": (120, 120, 120),
           "pink": (240, 150, 180)}  # fmt: skip
METHODS = ("clip_lora", "clipfit", "ln_tuning", "lora:rank=2,tower=image", "block_lora:rank=2", "gda", "tip", "tip_f",
           "clip_adapter", "linear_probe", "coop", "ivlp", "promptsrc")  # fmt: skip


def tokenizer(texts, context_length=32):
    return BPE(texts, context_length)


def tiny() -> CLIP:
    torch.manual_seed(4)
    vision = dict(image_size=16, layers=2, width=16, head_width=8, patch_size=8)
    model = CLIP(12, vision, dict(context_length=32, width=16, heads=2, layers=1)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
        model.visual.conv1.weight.mul_(4)  # what an image shows, and which words a text has, must count
        model.token_embedding.weight.mul_(4)
        model.visual.class_embedding.zero_()
        model.ln_final.bias.zero_(), model.visual.ln_post.bias.zero_()
    return model


@pytest.fixture(autouse=True)
def _model(monkeypatch):
    monkeypatch.setattr(few_shot, "build", lambda name, checkpoint=None: Clip(tiny(), tokenizer, PREPARE, name))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """EuroSAT's folder and split file, with squares of five colours."""
    root = tmp_path_factory.mktemp("coop")
    folder = root / "eurosat"
    rng = np.random.default_rng(0)
    split = {}
    for part, count in (("train", 6), ("val", 5), ("test", 8)):
        split[part] = []
        for label, (name, colour) in enumerate(COLOURS.items()):
            for i in range(count):
                path = folder / "2750" / name / f"{part}{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = np.clip(np.array(colour) + rng.normal(0, 40, (16, 16, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(path)
                split[part].append([f"{name}/{part}{i}.png", label, name])
    (folder / "split_zhou_EuroSAT.json").write_text(json.dumps(split))
    return root


def config(root, out, method="clip_lora", **other):
    iterations = {"iterations": 12, "batch_size": 10, "lr": 5e-3, "views": 2}
    return Config("tiny", data="coop:eurosat", root=str(root), method=method, shots=4, out=str(out),
                  **{**iterations, **other})  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_permuting_the_test_labels_changes_nothing_that_was_learnt_or_chosen(root, tmp_path, method, monkeypatch):
    found = []
    for run_number in range(2):
        if run_number:
            real = load

            def permuted(c, real=real):
                splits = real(c)
                splits.test.labels[:] = np.random.default_rng(5).permutation(splits.test.labels)
                return splits

            monkeypatch.setattr(few_shot, "load", permuted)
        out = tmp_path / str(run_number)
        result = run(config(root, out, method))
        (file,) = out.glob("*.safetensors")
        found.append((result, load_file(file)))
    (first, tensors), (second, again) = found
    assert first.chosen == second.chosen and first.parameters == second.parameters
    assert list(tensors) == list(again) and all(torch.equal(tensors[k], again[k]) for k in tensors)
    if method in ("gda", "tip", "tip_f", "linear_probe"):  # others may still name one class for all
        assert first.after != second.after


def test_tuning_gains_and_the_adapter_file_brings_the_gain_back(root, tmp_path):
    result = run(config(root, tmp_path, iterations=120, augment=False))
    assert result.after["test"]["top1"] > result.before["test"]["top1"] + 0.2
    assert result.parameters == 2 * 3 * (2 * 2 * 16) + 3 * 2 * 2 * 16
    model = tiny()
    vp.load(model, tmp_path / "adapter.safetensors")
    splits = load_coop("eurosat", root, 4)
    weights = open_clip.build_zero_shot_classifier(model, tokenizer, splits.classes, ["a photo of a {}."])
    pixels = torch.stack([PREPARE.transform()(splits.test[i][0]) for i in range(40)])
    with torch.no_grad():
        choice = (model.encode_image(pixels, normalize=True) @ weights).argmax(1)
    right = (choice == torch.from_numpy(splits.test.labels)).float().mean()
    assert float(right) == pytest.approx(result.after["test"]["top1"])


@pytest.mark.parametrize("method", ["clip_lora", "clipfit", "gda", "tip", "clip_adapter", "coop", "promptsrc"])
def test_base_to_new_tests_both_halves(root, tmp_path, method):
    result = run(config(root, tmp_path, method, base_to_new=True))
    base, new = result.after["base"]["top1"], result.after["new"]["top1"]
    assert result.harmonic == pytest.approx(2 * base * new / (base + new) if base + new else 0)
    assert set(result.before) == {"base", "new"}
    if method == "tip":  # it knows nothing of other classes
        assert result.after["new"] == result.before["new"]


@pytest.mark.parametrize("method", ["lora:rank=2", "linear_probe", "tip", "gda", "ivlp"])
def test_other_sets_tell_what_was_forgotten(root, tmp_path, method):
    """By their own class names; heads that know nothing of other classes leave the zero-shot classifier there."""
    result = run(config(root, tmp_path, method, others=("digits?test=60",)))
    assert list(result.before) == list(result.after) == ["test", "digits?test=60"]
    fitter = few_shot.Fitter(config(root, tmp_path, method), Clip(tiny(), tokenizer, PREPARE, "tiny"), None)
    digits = load_images("digits?test=60")
    alone = classification_scores(fitter.zero_shot().logits(digits.images, digits.classes, False),
                                  torch.from_numpy(digits.images.labels))  # fmt: skip
    assert result.before["digits?test=60"] == alone
    same = result.after["digits?test=60"] == alone
    assert same == (method in ("linear_probe", "tip"))


def test_halves_are_cut_by_label_and_counted_from_zero(root):
    base, new = base_and_new(load_coop("eurosat", root, 4))
    assert base.classes == ["red", "lime", "blue"] and new.classes == ["grey", "pink"]
    assert sorted(set(new.test.labels)) == [0, 1] and "grey" in new.test.path(0)
    assert len(base.train) == 12 and len(new.train) == 8
    assert harmonic(0.8228, 0.7514) == pytest.approx(0.7855, abs=5e-5)


def test_shots_are_drawn_by_seed_and_validation_has_four_at_most(root):
    first, again, other = (load_coop("eurosat", root, 5, seed) for seed in (1, 1, 2))
    names = [[s.train.path(i) for i in range(len(s.train))] for s in (first, again, other)]
    assert names[0] == names[1] != names[2]
    assert np.bincount(first.train.labels).tolist() == [5] * 5
    assert np.bincount(first.val.labels).tolist() == [4] * 5
    assert len(first.train_val) == 25 and len(load_coop("eurosat", root).train_val) == 55


def test_preset_is_clip_loras_recipe():
    method = parse_method(CLIP_LORA)
    assert (method.rank, method.alpha, method.rslora, method.dropout) == (2, 1, True, 0.25)
    assert method.targets == "query key value"
    steps = Steps(500 * 16)
    assert (steps.count, steps.batch, steps.lr, steps.weight_decay) == (8000, 32, 2e-4, 1e-2)
    oracle = torch.optim.AdamW([torch.zeros(1)], lr=2e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(oracle, 20, eta_min=1e-6)
    for step in range(20):
        assert Steps(20).rate(step) == pytest.approx(oracle.param_groups[0]["lr"], rel=1e-9)
        oracle.step()
        schedule.step()


def test_bad_input_is_named(root, tmp_path):
    with pytest.raises(DataError, match="no CoOp layout for 'cats'"):
        load_coop("cats", root, 1)
    with pytest.raises(ClipError, match="needs root="):
        run(Config("tiny", data="coop:eurosat"))
    with pytest.raises(ClipError, match="the loss is nan|the loss is inf"):
        run(config(root, tmp_path, "full", lr=1e30, iterations=5))
    file = tmp_path / "split.json"
    for content, message in (
        ('{"train": []}', "no CoOp split file"),
        ('{"train": [["a", 0, "x"], ["b", 0, "y"]], "val": [], "test": []}', "label 0 is 'x' and 'y'"),
        ('{"train": [["a", 1, "x"]], "val": [], "test": []}', "labels do not count from 0"),
        ('{"train": [["a.png", 0, "x"]], "val": [], "test": []}', "a.png .*no such image file"),
    ):
        file.write_text(content)
        with pytest.raises(DataError, match=message):
            read_split(file)


def test_the_command_prints_what_was_gained_and_chosen(root, tmp_path, capsys):
    arguments = ["few-shot", "--model", "tiny", "--data", "coop:eurosat", "--root", str(root), "--shots", "2"]
    assert cli.main([*arguments, "--method", "gda", "--views", "2", "--base-to-new", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "difference" in shown and "harmonic mean" in shown and "'alpha'" in shown and "mean per class" in shown


def test_the_script_makes_a_table_of_methods_over_seeds(root, tmp_path, capsys, monkeypatch):
    import importlib
    import sys
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    script = importlib.import_module("evaluate_few_shot")
    sys.modules.pop("evaluate_few_shot")
    arguments = ["--methods", "clip_lora", "gda", "--seeds", "1", "2", "--model", "tiny", "--data", "coop:eurosat",
                 "--root", str(root), "--others", "digits?test=20", "--shots", "2", "--iterations", "2",
                 "--out", str(tmp_path)]  # fmt: skip
    assert script.main(arguments) == 0
    head, rule, alone, lora, gda = capsys.readouterr().out.strip().splitlines()
    assert head == "| method | test, % | digits?test=20, % | scalars | s |" and rule.count("|") == 6
    assert alone.startswith("| zero-shot | ") and "± 0.00" in alone and alone.endswith("| 0 | - |")
    results = [json.loads((tmp_path / f"clip_lora-2shots-seed{s}" / "result.json").read_text()) for s in (1, 2)]
    scores = [100 * r["after"]["test"]["top1"] for r in results]
    mean, spread = sum(scores) / 2, abs(scores[0] - scores[1]) / 2**0.5
    assert lora.startswith(f"| clip_lora | {mean:.2f} ± {spread:.2f} | ") and "| gda | " in gda
    assert script.main([*arguments, "--methods", "nonsense"]) == 2
