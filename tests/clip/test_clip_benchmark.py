"""The benchmark of CLIP: its exactness row is a test by itself, and its goals judge the rows rightly."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from torch import nn

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("benchmark_clip")
    monkeypatch.delitem(module.CONTENDERS, "PEFT LoRA")
    return module


def test_600_bf16_steps_leave_the_frozen_weights_bit_identical(script):
    """Both towers, LoRA on every attention (PEFT merges and unmerges there, and its weights drift)."""
    (row,) = script.exactness(True, 1, "cpu")
    assert row["contender"] == "LoRA" and row["steps"] == 600
    assert row["frozen_tensors"] == 4 * 12 + 8 + 6 and row["changed"] == 0, row["first"]


def test_a_frozen_weight_that_is_written_anew_counts_as_changed(script, monkeypatch):
    """As PEFT does it: another Parameter object under the same name."""
    def dress(model):
        model.requires_grad_(False).visual.proj.requires_grad_(True)

        def anew(module, args):
            module.ln_post.weight = nn.Parameter(module.ln_post.weight.detach() * 1.01, requires_grad=False)

        model.visual.register_forward_pre_hook(anew)
        return model

    monkeypatch.setitem(script.CONTENDERS, "LoRA", dress)
    monkeypatch.setattr(script, "STEPS", 2)
    (row,) = script.exactness(True, 1, "cpu")
    assert (row["changed"], row["first"]) == (1, ["visual.ln_post.weight"])


def test_attention_rows_are_paired_at_both_batches_and_bytes_stay(script):
    rows = script.attention(True, 1, "cpu")
    assert [(r["contender"], r["batch"]) for r in rows] == [
        ("frozen", 1), ("LoRA", 1), ("frozen", 16), ("LoRA", 16)]  # fmt: skip
    assert all(r["ratio"] == r["live_ratio"] == 1 for r in rows[::2])
    assert all(r["seconds"] > 0 and r["live_ratio"] <= 1.02 for r in rows)


def rows(ratio, peft, live, changed, seconds):
    pair = [("LoRA", ratio), ("PEFT LoRA", peft)]
    return [{"case": "attention", "contender": name, "batch": size, "ratio": r, "spread": 0.01, "seconds": 1.0,
             "live_ratio": live, "live_mib": 100.0} for size in (1, 16) for name, r in pair] + [
        {"case": "exactness", "contender": "LoRA", "changed": changed, "frozen_tensors": 9, "steps": 600},
        {"case": "classifier", "classes": 2, "templates": 3, "ratio": live, "spread": 0.01, "seconds": 1.0,
         "difference": 0.0},
        {"case": "gda", "features": [9, 9], "seconds": seconds}]  # fmt: skip


def test_goals_are_missed_where_figures_are_beyond_them(script):
    assert [good for _, good in script.goals(rows(1.05, 1.07, 0.99, 0, 4.0))] == [True] * 8
    assert [good for _, good in script.goals(rows(1.2, 1.1, 1.03, 1, 6.0))] == [False] * 8


def test_cases_that_were_measured_before_stay_on_the_page(script, monkeypatch, tmp_path, capsys):
    found = rows(1.2, 1.1, 0.99, 0, 4.0)
    for case in script.CASES:
        monkeypatch.setitem(script.CASES, case, lambda *_, case=case: [r for r in found if r["case"] == case])
    page = tmp_path / "clip.md"
    script.main(["--only", "gda", "--out", str(page)])
    assert "GDA of [9, 9]: 4.00 s" in page.read_text() and "ViT-B-32" not in page.read_text()
    script.main(["--only", "attention", "exactness", "classifier", "--out", str(page)])
    text = page.read_text()
    assert "GDA of [9, 9]: 4.00 s" in text and "| LoRA, batch 16 | 1.000 | 1.200 ± 0.010 | 100 | 0.9900 |" in text
    assert text.count("**missed**") == 3 and text.count("| reached |") == 5
    script.main(["--quick", "--out", str(tmp_path / "none.md")])
    assert not (tmp_path / "none.md").exists() and "no figure counts" in capsys.readouterr().out
