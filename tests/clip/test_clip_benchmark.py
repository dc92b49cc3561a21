"""The benchmark of CLIP: its exactness row is a test by itself, and its goals judge the rows rightly."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch):
    sys.path.insert(0, str(SCRIPTS))
    module = importlib.import_module("benchmark_clip")
    sys.path.remove(str(SCRIPTS))
    monkeypatch.setattr(module, "available", lambda: ["frozen", "LoRA"])
    return module


def test_600_bf16_steps_leave_the_frozen_weights_bit_identical(script):
    """Both towers, LoRA on every attention (PEFT merges and unmerges there, and its weights drift)."""
    (row,) = script.exactness(True, 600, "cpu")
    assert row["contender"] == "LoRA" and row["steps"] == 600
    assert row["frozen_tensors"] == 4 * 12 + 8 + 6 and row["changed"] == 0, row["first"]


def test_attention_rows_are_paired_at_both_batches_and_bytes_stay(script):
    rows = script.attention(True, 1, "cpu")
    assert [(r["contender"], r["batch"]) for r in rows] == [
        ("frozen", 1), ("LoRA", 1), ("frozen", 16), ("LoRA", 16)]  # fmt: skip
    assert all(r["ratio"] == r["live_ratio"] == 1 for r in rows[::2])
    assert all(r["seconds"] > 0 for r in rows)


def test_goals_are_missed_where_figures_are_beyond_them(script):
    def rows(ratio, peft, live, changed, seconds):
        pair = [("LoRA", ratio), ("PEFT LoRA", peft)]
        return [{"case": "attention", "contender": name, "batch": size, "ratio": r, "live_ratio": live}
                for size in (1, 16) for name, r in pair] + [
            {"case": "exactness", "contender": "LoRA", "changed": changed, "frozen_tensors": 9, "steps": 600},
            {"case": "classifier", "ratio": live}, {"case": "gda", "features": [9, 9], "seconds": seconds}]  # fmt: skip

    assert [good for _, good in script.goals(rows(1.05, 1.07, 0.99, 0, 4.0))] == [True] * 8
    assert [good for _, good in script.goals(rows(1.2, 1.1, 1.03, 1, 6.0))] == [False] * 8
