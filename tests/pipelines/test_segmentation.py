"""Segmentation end to end: what a cell writes, what it measures, other domains, resumption, prediction."""

from __future__ import annotations

import csv
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import visionpeft as vp
from visionpeft import cli
from visionpeft.data.segmentation import load_segmentation
from visionpeft.errors import DataError
from visionpeft.pipelines import running
from visionpeft.pipelines.deploy import loading_line, merged_model, restore
from visionpeft.pipelines.segmentation import (
    JOB,
    Cell,
    Config,
    Settings,
    Sweep,
    _domains,
    load_splits,
    plan_for,
    run,
    sweep,
)
from visionpeft.report.segmentation import overlay, palette
from visionpeft.training import make_accelerator

DATA = "bundled?train=20&test=10"


@pytest.fixture
def config(checkpoint: str, tmp_path: Path) -> Config:
    """A cell on the drawn shapes with a tiny ViT of random weights."""
    return Config(model="test_vit", checkpoint=checkpoint, img_size=32, data=DATA, out=str(tmp_path / "runs"),
                  method="lora:rank=2", epochs=2, batch_size=8, workers=0)


@pytest.fixture
def make(config: Config) -> Any:
    return lambda **changes: replace(config, **changes)


def test_a_run_folder_is_complete(config: Config, make: Any) -> None:
    result = run(make(shift=("bundled-shift?test=5",)))
    assert {p.name for p in config.folder.iterdir()} == {
        "config.json", "adapter.safetensors", "metrics.jsonl", "result.json", "report.html"}
    assert result.measure == "mIoU" and 0 <= result.accuracy <= 1 and result.test_images == 10
    assert set(result.metrics) == {"test_mIoU", "test_pixels", "bundled-shift_mIoU", "train_loss", "train_accuracy"}
    assert sum(map(sum, result.confusion or [])) == 10 * 64 * 64
    assert result.seconds_waiting is not None and 0 <= result.seconds_waiting <= result.seconds_per_step
    page = (config.folder / "report.html").read_text()
    assert page.count("<img") == 5 + 3 * 8 and "stripes: " in page and "<svg" in page


def test_the_score_is_that_of_the_confusion(config: Config) -> None:
    result = run(config)
    counts = np.array(result.confusion, float)
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    assert result.accuracy == pytest.approx((counts.diagonal()[union > 0] / union[union > 0]).mean())
    assert result.metrics["test_pixels"] == pytest.approx(counts.trace() / counts.sum())
    assert result.per_class == pytest.approx({name: counts[i, i] / union[i] for i, name in enumerate(result.classes)
                                              if union[i]})


def test_adapters_are_counted_without_the_decoder(make: Any) -> None:
    result = run(make(method="lora:rank=2,targets=query value"))
    assert result.adapter_parameters == 6 * 2 * 2 * (64 + 64)
    assert result.trained_parameters == result.adapter_parameters + 64 * 5 + 5


@pytest.mark.parametrize("method", ["raw", "scratch", "linear", "ssf", "full", "adaptformer:hidden=4",
                                    "mosa:hidden=4", "spt:budget=5000,method=lora"])
def test_every_row_runs(make: Any, method: str) -> None:
    result = run(make(method=method, epochs=1))
    assert 0 <= result.accuracy <= 1 and (result.adapter_parameters is None) == (method == "raw")


@pytest.mark.parametrize("changes", [
    {"decoder": "fpn", "channels": 64}, {"decoder": "upernet", "channels": 64}, {"decoder": "dpt", "channels": 64},
    {"windows": 0}, {"class_weights": True, "dice": 0.0}, {"augment": "none"}, {"augment": "colour"},
    {"model": "test_convnext", "checkpoint": None, "method": "scratch", "decoder": "fpn", "channels": 64}])
def test_every_setting_runs(make: Any, changes: dict[str, Any]) -> None:
    assert 0 <= run(make(**({"epochs": 1, "data": "bundled?train=8&test=3"} | changes))).accuracy <= 1


def test_colours_say_nothing() -> None:
    """On the drawn set the best table of colours is no better than calling everything ground."""
    result = running.Result("bundled", "", "raw", 0)
    running.job_of("segmentation").raw(Config(method="raw"), result)
    ground = sum(result.confusion[0]) / sum(map(sum, result.confusion))  # type: ignore[index, arg-type]
    assert result.metrics["test_pixels"] <= ground + 0.01 and result.accuracy < 0.15
    assert all(value < 0.03 for name, value in result.per_class.items() if name != "ground")


def test_a_table_of_colours_suffices_where_colours_tell(tmp_path: Path) -> None:
    for i in range(10):
        mask = np.random.default_rng(i).integers(0, 2, (8, 8), dtype=np.uint8)
        for folder, pixels in (("images", np.where(mask[..., None], (200, 0, 0), (0, 90, 0))), ("masks", mask)):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / folder / f"{i}.png")
    assert run(Config(method="raw", data=f"folder:{tmp_path}", out=str(tmp_path / "runs"))).accuracy == 1


def test_the_same_seed_gives_the_same_bits(config: Config, make: Any) -> None:
    first, second = run(make(out=config.out + "/a")), run(make(out=config.out + "/b"))
    assert first.metrics == second.metrics
    a, b = (load_file(Path(r.folder) / "adapter.safetensors") for r in (first, second))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert run(make(seed=1)).metrics != first.metrics


def test_a_stopped_run_goes_on_to_the_same_bits(config: Config, make: Any) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, steps: int, loss: float) -> None:
        if done == 4:
            raise Stop

    whole = run(make(out=config.out + "/whole", method="ssf"))
    killed = make(out=config.out + "/killed", method="ssf", checkpoint_seconds=0)
    with pytest.raises(Stop):
        run(killed, stop)
    resumed = run(killed)
    assert resumed.notes == ["resumed after 4 updates"] and resumed.metrics == whole.metrics
    a, b = (load_file(Path(r.folder) / "adapter.safetensors") for r in (whole, resumed))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_batch_in_pieces_gives_the_same_update(make: Any) -> None:
    whole, pieces = (run(make(out=make().out + f"/{n}", accumulation=n, method="linear")) for n in (1, 4))
    assert pieces.metrics["train_loss"] == pytest.approx(whole.metrics["train_loss"], rel=1e-5)


def test_grids_select_on_val(make: Any) -> None:
    result = run(make(method="linear", grid=("lr=1e-9,1e-1",), epochs=4))
    scores = {row["lr"]: row["val_mIoU"] for row in result.selection}
    assert scores.keys() == {1e-9, 1e-1} and len(set(scores.values())) == 2
    assert result.recipe["lr"] == max(scores, key=scores.__getitem__)


def test_best_test_epoch_is_apart(make: Any) -> None:
    result = run(make(track_test=1, epochs=2, ema=0.99, method="linear", lr=0.1))
    rows = [json.loads(line) for line in (Path(result.folder) / "metrics.jsonl").read_text().splitlines()]
    assert result.metrics["best_test_epoch_mIoU"] == max(row["test_mIoU"] for row in rows)
    assert result.accuracy == rows[-1]["test_mIoU"]


def test_other_classes_are_no_other_domain(make: Any, tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
        for i in range(10):
            Image.new("L", (40, 40), i % 2).save(tmp_path / folder / f"{i}.png")
    with pytest.raises(DataError, match="its classes are class 0, class 1, but the model learns ground"):
        run(make(shift=(f"folder:{tmp_path}",), epochs=1), lambda *given: pytest.fail("it trained before"))


@pytest.mark.parametrize("changes, told", [({"windows": -8}, "windows of -8"), ({"overlap": 1.0}, "overlap=1.0")])
def test_windows_that_make_no_sense_are_told_before_training(make: Any, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=told):
        run(make(**changes), lambda *given: pytest.fail("it trained before"))


def test_other_domains_keep_their_names_apart() -> None:
    specs = ("folder:a/night?test=3", "bundled-shift", "folder:b/night/", "folder:c/test", "voc:test_rain")
    assert _domains(specs) == ["folder:a/night?test=3", "bundled-shift", "folder:b/night/", "folder:c/test",
                               "voc:test_rain"]
    assert _domains(("folder:a/night?test=3", "folder:c/fog")) == ["night", "fog"]


def test_a_domain_may_be_called_like_a_score() -> None:
    scores = {"test_mIoU": 0.5, "best_test_epoch_mIoU": 0.6, "test_rain_mIoU": 0.25}
    _, rows = JOB.summary([running.Result("d", "m", "lora", 0, metrics=scores)])
    assert rows == [["method", "mIoU %", "on test_rain %"], ["lora", "50.00", "25.00"]]


# ---- sweeps ----------------------------------------------------------------------------------------------------------


def plan(config: Config, **changes: Any) -> Sweep:
    return Sweep(**({f.name: getattr(config, f.name) for f in fields(Settings)} | changes))


def test_a_sweep_leaves_table_report_and_domain_shift(config: Config) -> None:
    outcome = sweep(plan(config, method=("raw", "linear", "lora:rank=1000"), shift=("bundled-shift?test=5",), epochs=1))
    assert len(outcome.results) == 2 and "rank 1000" in next(iter(outcome.failures.values()))
    with open(outcome.folder / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["measure"]) for row in rows] == [("raw", "mIoU"), ("linear", "mIoU")]
    assert "| mIoU |" in (outcome.folder / "results.md").read_text()
    page = (outcome.folder / "report.html").read_text()
    assert "Trained on one set, tested on others" in page and "on bundled-shift %" in page and "test mIoU, %" in page


@pytest.mark.slow
def test_side_by_side_gives_what_one_after_the_other_gives(config: Config, tmp_path: Path) -> None:
    alone, beside = (sweep(plan(config, method=("linear", "ssf"), out=str(tmp_path / str(jobs)), jobs=jobs))
                     for jobs in (1, 2))
    assert [r.metrics for r in beside.results] == [r.metrics for r in alone.results] and not beside.failures


def test_the_command_line(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["segment", "--model", "test_vit", "--checkpoint", checkpoint, "--img-size", "32", "--data", DATA,
                     "--method", "linear", "--epochs", "1", "--workers", "0", "--out", str(tmp_path)]) == 0
    assert "mIoU" in capsys.readouterr().out and (tmp_path / "report.html").exists()
    assert cli.main(["segment", "--data", "coco:x", "--method", "linear", "--jobs", "1", "--out", str(tmp_path)]) == 1


# ---- afterwards ------------------------------------------------------------------------------------------------------


def test_the_adapter_file_gives_the_same_model(config: Config) -> None:
    result = run(config)
    cell = Cell(config, plan_for(config), make_accelerator())
    cell.tuner.detach()
    vp.load(cell.model, config.folder / "adapter.safetensors")
    assert cell.score("test")["mIoU"] == result.accuracy


@pytest.mark.parametrize("windows", [0, 24])
def test_predict_writes_masks_and_overlays(make: Any, tmp_path: Path, windows: int | None) -> None:
    config = make(windows=windows, method="linear")
    run(config)
    test = load_splits(config).test
    for index, name in enumerate(("a.png", "deeper/b.png")):
        (tmp_path / "photos" / "deeper").mkdir(parents=True, exist_ok=True)
        test[index][0].save(tmp_path / "photos" / name)
    Image.new("L", (50, 33)).save(tmp_path / "photos" / "odd.jpg")
    out = tmp_path / "out"
    assert cli.main(["predict", str(config.folder), str(tmp_path / "photos"), "--out", str(out)]) == 0
    assert Image.open(out / "masks" / "odd.png").size == (50, 33)
    assert (out / "classes.txt").read_text().split() == load_segmentation("bundled").classes
    Image.new("L", (50, 33)).save(tmp_path / "photos" / "odd.png")
    assert cli.main(["predict", str(config.folder), str(tmp_path / "photos"), "--out", str(out)]) == 2
    cell = Cell(config, plan_for(config), make_accelerator())
    vp.load(cell.model, config.folder / "adapter.safetensors", name="trained")
    kept = cell._score(cell.splits, "test", keep=(0, 1))[1]
    for index, name in enumerate(("a.png", "deeper/b.png")):
        written = Image.open(out / "masks" / name)
        found = np.asarray(written)
        assert np.array_equal(np.asarray(written.convert("RGB")), palette()[found])
        assert np.array_equal(found, kept[index].numpy())
        shown = overlay(test[index][0], found)
        assert np.array_equal(np.asarray(Image.open(out / "overlays" / name)), np.asarray(shown))


def test_merged_weights_load(config: Config, tmp_path: Path) -> None:
    run(config)
    out = tmp_path / "merged.safetensors"
    assert cli.main(["merge", str(config.folder), "--out", str(out)]) == 0
    deployed, image = restore(config.folder), torch.randn(1, 3, 40, 50)
    with torch.no_grad():
        expected = deployed.model(image)
        assert torch.allclose(merged_model(deployed)(image), expected, atol=1e-4)
    told: dict[str, Any] = {}
    exec(loading_line(deployed, out), told)
    with torch.no_grad():
        assert torch.allclose(told["model"].eval()(image), expected, atol=1e-4)


def test_what_was_trained_is_kept_where_scoring_fails(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cell, "finish", lambda self, result: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(config)
    assert (config.folder / "adapter.safetensors").exists() and not (config.folder / "result.json").exists()


def test_colours_of_classes_are_those_of_voc() -> None:
    assert palette()[[0, 1, 2, 3, 15, 255]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [192, 128, 128], [224, 224, 192]]


def test_overlays_leave_ignored_pixels() -> None:
    image = Image.new("RGB", (2, 1), (100, 50, 200))
    shown = np.asarray(overlay(image, np.array([[1, 255]], np.uint8)))
    assert shown[0, 1].tolist() == [100, 50, 200]
    assert shown[0, 0].tolist() == [round(0.45 * 100 + 0.55 * 128), round(0.45 * 50), round(0.45 * 200)]
