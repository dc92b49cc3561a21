"""Few-shot tuning end to end on a tiny random CLIP model and coloured squares in CoOp's layout."""

from __future__ import annotations

import json
import math

import numpy as np
import open_clip
import pytest
import tiny_clip
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_clip import PREPARE, tokenizer

import visionpeft as vp
from visionpeft import cli
from visionpeft.clip import ClipError
from visionpeft.clip.data import base_and_new, harmonic, load_coop, load_images, read_split
from visionpeft.clip.scores import classification_scores
from visionpeft.clip.tuning import Steps, encoder, views
from visionpeft.data.preprocessing import Preprocessing
from visionpeft.errors import DataError
from visionpeft.pipelines import few_shot, fitting
from visionpeft.pipelines.few_shot import CLIP_LORA, Config, load, run
from visionpeft.pipelines.methods import parse_method
from visionpeft.report.clip import thinned

COLOURS = {"red": (220, 30, 30), "lime": (30, 220, 30), "blue": (30, 30, 220), "grey": (120, 120, 120),
           "pink": (240, 150, 180)}  # fmt: skip
METHODS = ("clip_lora", "clipfit", "ln_tuning", "lora:rank=2,tower=image", "block_lora:rank=2", "gda", "tip", "tip_f",
           "clip_adapter", "linear_probe", "coop", "ivlp", "promptsrc")  # fmt: skip


def tiny():
    model = tiny_clip.tiny({"layers": 2})
    with torch.no_grad():
        model.visual.conv1.weight.mul_(4)  # what an image shows, and which words a text has, must count
        model.token_embedding.weight.mul_(4)
        model.visual.class_embedding.zero_()
        model.ln_final.bias.zero_(), model.visual.ln_post.bias.zero_()
    return model


@pytest.fixture(autouse=True)
def _model(monkeypatch):
    monkeypatch.setattr(few_shot, "build", lambda name, checkpoint=None: tiny_clip.clip(tiny(), name))


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
    fitter = few_shot.Fitter(config(root, tmp_path, method), tiny_clip.clip(tiny()), None)
    digits = load_images("digits?test=60")
    alone = classification_scores(fitter.zero_shot().logits(digits.images, digits.classes, False),
                                  torch.from_numpy(digits.images.labels))  # fmt: skip
    assert result.before["digits?test=60"] == alone
    same = result.after["digits?test=60"] == alone
    assert same == (method in ("linear_probe", "tip"))


def test_sets_in_coops_layout_are_evaluated_and_compared_with(root, tmp_path):
    found, splits = load_images("coop:eurosat", str(root)), load_coop("eurosat", root)
    assert (found.name, found.classes) == ("coop:eurosat", splits.classes)
    assert [found.images.path(i) for i in range(40)] == [splits.test.path(i) for i in range(40)]
    assert (found.images.labels == splits.test.labels).all()
    result = run(config(root, tmp_path, "clip_adapter", others=("coop:eurosat",)))
    assert result.before["coop:eurosat"] == result.before["test"]
    with pytest.raises(ClipError, match="'coop:eurosat' needs root="):
        load_images("coop:eurosat")


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


@pytest.mark.parametrize("method, changes, expected, parameters", [
    ("clip_lora", {}, (2000, 32, 2e-4, 1e-2, "adamw", 1e-6, 0), 576),
    ("ln_tuning", {}, (1200, 32, 2e-4, 1e-2, "adamw", 1e-6, 0), 288),
    ("clipfit", {}, (100, 32, 2e-3, 5e-4, "sgd", 0.0, 1), 192 + 16),
    ("coop", {}, (50, 32, 2e-3, 5e-4, "sgd", 0.0, 1), 256),
    ("ivlp", {}, (20 * 5, 4, 2.5e-3, 5e-4, "sgd", 0.0, 5), 64 + 128),
    ("promptsrc", {}, (50 * 5, 4, 2.5e-3, 5e-4, "sgd", 0.0, 5), 64 + 128),
    ("promptsrc", {"base_to_new": True}, (20 * 3, 4, 2.5e-3, 5e-4, "sgd", 0.0, 3), 64 + 128),
])  # fmt: skip
def test_recipes_are_those_of_the_papers(root, tmp_path, method, changes, expected, parameters, monkeypatch):
    """Updates, batch, rate, decay, optimiser, last rate and warm-up, of 4 shots of five classes (three with halves)."""
    seen = []
    monkeypatch.setattr(fitting, "descend", lambda loop, images, objective: seen.append((loop.steps, images)) or [])
    settings = config(root, tmp_path, method, iterations=None, batch_size=None, lr=None, **changes)
    result = run(settings)
    ((steps, images),) = seen
    assert images == (12 if changes else 20) and steps.augment == "resized_crop"
    found = (steps.count, steps.batch, steps.lr, steps.weight_decay, steps.optimizer, steps.min_lr, steps.warmup)
    assert found == expected and result.parameters == parameters


@pytest.mark.parametrize("method", ["clip_lora", "clipfit", "ssf", "adaptformer", "coop", "ivlp", "promptsrc"])
def test_bf16_learns_what_fp32_learns_to_its_precision(root, tmp_path, method):
    found = [run(config(root, tmp_path / p, method, iterations=6, precision=p)).losses for p in ("fp32", "bf16")]
    assert found[0] != found[1] and found[1] == pytest.approx(found[0], rel=0.03)


@pytest.mark.parametrize("method", ["clip_lora", "lora:rank=2,targets=conv linear", "clipfit", "coop", "tip_f"])
def test_what_is_frozen_in_a_resnet_stays_to_the_bit(root, tmp_path, method):
    """Statistics of BatchNorms too, though the model is in train."""
    model = tiny_clip.tiny(dict(layers=(1, 1, 1, 1), width=8, head_width=8, image_size=64))
    clip = tiny_clip.clip(model.requires_grad_(False))._replace(
        preprocessing=Preprocessing((0.5,) * 3, (0.5,) * 3, (64, 64)))  # fmt: skip
    before = {key: value.clone() for key, value in model.state_dict().items()}
    splits = load_coop("eurosat", root, 2)
    fitter = few_shot.Fitter(config(root, tmp_path, method, iterations=2), clip, few_shot.make_accelerator())
    fitted = fitter.fit(splits.train, splits.val, splits.classes)
    if fitted.tuner is not None:
        assert any(p.any() for name, p in fitted.tensors.items() if name.endswith(".b")) or method == "clipfit"
        fitted.tuner.detach()
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], value) for key, value in before.items())


def test_preset_is_clip_loras():
    method = parse_method(CLIP_LORA)
    assert (method.rank, method.alpha, method.rslora, method.dropout) == (2, 1, True, 0.25)
    assert method.targets == "query key value"


def test_the_rate_warms_up_and_falls_by_a_cosine():
    steps = Steps(20, lr=0.3, min_lr=0.1, warmup=2, warmup_lr=1e-3)
    assert [steps.rate(i) for i in (0, 1)] == [1e-3, 1e-3]
    assert [steps.rate(i) for i in range(2, 20)] == pytest.approx(
        [0.1 + 0.1 * (1 + math.cos(math.pi * i / 20)) for i in range(2, 20)], rel=1e-12)  # fmt: skip


def test_views_are_random_passes_over_all_images_drawn_by_the_seed(root):
    clip, images = tiny_clip.clip(tiny().requires_grad_(False)), load_coop("eurosat", root, 4).train
    first, again, other = (views(clip, images, 3, seed) for seed in (1, 1, 2))
    assert first.shape == (3, 20, 12) and torch.equal(first, again) and not torch.equal(first, other)
    torch.testing.assert_close(first.norm(dim=-1), torch.ones(3, 20))
    assert not torch.equal(first[0], first[1])
    torch.manual_seed(1)
    pictures = images.with_transform(PREPARE.transform("resized_crop"))
    with torch.no_grad():
        one = clip.model.encode_image(torch.stack([pictures[i][0] for i in range(20)]), normalize=True)
    torch.testing.assert_close(first[0], one)


@pytest.mark.parametrize("tower, expected", [("image", 1), ("text", 3)])
def test_class_names_are_encoded_once_only_where_nothing_moves_them(root, tmp_path, tower, expected, monkeypatch):
    settings = config(root, tmp_path, f"lora:rank=2,tower={tower}", iterations=3)
    clip, calls = tiny_clip.clip(tiny().requires_grad_(False)), []
    fitter = few_shot.Fitter(settings, clip, few_shot.make_accelerator())
    splits = load_coop("eurosat", root, 4)
    clip.model.ln_final.register_forward_hook(lambda *_: calls.append(1))
    real = vp.attach
    monkeypatch.setattr(vp, "attach", lambda *a, **k: real(*a, probe=False, **k))
    fitter.fit(splits.train, splits.val, splits.classes)
    assert len(calls) == expected


def test_images_are_encoded_once_only_where_every_step_would_give_the_same(root, monkeypatch):
    """No augmentation, and no adapter in the image tower."""
    images = load_coop("eurosat", root, 2).train
    calls, rows = [], torch.tensor([3, 0])
    for tower, augment, expected in (("text", None, 0), ("image", None, 2), ("text", "flip", 2)):
        clip = tiny_clip.clip(tiny().requires_grad_(False))
        vp.attach(clip.model, vp.LoRA(rank=2, targets="query", tower=tower))
        encode = encoder(clip, images, augment, torch.device("cpu"))
        with torch.no_grad():
            expect = clip.model.encode_image(torch.stack([PREPARE.transform()(images[i][0]) for i in (3, 0)]), True)
        calls.clear()
        hook = clip.model.visual.register_forward_hook(lambda *_: calls.append(1))
        found = [encode(rows) for _ in range(2)]
        hook.remove()
        assert len(calls) == expected
        if augment is None:
            torch.testing.assert_close(found[0].detach(), expect, rtol=0, atol=1e-6)


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
    result = json.loads((tmp_path / "result.json").read_text())
    page = (tmp_path / "report.html").read_text()
    for name in ("base", "new"):
        before, after = result["before"][name]["top1"], result["after"][name]["top1"]
        cells = (name, "top-1 %", f"{100 * before:.2f}", f"{100 * after:.2f}", f"{100 * (after - before):+.2f}")
        assert "".join(f"<td>{cell}</td>" for cell in cells) in page
    assert f"harmonic mean of base and new: {100 * result['harmonic']:.2f} %" in page and "top-5" not in page


def test_the_page_shows_the_losses_and_needs_nothing_from_elsewhere(root, tmp_path):
    run(config(root, tmp_path, iterations=3))
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 1 and "update" in page and "http" not in page.replace("http://www.w3.org", "")
    assert thinned([1.0, 3.0, 5.0, 8.0, 9.0], points=3) == ([2, 4, 5], [2.0, 6.5, 9.0])
    assert thinned([4.0, 2.0]) == ([1, 2], [4.0, 2.0])


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


def test_the_script_averages_over_seeds_before_the_harmonic_mean(root, tmp_path, capsys, monkeypatch):
    import importlib
    import sys
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    script = importlib.import_module("evaluate_few_shot")
    sys.modules.pop("evaluate_few_shot")
    assert script.main(["--methods", "clip_adapter", "--seeds", "1", "2", "--model", "tiny", "--data", "coop:eurosat",
                        "--root", str(root), "--shots", "2", "--base-to-new", "--out", str(tmp_path)]) == 0
    head, _, alone, row = capsys.readouterr().out.strip().splitlines()
    assert head == "| method | base, % | new, % | harmonic mean | scalars | s |"
    found = [json.loads((tmp_path / f"clip_adapter-2shots-seed{s}" / "result.json").read_text()) for s in (1, 2)]
    assert all(f["harmonic"] is not None for f in found)
    for line, which in ((alone, "before"), (row, "after")):
        base, new = (50 * sum(f[which][half]["top1"] for f in found) for half in ("base", "new"))
        cells = [cell.strip() for cell in line.split("|")]
        assert cells[2].startswith(f"{base:.2f} ±") and cells[3].startswith(f"{new:.2f} ±")
        assert cells[4] == f"{2 * base * new / (base + new) if base + new else 0:.2f}"
