"""The benchmark of diffusion jobs: one set of weights for all its UNets, pairs of the same size, goals on the page."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

import visionpeft as vp

pytest.importorskip("diffusers")
pytest.importorskip("peft")
SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("benchmark_diffusion")


def test_unets_share_their_weights_and_nothing_else(script):
    shared = script.Shared(quick=True)
    (one, _), (two, _) = shared(), shared()
    pointers = [{name: p.data_ptr() for name, p in model.named_parameters()} for model in (shared.first, one, two)]
    assert pointers[0] == pointers[1] == pointers[2]
    vp.attach(one, vp.LoRA(rank=1), probe=False)
    assert not vp.tuners(two) and all(p.requires_grad for p in two.parameters())


def test_pairs_are_of_the_same_size(script):
    models = [script.Shared(quick=True)()[0] for _ in range(4)]
    dresses = (script.ours(vp.LoRA(rank=4), probe=False), script.theirs(script.peft.LoraConfig, r=4, lora_alpha=4),
               script.ours(vp.KronA(a1=4, a2=4), probe=False), script.lokr(quick=True))  # fmt: skip
    lora, theirs, krona, lokr = (sum(p.numel() for p in dress(m).parameters() if p.requires_grad)
                                 for dress, m in zip(dresses, models, strict=True))  # fmt: skip
    assert lora == theirs > 0 and krona == lokr > 0


def test_a_case_runs_and_missed_goals_are_told(script, capsys):
    assert script.main(["--quick", "--only", "shira"]) == 0
    assert "switching SHiRA" in capsys.readouterr().out
    row = {"what": "x", "mine": "1 ms", "other": "2 ms", "spread": 0.0}
    rows = [row | {"ratio": 0.5, "goal": 0.5}, row | {"ratio": 0.6, "goal": 0.5}, row | {"ratio": 9.0, "goal": None}]
    body = script.markdown({"machine": {}, "rows": rows}).splitlines()[-3:]
    assert ["reached" in line for line in body] == [True, False, False]
    assert ["missed" in line for line in body] == [False, True, False]
