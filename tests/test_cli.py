"""The commands, as a user types them."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from visionpeft import cli
from visionpeft.pipelines.backbone import Backbone, build
from visionpeft.pipelines.deploy import loading_line, restore

timm = pytest.importorskip("timm")
Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Random weights of timm's test_vit, as a file."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "test_vit.safetensors"
    save_file(timm.create_model("test_vit", img_size=32).state_dict(), path)
    return str(path)


def classify(checkpoint: str, out: Path, *more: str) -> int:
    return cli.main(["classify", "--model", "test_vit", "--checkpoint", checkpoint, "--img-size", "32",
                     "--data", "digits?train=60&test=50", "--epochs", "1", "--out", str(out), *more])


@pytest.fixture(scope="module")
def runs(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of four methods."""
    out = tmp_path_factory.mktemp("runs")
    assert classify(checkpoint, out, "--method", "linear", "lora:rank=2,targets=query value", "ssf", "houlsby",
                    "--lr", "0.01") == 0
    return out


def cell(runs: Path, method: str) -> Path:
    (folder,) = (runs / "test_vit" / "digits-train=60-test=50").glob(f"{method}*/seed0")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for index, mode in enumerate(("RGB", "L", "CMYK", "RGBA", "P")):
        Image.new(mode, (40 + index, 30)).save(folder / f"{index}.{'jpg' if mode == 'CMYK' else 'png'}")
    return folder


def test_a_sweep_leaves_a_table_and_a_report(runs: Path) -> None:
    with open(runs / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["linear", "lora:rank=2,targets=query value", "ssf", "houlsby"]
    assert rows[0]["adapter_parameters"] == "0" and int(rows[1]["file_bytes"]) > 0
    assert "linear probe" in (runs / "report.html").read_text()


def test_finished_cells_are_skipped(runs: Path, checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert classify(checkpoint, runs, "--method", "linear", "--lr", "0.01") == 0
    assert "1 cells had been finished before" in capsys.readouterr().out


def test_a_failed_cell_does_not_stop_the_others(checkpoint: str, tmp_path: Path,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    assert classify(checkpoint, tmp_path, "--method", "lora:rank=1000", "linear") == 1
    told = capsys.readouterr().out
    assert "FAILED digits?train=60&test=50 lora:rank=1000 seed 0" in told and "linear seed 0:" in told
    assert "Traceback" in next(tmp_path.rglob("error.txt")).read_text()


def test_predict_needs_only_the_run(runs: Path, images: Path, tmp_path: Path,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "p.csv"
    assert cli.main(["predict", str(cell(runs, "lora")), str(images), "--out", str(out)]) == 0
    with open(out) as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["path"]).name for row in rows] == ["0.png", "1.png", "2.jpg", "3.png", "4.png"]
    assert {row["label"] for row in rows} <= set("0123456789")
    assert "5 images" in capsys.readouterr().out


def test_predict_agrees_with_the_run(runs: Path) -> None:
    """The restored model reaches the accuracy that the run reported."""
    from visionpeft import data

    folder = cell(runs, "ssf")
    deployed = restore(folder)
    test = data.load("digits?train=60&test=50").test.with_transform(deployed.spec.transform())
    with torch.no_grad():
        logits = deployed.model(torch.stack([image for image, _ in test]))
    accuracy = float((logits.argmax(1).numpy() == test.labels).mean())
    assert accuracy == pytest.approx(json.loads((folder / "result.json").read_text())["accuracy"])


@pytest.mark.parametrize("method", ["lora", "ssf", "linear"])
def test_merged_weights_load_without_this_library(runs: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "model.safetensors"
    assert cli.main(["merge", str(cell(runs, method)), "--out", str(out)]) == 0
    deployed = restore(cell(runs, method))
    program = (f"import sys, torch\n{loading_line(deployed, out)}\n"  # what the command prints
               "torch.manual_seed(0)\n"
               "torch.save(model.eval()(torch.randn(2, 3, 32, 32)), sys.argv[1])\n"
               "assert 'visionpeft' not in sys.modules\n")
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "y.pt")], check=True)
    torch.manual_seed(0)
    expected = deployed.model(torch.randn(2, 3, 32, 32))
    assert torch.allclose(torch.load(tmp_path / "y.pt"), expected, atol=1e-4)


@pytest.mark.slow
def test_exported_program_takes_any_batch(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.pt2"
    run = str(cell(runs, "lora"))
    assert cli.main(["merge", run, "--out", str(tmp_path / "m.safetensors"), "--export", str(out)]) == 0
    program, inputs = torch.export.load(out).module(), torch.randn(5, 3, 32, 32)
    assert torch.allclose(program(inputs), restore(run).model(inputs), atol=1e-4)


def test_inspect_needs_no_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "vit_large_patch16_224"]) == 0
    assert "blocks.23.attn.qkv" in capsys.readouterr().out


def test_data_check_lists_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert cli.main(["data", "check", str(tmp_path), "--kind", "folder"]) == 1
    assert "no image" in capsys.readouterr().out


def wrong(runs: Path, tmp_path: Path) -> dict[str, list[str]]:
    (tmp_path / "none").mkdir(exist_ok=True)
    (tmp_path / "foreign.safetensors").write_bytes(b"not a file of ours")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG but no more")
    lora = str(cell(runs, "lora"))
    return {
        "unknown data": ["classify", "--data", "imagenot", "--method", "linear"],
        "lorra": ["classify", "--method", "lorra", "--out", str(tmp_path / "o")],
        "no images": ["predict", lora, str(tmp_path / "none")],
        "no adapter file": ["predict", str(tmp_path / "none"), str(tmp_path)],
        "foreign": ["predict", str(tmp_path / "foreign.safetensors"), str(tmp_path)],
        "broken.png": ["predict", lora, str(tmp_path / "broken.png")],
        "merge": ["merge", str(cell(runs, "houlsby")), "--out", str(tmp_path / "m.safetensors")],
    }


@pytest.mark.parametrize("what", ["unknown data", "lorra", "no images", "no adapter file", "foreign",
                                  "broken.png", "merge"])
def test_errors_are_one_line(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    assert cli.main(wrong(runs, tmp_path)[what]) == 2
    told = capsys.readouterr()
    assert len(told.err.splitlines()) == 1 and told.err.startswith("visionpeft: ")
    assert what in told.err and "Traceback" not in told.err + told.out


def test_the_raw_row_has_no_model(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert classify(checkpoint, tmp_path, "--method", "raw") == 0
    folder = next(tmp_path.rglob("result.json")).parent
    assert cli.main(["predict", str(folder), str(tmp_path)]) == 2
    assert "raw row has no model" in capsys.readouterr().err


def test_a_model_is_built_the_same_from_the_file(runs: Path) -> None:
    deployed = restore(cell(runs, "linear"))
    assert deployed.backbone == Backbone("test_vit", deployed.backbone.checkpoint, 32)
    assert type(build(deployed.backbone, 10)).__name__ == type(deployed.model).__name__
