"""The script of the table of point methods, on a tiny model and three methods."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from visionpeft.data import made_clouds
from visionpeft.models import point_mae
from visionpeft.pipelines import points
from visionpeft.pipelines.point_pretraining import write_encoder


@pytest.fixture
def script(monkeypatch, tiny_point_mae):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "scripts"))
    import point_table

    return point_table


def test_the_table_is_made_in_one_command(script, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    clouds = np.stack([made_clouds.make(name, rng, 48) for name in ("bed", "lamp") for _ in range(12)])
    np.savez(tmp_path / "a.npz", xyz=clouds, label=np.repeat([0, 1], 12), is_train=np.arange(24) % 3 > 0)
    torch.manual_seed(0)
    write_encoder(point_mae.create(points.NANO), tmp_path / "w.safetensors")
    page = tmp_path / "points.md"
    page.write_text("# Points\n\n## Results\n\nold\n\n## More\n\nkept\n")
    monkeypatch.setattr(script, "METHODS", ("raw", "scratch", "linear", "full", "pointgst:rank=4,local=4"))
    monkeypatch.setattr(script, "verdict", lambda found, a, b: f"- {a} {b}")
    given = ["--data", str(tmp_path / "a.npz"), "--into", str(page), "--out", str(tmp_path / "runs"), "--epochs", "2",
             "--jobs", "1", "--checkpoint", str(tmp_path / "w.safetensors")]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["scripts/point_table.py", *given])
    assert script.main() == 0
    text = page.read_text()
    assert "old" not in text and text.startswith("# Points\n\n## Results\n\n430") and text.endswith("## More\n\nkept\n")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    assert [row[0].strip("| ") for row in rows] == list(script.METHODS)
    assert rows[0][2] == "-" and all(row[5].strip(" |") in ("0.001", "0.004") for row in rows[1:])
    seeds = {folder.name for folder in (tmp_path / "runs").rglob("seed*")}
    assert seeds == {"seed0", "seed1", "seed2"}
    script.put(tmp_path / "points.md", "new")
    assert "430" not in page.read_text() and "kept" in page.read_text()


def test_two_deviations_of_the_difference_decide(script):
    def rows(method, *scores):
        return [SimpleNamespace(method=method, accuracy=s) for s in scores]

    found = rows("a", 0.80, 0.82, 0.84) + rows("b", 0.70, 0.72, 0.74) + rows("c", 0.76, 0.78, 0.80)
    assert script.verdict(found, "a", "b") == (
        "- a is better than b by more than two deviations (+10.00 points, deviation 2.83 over 3 seeds)")
    assert "a is not better than c" in script.verdict(found, "a", "c")
