"""Point clouds from data to run folder and back, on a few small clouds and a tiny model."""

from __future__ import annotations

import csv
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from visionpeft import cli
from visionpeft.data import made_clouds
from visionpeft.errors import AdapterFileError, DataError
from visionpeft.models import point_transformer
from visionpeft.pipelines import point_commands, point_deploy, point_pretraining, points
from visionpeft.pipelines.backbone import ModelError
from visionpeft.pipelines.points import Config, Sweep, run, sweep
from visionpeft.training import make_accelerator, predict_logits

SIZE = 48
CLASSES = ("bed", "lamp", "shelf")
pytestmark = pytest.mark.usefixtures("tiny_point_mae")


@pytest.fixture
def clouds(tmp_path) -> str:
    rng = np.random.default_rng(0)
    arrays: dict = {"classes": np.array(CLASSES)}
    for part, count in (("train", 8), ("test", 4)):
        arrays[f"{part}_points"] = np.stack([made_clouds.make(n, rng, SIZE) for n in CLASSES for _ in range(count)])
        arrays[f"{part}_label"] = np.repeat(np.arange(3), count)
    np.savez(tmp_path / "clouds.npz", **arrays)
    return f"npz:{tmp_path / 'clouds.npz'}"


@pytest.fixture
def weights(clouds, tmp_path) -> str:
    path, _ = point_pretraining.run(pretraining(tmp_path, clouds))
    return str(path)


def pretraining(tmp_path, clouds, **fields) -> point_pretraining.Config:
    source = tmp_path / "unlabelled.npz"
    with np.load(clouds.partition(":")[2]) as file:
        np.savez(source, points=file["train_points"])
    settings = {"points": 32, "epochs": 3, "batch_size": 8, "out": str(tmp_path / "pretraining")}
    return point_pretraining.Config(str(source), **(settings | fields))


def settings(clouds, weights, tmp_path, **fields) -> dict:
    given = {"data": clouds, "checkpoint": weights, "points": 32, "out": str(tmp_path / "runs"), "epochs": 3,
             "batch_size": 8, "warmup_epochs": 0}  # fmt: skip
    return given | fields


def test_a_sweep_gives_a_row_for_every_method(clouds, weights, tmp_path):
    methods = ("raw", "scratch", "linear", "pointgst:rank=4,local=4", "lora:rank=2", "full")
    outcome = sweep(Sweep(method=methods, **settings(clouds, weights, tmp_path)))
    assert not outcome.failures and [r.method for r in outcome.results] == list(methods)
    raw, scratch, linear, gst, lora, full = outcome.results
    assert raw.adapter_parameters is None and linear.adapter_parameters == 0
    assert gst.adapter_parameters == 3 * (16 * 4 * 2 + 4 + 16 + 4 * 4 + 4 + 4 * 4) + 2 * 16
    assert full.adapter_parameters == full.trained_parameters == scratch.trained_parameters
    for result in outcome.results:
        folder = Path(result.folder)
        assert result.test_images == 12 and result.classes == list(CLASSES)
        assert result.accuracy == result.correct.count("1") / 12
        page = (folder / "report.html").read_text()
        assert page.count("<img") == 8 and "<svg" in page
    assert "spectral energy" in (Path(gst.folder) / "report.html").read_text()
    assert "mean class accuracy" in (tmp_path / "runs" / "report.html").read_text()
    again = sweep(Sweep(method=methods, **settings(clouds, weights, tmp_path)))
    assert again.skipped == 6


def test_a_killed_run_goes_on_to_the_same_numbers(clouds, weights, tmp_path):
    given = settings(clouds, weights, tmp_path, out=str(tmp_path / "a"))
    plain = run(Config(method="pointgst:rank=4,local=4", **given))
    config = Config(method="pointgst:rank=4,local=4", checkpoint_seconds=0.0,
                    **settings(clouds, weights, tmp_path, out=str(tmp_path / "b")))  # fmt: skip

    def kill(done, steps, loss):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, kill)
    resumed = run(config)
    assert resumed.notes == ["resumed after 4 updates"] or "resumed after 5 updates" in resumed.notes
    assert resumed.metrics == plain.metrics and resumed.correct == plain.correct


def test_predictions_are_those_of_the_run(clouds, weights, tmp_path):
    result = run(Config(method="pointgst:rank=4,local=4", **settings(clouds, weights, tmp_path)))
    with np.load(clouds.partition(":")[2]) as file:
        tests, labels = file["test_points"], file["test_label"]
    folder = tmp_path / "clouds"
    folder.mkdir()
    for i, cloud in enumerate(tests):
        np.savetxt(folder / f"{i:02}.xyz", 3 * cloud + 7)  # predict centres and scales by itself
    out = tmp_path / "predictions.csv"
    assert cli.main(["points", "predict", result.folder, str(folder), "--out", str(out)]) == 0
    with open(out) as file:
        rows = list(csv.DictReader(file))
    right = "".join("1" if row["label"] == CLASSES[y] else "0" for row, y in zip(rows, labels, strict=True))
    assert right == result.correct
    with pytest.raises(DataError, match="no clouds"):
        point_deploy.cloud_files(tmp_path / "runs" / "nowhere")


def test_other_runs_are_not_for_clouds(tmp_path):
    import timm

    import visionpeft as vp

    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, embed_dim=24, num_heads=2)
    vp.attach(model, "lora", train="head").save(tmp_path / "adapter.safetensors", task="classification")
    with pytest.raises(AdapterFileError, match="classification"):
        point_deploy.restore(tmp_path)


def test_voting_is_apart_and_the_test_epochs_are_not_chosen_among(clouds, weights, tmp_path):
    result = run(Config(method="linear", votes=3, track_test=1, **settings(clouds, weights, tmp_path)))
    assert 0 <= result.metrics["voted_accuracy"] <= 1 and result.accuracy == result.metrics["test_accuracy"]
    assert "best_test_epoch_accuracy" in result.metrics


def test_voted_logits_are_the_mean_over_passes(clouds, weights, tmp_path):
    config = Config(method="linear", votes=2, **settings(clouds, weights, tmp_path))
    cell = points.Cell(config, points.plan_for(config), make_accelerator())
    cell.model.eval()
    feed, passes = cell.train_feed("test"), []
    for vote in range(2):
        (batch, _), = feed.batches([list(range(12))], points.mix(0, vote, 7), 0)
        passes.append(cell.model(batch).detach())
    assert not torch.equal(*passes)
    torch.testing.assert_close(cell.voted(), sum(passes) / 2, atol=1e-6, rtol=1e-5)


def test_pretrained_weights_fill_the_classifier_and_a_killed_run_goes_on(clouds, weights, tmp_path):
    model = point_transformer.create(points.NANO, 3)
    from visionpeft.models import point_checkpoints

    missing, unused = point_checkpoints.load(model, weights)
    assert len(missing) == 18 and unused == []
    config = pretraining(tmp_path, clouds, out=str(tmp_path / "killed"), checkpoint_seconds=0.0)

    def kill(done, steps, loss):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        point_pretraining.run(config, kill)
    path, history = point_pretraining.run(config)
    assert history.resumed_at >= 4 and Path(path).read_bytes() == Path(weights).read_bytes()


def test_what_cannot_be_pretrained_on_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no clouds here"):
        point_pretraining.unlabelled(str(tmp_path / "empty"))
    np.savez(tmp_path / "x.npz", images=np.zeros(3))
    with pytest.raises(DataError, match="points or xyz"):
        point_pretraining.unlabelled(str(tmp_path / "x.npz"))


def test_missing_weights_and_settings_are_named(clouds, tmp_path, capsys):
    config = Config(model="point_mae", method="linear", data=clouds, out=str(tmp_path / "runs"))
    with pytest.raises(ModelError, match="--checkpoint"):
        run(config)
    assert config.backbone.groups == 64
    assert Config(model="point_mae", data="scanobjectnn:obj_bg").backbone.groups == 128
    assert Config(data="scanobjectnn:obj_bg").seen == 2048
    assert cli.main(["points", "--jobs", "1", "--method", "linear", "--augment", "flip", "--data", clouds, "--out",
                     str(tmp_path / "r")]) == 1  # fmt: skip
    assert "flip" in capsys.readouterr().out


@pytest.mark.parametrize(("given", "meant"), [
    (["points"], ["points", "train"]),
    (["points", "--seeds", "1"], ["points", "train", "--seeds", "1"]),
    (["points", "--help"], ["points", "--help"]),
    (["points", "predict", "x"], ["points", "predict", "x"]),
    (["classify"], ["classify"]),
])  # fmt: skip
def test_training_is_what_points_means_by_itself(given, meant):
    assert point_commands.with_default(given) == meant


def test_convert_on_the_command_line(tmp_path, capsys):
    value = {part: [(np.zeros((4, 6)), 0, "x")] for part in ("train", "test")}
    (tmp_path / "0.pkl").write_bytes(pickle.dumps(value))
    assert cli.main(["points", "convert", str(tmp_path / "0.pkl")]) == 0
    assert (tmp_path / "0.npz").exists()
    (tmp_path / "1.pkl").write_bytes(b"nonsense")
    assert cli.main(["points", "convert", str(tmp_path / "1.pkl")]) == 2
    assert "no readable pickle" in capsys.readouterr().err


def test_the_script_of_the_bundled_weights(clouds, tmp_path, monkeypatch, capsys):
    root = Path(__file__).resolve().parents[2]
    monkeypatch.syspath_prepend(str(root / "scripts"))
    import build_point_assets

    config = pretraining(tmp_path, clouds)
    monkeypatch.setattr(build_point_assets, "probe", lambda checkpoint: 0.5 if checkpoint else 0.25)
    monkeypatch.setattr(build_point_assets, "by_hand", lambda: 0.375)
    given = ["--data", config.data, "--epochs", "1", "--batch", "8", "--work", str(tmp_path / "w"), "--assets",
             str(tmp_path)]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["build_point_assets.py", *given])
    assert build_point_assets.main() == 0
    printed = capsys.readouterr().out
    figures = json.loads(printed[printed.index("{"):])
    assert figures["bytes"] == (tmp_path / "nano_point_mae.safetensors").stat().st_size < 6e6
    assert figures["probe_accuracy"] == 0.5
    card = (tmp_path / "nano_point_mae.md").read_text()
    for line in ("| linear probe, % | 50.0 |", "random start, % | 25.0 |", "by hand, % | 37.5 |", "CC BY 2.0",
                 "LDraw.org", "--epochs 1 --batch 8", f"| {figures['bytes']:,} (fp16) |"):  # fmt: skip
        assert line in card


def test_the_bundled_model_is_small_enough_to_ship(monkeypatch):
    monkeypatch.undo()
    model = point_transformer.create(points.NANO, 8)
    assert 2 * sum(p.numel() for p in model.parameters()) < 6e6


def test_features_by_hand_do_not_see_turns_about_the_upright_axis():
    cloud = made_clouds.make("chair", np.random.default_rng(0), 256).astype(np.float64)
    turn = np.array([[0.6, 0, 0.8], [0, 1, 0], [-0.8, 0, 0.6]])
    found = points.features_by_hand(np.stack([cloud, cloud @ turn]))
    assert found.shape == (2, 48) and np.abs(found[0] - found[1]).max() < 1e-2


def test_the_memory_bank_is_of_the_training_clouds_and_predict_has_it(clouds, weights, tmp_path):
    config = Config(method="point_peft:memory=24,tokens=4", **settings(clouds, weights, tmp_path))
    result = run(config)
    deployed = point_deploy.restore(result.folder)
    bank, = (a.bank for a in deployed.tuner.adapters.values() if hasattr(a, "bank"))
    model = points.build(config.backbone, 3).eval()
    train = points.plain_feed(config, "train_val").clouds[:, :32]
    around, centres = model.group_divider(train)
    with torch.no_grad():
        x, positions = model.tokens(around), model.pos_embed(centres)
        features = model.norm(model.blocks(x, positions, centres)).amax(1)
    torch.testing.assert_close(bank, features / features.norm(dim=1, keepdim=True), atol=1e-5, rtol=1e-4)
    logits = predict_logits(deployed.model, points.plain_feed(config, "test"), make_accelerator())
    labels = points.load_splits(config).test.labels
    assert "".join("1" if r else "0" for r in logits.argmax(1).numpy() == labels) == result.correct


def test_without_augmentation_each_cloud_is_decomposed_once(clouds, weights, tmp_path, monkeypatch):
    counted = []
    real = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda x: counted.append(len(x) * (x.shape[-1] == 8)) or real(x))
    method, given = "pointgst:rank=4,local=4", settings(clouds, weights, tmp_path, augment="fixed")
    config = Config(method=method, **given)

    def trained(folder):
        cell = points.Cell(config, points.plan_for(config), make_accelerator())
        counted.clear()
        cell.train("train_val", tmp_path / folder)
        return [p.detach().clone() for p in cell.tuner.parameters()], sum(counted)

    kept, once = trained("a")
    monkeypatch.setattr(points, "keep_spectra", lambda *a: None)
    plain, often = trained("b")
    assert (once, often) == (24, 3 * 24) and all(map(torch.equal, kept, plain))
