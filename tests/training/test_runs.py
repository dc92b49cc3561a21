"""Run folders and what they refuse."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from visionpeft.errors import VisionPEFTError
from visionpeft.training import checkpoint, make_accelerator, runs


def test_a_folder_belongs_to_one_run(tmp_path: Path) -> None:
    runs.claim(tmp_path / "a", {"lr": 0.1, "grid": ("x",)})
    runs.claim(tmp_path / "a", {"lr": 0.1, "grid": ("x",)})
    with pytest.raises(runs.RunError, match="lr is 0.1 there and 0.2 here"):
        runs.claim(tmp_path / "a", {"lr": 0.2, "grid": ("x",)})


def test_names_become_folders() -> None:
    assert runs.slug("lora:rank=8,targets=query value") == "lora-rank=8-targets=query-value"
    assert runs.slug("../..") == "..-.."


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.write(path, {"a": torch.ones(3)})

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(runs.RunError, match="No space left"):
        checkpoint.write(path, {"a": torch.zeros(3)})
    assert torch.equal(checkpoint.read(path)["a"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(runs.RunError, match="cannot be written"):
        runs.write_json(tmp_path / "file" / "x.json", {})


@pytest.mark.parametrize("settings, what", [
    ({"precision": "fp8"}, "unknown precision"), ({"trackers": ("nothing",)}, "not installed")])
def test_devices_refuse_by_name(settings: dict[str, object], what: str) -> None:
    with pytest.raises(VisionPEFTError, match=what):
        make_accelerator(**settings)  # type: ignore[arg-type]
