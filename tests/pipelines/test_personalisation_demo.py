"""The demo of `visionpeft personalise`: what it writes, and that its judges can judge."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")
pytest.importorskip("timm")

from visionpeft.models import nano_diffusion  # noqa: E402
from visionpeft.pipelines import personalisation_demo as demo  # noqa: E402


@pytest.mark.slow
def test_demo(tmp_path: Path, monkeypatch: Any) -> None:
    """On a pipeline of random weights: all the way through, with three updates and few images."""
    torch.manual_seed(0)
    pipe = nano_diffusion.create(pretrained=False)
    monkeypatch.setattr(demo, "load_pipeline", lambda base: pipe)
    for name, number in (("SUBJECT_IMAGES", 6), ("PLACE_IMAGES", 1), ("CLASS_IMAGES", 1), ("SIDE_BY_SIDE", 8)):
        monkeypatch.setattr(demo, name, number)
    config = replace(demo.DEMO, steps=3, prior=2, inference_steps=2, out=str(tmp_path), cache=str(tmp_path / "cache"))
    told: list[str] = []
    head, rows, folder = demo.demo(told.append, lambda text: None, config)
    assert [row[0] for row in rows] == ["before", "krona", "lora", "difffit"]
    assert {len(row) for row in rows} == {len(head)}
    found = json.loads((folder / "result.json").read_text())
    assert found["figures"].keys() == {"before", "krona", "lora", "difffit"}
    assert min(found["judges"]) > 0.9, "the judges do not know what they judge"
    assert (folder / "sheet.png").stat().st_size > 1000 and "<img" in (folder / "report.html").read_text()
    for name in ("krona", "lora", "difffit"):
        assert (folder / name / "adapter.safetensors").exists() and (folder / name / "report.html").exists()


def test_a_folder_and_a_seed_are_the_demo_still(monkeypatch: Any) -> None:
    from visionpeft.diffusion import commands
    from visionpeft.pipelines import personalisation

    asked = []
    monkeypatch.setattr(demo, "demo", lambda watch, status, config: asked.append(config) or (["a"], [], Path()))
    monkeypatch.setattr(personalisation, "run", lambda *given: asked.append("run") or sys.exit())
    commands._personalise(commands.Config(out="here", seed=3))
    assert asked == [replace(demo.DEMO, out="here", seed=3)]
    with pytest.raises(SystemExit):
        commands._personalise(commands.Config(out="here", steps=7))
    assert asked[1:] == ["run"]


def test_every_image_has_a_seed_of_its_own(monkeypatch: Any) -> None:
    """Those of the subject, and those of the ten classes of which a judge that says 3 to all knows one in ten."""
    asked: list[Any] = []

    def draw(prompts: list[str], seeds: range, steps: int, guidance: float) -> list[str]:
        asked.append((len(prompts), list(seeds), steps, guidance))
        return prompts

    monkeypatch.setattr(demo, "CLASS_IMAGES", 5)
    family: Any = SimpleNamespace(draw=draw)
    assert demo.draw_subject(family, demo.DEMO, "<x> toy") == ["a photo of a <x> toy"] * 40
    assert asked == [(40, list(range(10_000, 10_040)), 15, 3.0)]
    seen: list[str] = []

    def classes(images: Any) -> np.ndarray:
        seen.extend(images)
        return np.where(np.arange(len(images)) < 18, 3, 0)  # right for three of the five cats

    assert demo.others(family, demo.DEMO, classes) == 3 / 50
    assert seen[:6] == ["a photo of an airplane"] * 5 + ["a photo of an automobile"]
    assert len(seen) == 50 and seen[-1] == "a photo of a truck"
    assert asked[1:] == [(40, list(range(30_000, 30_040)), 15, 3.0), (10, list(range(30_040, 30_050)), 15, 3.0)]
