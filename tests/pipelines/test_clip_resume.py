"""A killed few-shot or contrastive run goes on to the same losses, scores and tensors, to the bit."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_clip
import torch
from PIL import Image
from safetensors.torch import load_file

from visionpeft.pipelines import contrastive, few_shot
from visionpeft.training.checkpoint import CheckpointError
from visionpeft.training.runs import RunError

ROOT = Path(__file__).parents[2]


def build(name, checkpoint=None):
    return tiny_clip.clip(tiny_clip.tiny({"layers": 2}, {"layers": 2}, shake=0), name)


@pytest.fixture(autouse=True)
def _model(monkeypatch):
    monkeypatch.setattr(few_shot, "build", build)
    monkeypatch.setattr(contrastive, "build", build)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    for i in range(30):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture number {i}")
    return folder


class Killed(BaseException):
    pass


def few(out, method="clip_lora", **other):
    settings = dict(data="digits?train=200&test=40", shots=2, iterations=13, batch_size=8, checkpoint_seconds=0.0)
    return few_shot.Config("tiny", method=method, out=str(out), **{**settings, **other})


def contrast(pairs, out, **other):
    settings = dict(batch_size=10, piece=4, epochs=5, held_out=1 / 3, warmup=2, checkpoint_seconds=0.0)
    return contrastive.Config(captions=str(pairs), out=str(out), method="lora:rank=2,dropout=0.2,targets=query value",
                              train="logit_scale", **{**settings, **other})  # fmt: skip


def kill_at(step):
    def watch(done, total, loss):
        if done == step:
            raise Killed

    return watch


def assert_resumes(run, whole, killed, step):
    first = run(whole)
    with pytest.raises(Killed):
        run(killed, kill_at(step))
    state = torch.load(Path(killed.out) / "checkpoint.pt", weights_only=True)
    assert len(state["losses"]) == step and not (Path(killed.out) / "result.json").exists()
    seen = []
    again = run(killed, lambda done, total, loss: seen.append(done))
    assert seen == list(range(step + 1, len(first.losses) + 1))
    for key in ("losses", "before", "after", "parameters"):
        left, right = getattr(first, key), getattr(again, key)
        assert json.dumps(left) == json.dumps(right), key  # NaN is NaN there
    tensors = [load_file(next(Path(c.out).glob("*.safetensors"))) for c in (whole, killed)]
    assert list(tensors[0]) == list(tensors[1])
    assert all(torch.equal(tensors[1][k], v) for k, v in tensors[0].items())
    assert not (Path(killed.out) / "checkpoint.pt").exists()


@pytest.mark.parametrize("method, step", [("clip_lora", 1), ("clip_lora", 9), ("clipfit", 6), ("full", 5), ("coop", 4),
                                          ("ivlp", 7), ("promptsrc", 5), ("promptsrc", 12)])  # fmt: skip
def test_few_shot(tmp_path, method, step):
    """Batches of 8 of 20 images: epochs end in the middle of the count, where the average of PromptSRC takes note."""
    assert_resumes(few_shot.run, few(tmp_path / "whole", method), few(tmp_path / "killed", method), step)


@pytest.mark.parametrize("step", [1, 6])
def test_contrastive(tmp_path, pairs, step):
    assert_resumes(contrastive.run, contrast(pairs, tmp_path / "whole"), contrast(pairs, tmp_path / "killed"), step)


def test_a_finished_run_gives_its_result_and_does_nothing(tmp_path, pairs):
    for run, config in ((few_shot.run, few(tmp_path / "a")), (contrastive.run, contrast(pairs, tmp_path / "b"))):
        first = run(config)
        again = run(config, kill_at(1))  # would raise in the first update
        assert json.dumps(dataclasses.asdict(first)) == json.dumps(dataclasses.asdict(again))


def test_a_folder_or_checkpoint_of_another_run_is_refused_by_name(tmp_path, pairs):
    with pytest.raises(Killed):
        few_shot.run(few(tmp_path / "a"), kill_at(2))
    with pytest.raises(RunError, match="lr is None there and 0.5 here"):
        few_shot.run(few(tmp_path / "a", lr=0.5))
    with pytest.raises(Killed):
        contrastive.run(contrast(pairs, tmp_path / "b"), kill_at(2))
    with pytest.raises(RunError, match="epochs is 5 there and 6 here"):
        contrastive.run(contrast(pairs, tmp_path / "b", epochs=6))
    (tmp_path / "a" / "checkpoint.pt").rename(tmp_path / "c.pt")
    (tmp_path / "d").mkdir()
    (tmp_path / "c.pt").rename(tmp_path / "d" / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"checkpoint.pt is of another run \(seed differs\)"):
        few_shot.run(few(tmp_path / "d", seed=2))


@pytest.mark.slow
def test_sigkill(tmp_path):
    """From the command line, with the bundled model; the process is killed by the system at some update."""
    def command(out):
        return [sys.executable, "-m", "visionpeft.cli", "few-shot", "--shots", "1", "--iterations", "8", "--data",
                "digits?train=200&test=20", "--checkpoint-seconds", "0", "--out", str(tmp_path / out)]  # fmt: skip

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command("whole"), cwd=ROOT, env=environment, check=True, capture_output=True)
    process = subprocess.Popen(command("killed"), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    while process.poll() is None and not (checkpoint.exists() and len(torch.load(checkpoint)["losses"]) >= 2):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert checkpoint.exists(), "the run was not killed in the middle"
    subprocess.run(command("killed"), cwd=ROOT, env=environment, check=True, capture_output=True)
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "killed")]
    assert results[0]["losses"] == results[1]["losses"] and results[0]["after"] == results[1]["after"]
    tensors = [load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "killed")]
    assert all(torch.equal(tensors[1][k], v) for k, v in tensors[0].items())
