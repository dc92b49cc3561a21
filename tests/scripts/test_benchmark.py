"""The benchmark at the size of a stamp: every part runs and stands on the page, and goals that are missed are told."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
PARTS = ["rows", "largest_batches", "merged_latency", "fleets", "graphs", "curves"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("benchmark")


def tiny(script: Any, batch: int, size: int = 224, depth: int = 2) -> Any:
    from benchmarks.models import Subject, timm_model

    small = {"img_size": size // 7, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 2}
    return Subject("ViT-S/16, 224 px", timm_model("vit_tiny_patch16_224", size // 7, **small), batch, 1.01)


def test_every_part_is_measured_and_stands_on_the_page(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script.measure, "_vit_s", lambda *a, **k: tiny(script, *a, **k))
    monkeypatch.setattr(script, "FLEETS", (1, 3))
    monkeypatch.setattr(script.measure, "CURVES", script.measure.CURVES[:1])
    monkeypatch.setitem(script.SUBJECTS, "vit_s", tiny(script, 2))
    contenders = ["LoRA r8, all Linears", "PEFT LoRA r8, all Linears", "LyCORIS LoRA r8, all Linears"]
    out = tmp_path / "page.md"
    argv = ["benchmark.py", "--subjects", "vit_s", "--precisions", "fp32", "--steps", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*argv, "--budget", "4", "--parts", *PARTS, "--contenders", *contenders])
    assert script.main() == 0
    found, page = json.loads(out.with_suffix(".json").read_text()), out.read_text()
    assert [set(PARTS) <= set(found), [r["contender"] for r in found["rows"]]] == [True, ["frozen", *contenders]]
    assert all(r["live_mib"] and r["gflops"] and r["step_ratio"] and r["step_of_peft"] for r in found["rows"])
    kept = [r["live_ratio"] for r in found["rows"]]
    assert kept[1] < 1.3 < kept[2] and kept[3] > 1.3
    assert [r["adapters"] for r in found["fleets"]] == [1, 3]
    assert {r["axis"] for r in found["curves"]} == {"batch", "resolution", "rank"}
    assert "| ViT-S/16, 224 px, fp32 | LoRA r8, all Linears | bytes / frozen | 1.01 | " in page
    assert (
        "SD 1.5 UNet, 32 x 32 latents, fp32 | LoRA r8, all Linears | bytes / frozen | 1.01 | - | not measured" in page
    )
    assert "](page.png)" in page and out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setattr(sys, "argv", [*argv[:-3], "0", *argv[-2:], "--parts", "rows", "--contenders", *contenders[:1]])
    script.main()
    again = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert [r["step_ratio"] for r in again] == [r["step_ratio"] for r in found["rows"]]  # bytes alone were taken anew


def test_flops_of_a_step_with_grouped_convolutions(script):
    """Forward and both gradients cost the same; torch's counter takes the weight's for that of a dense one."""
    from benchmarks.models import Subject

    for groups in (1, 4, 8):
        conv = nn.Conv2d(8, 8, 3, padding=1, groups=groups)
        x = torch.randn(2, 8, 5, 5, requires_grad=True)
        subject = Subject("conv", lambda batch, x=x, conv=conv: (conv, ((x,), {})), 2, 1.0)
        contender = script.measure.Contender(subject, lambda model: model, "fp32", "cpu")
        assert contender.flops() == 3 * 2 * (2 * 5 * 5 * 8) * (9 * 8 // groups)


def test_a_missed_goal_fails_the_check(script, monkeypatch, capsys):
    monkeypatch.setattr(script.goals, "_figures", lambda: iter([("a", 1.0, 1.0), ("b", 1.1, 1.0)]))
    assert script.goals.check() == 1
    assert capsys.readouterr().out == "ok     a: 1, at most 1\nMISSED b: 1.1, at most 1\n"
    monkeypatch.setattr(script.goals, "_figures", lambda: iter([("a", float("nan"), 1.0)]))
    assert script.goals.check() == 1
    monkeypatch.setattr(script.goals, "_figures", lambda: iter([("a", 0, 0)]))
    assert script.goals.check() == 0


def test_who_cannot_be_built_misses_its_goal(script, monkeypatch):
    def absent(model: nn.Module) -> nn.Module:
        raise ImportError("not installed")

    monkeypatch.setitem(script.goals.CONTENDERS, "LoRA r8, all Linears", absent)
    assert script.goals._live(tiny(script, 1), "LoRA r8, all Linears", "fp32") == float("inf")


def test_every_contender_says_what_it_keeps(script):
    from benchmarks.models import CONTENDERS, KEEPS

    assert list(KEEPS) == [name for name in CONTENDERS if name != "frozen"]
    assert all(goal.key in script.SUBJECTS and goal.contender in CONTENDERS for goal in script.goals.GOALS)
