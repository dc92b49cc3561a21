"""The table of finished runs: which row and column a number lands in, and what is left out."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

SCRIPT = runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "results_table.py"))


def put(folder: Path, config: dict[str, Any], **result: Any) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "result.json").write_text(json.dumps(result))


def run(out: Path, method: str, seed: int, accuracy: float, data: str = "digits", **more: Any) -> None:
    sizes = {"adapter_parameters": 1000, "trained_parameters": 1234567, "file_bytes": 5000}
    put(out / data / method / f"seed{seed}", {"model": "nano", "method": method, "seed": seed}, data=data,
        accuracy=accuracy, **{"measure": "accuracy", **sizes, **more})


def test_methods_by_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    none = {"adapter_parameters": None, "trained_parameters": None, "file_bytes": None}
    for seed, accuracy in enumerate((0.5, 0.6, 0.7)):
        run(tmp_path / "a", "lora:rank=2", seed, accuracy)
    run(tmp_path / "a", "full", 0, 0.25)
    run(tmp_path / "a", "bitfit", 1, 0.3)
    run(tmp_path / "a", "linear", 2, 0.4)
    run(tmp_path / "a", "raw", 0, 1 / 3, **none)
    run(tmp_path / "b", "ssf", 0, 0.9, data="masks", measure="mIoU")
    put(tmp_path / "a" / "digits" / "ssf" / "seed0" / "grid" / "lr=1", {}, lr=1, val_accuracy=0.1)
    SCRIPT["main"]([str(tmp_path / "a"), str(tmp_path / "b")])
    assert capsys.readouterr().out == """\
digits, nano, accuracy %

| method | seed 0 | seed 1 | seed 2 | mean | deviation | adapter parameters | with head | file bytes |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| raw | 33.33 | - | - | 33.33 | - | - | - | - |
| linear | - | - | 40.00 | 40.00 | - | 1,000 | 1,234,567 | 5,000 |
| bitfit | - | 30.00 | - | 30.00 | - | 1,000 | 1,234,567 | 5,000 |
| lora:rank=2 | 50.00 | 60.00 | 70.00 | 60.00 | 10.00 | 1,000 | 1,234,567 | 5,000 |
| full | 25.00 | - | - | 25.00 | - | 1,000 | 1,234,567 | 5,000 |

masks, nano, mIoU %

| method | seed 0 | mean | deviation | adapter parameters | with head | file bytes |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
| ssf | 90.00 | 90.00 | - | 1,000 | 1,234,567 | 5,000 |

"""


def test_jobs_of_clip_have_a_table_for_each_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "one", {"model": "nano_clip", "method": "coop", "seed": 1, "data": "pets"}, data="pets",
        after={"base": {"accuracy": 0.8}, "new": {"accuracy": 0.6}}, parameters=42)
    SCRIPT["main"]([str(tmp_path)])
    shown = capsys.readouterr().out
    assert "pets, nano_clip, base accuracy %" in shown and "| coop | 80.00 | 80.00 | - | 42 | 42 | - |" in shown
    assert "pets, nano_clip, new accuracy %" in shown and "| coop | 60.00 | 60.00 | - | 42 | 42 | - |" in shown


def test_a_folder_without_runs_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=rf"{tmp_path}: no finished run"):
        SCRIPT["main"]([str(tmp_path)])


def test_two_runs_of_one_seed_are_not_mixed(tmp_path: Path) -> None:
    for out in ("a", "b"):
        run(tmp_path / out, "ssf", 0, 0.5)
    with pytest.raises(SystemExit, match="ssf: two runs of the same seed"):
        SCRIPT["main"]([str(tmp_path)])
