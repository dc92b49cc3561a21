"""A run killed by SIGKILL at any step goes on to the same result, bit for bit; two processes do the work of one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from visionpeft.data import made_clouds

ROOT = Path(__file__).parents[2]
RECIPE = ["--epochs", "3", "--batch-size", "16", "--drop-path", "0.1", "--ema", "0.9", "--augment", "crop",
          "--checkpoint-seconds", "0", "--workers", "0"]


def arguments(checkpoint: str, out: Path, methods: list[str], recipe: list[str]) -> list[str]:
    return ["--model", "test_vit", "--checkpoint", checkpoint, "--img-size", "32", "--data", "digits?train=60&test=50",
            "--method", *methods, "--out", str(out), *recipe]


def start(command: list[str], **variables: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | variables
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def outcome(out: Path, method: str = "", processes: str = "1") -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Metrics and tensors of the only run of a method in `out`."""
    (path,) = out.glob(f"*/*/{method}*/seed0/result.json")
    result = json.loads(path.read_text())
    assert result["versions"]["processes"] == processes
    return result["metrics"], load_file(path.parent / "adapter.safetensors")


def steps_done(out: Path) -> int:
    """Updates in the last checkpoint, 0 before there is one."""
    for path in out.glob("*/*/*/seed0/checkpoint.pt"):
        state = torch.load(path, weights_only=True)
        return state["epoch"] * 4 + state["update"]
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("method, kill_at", [("lora:rank=2,dropout=0.1", 2), ("full", 6)])
def test_sigkill_at_any_step(tmp_path: Path, checkpoint: str, method: str, kill_at: int) -> None:
    command = ["-m", "visionpeft.cli", "classify"]
    finish(start([*command, *arguments(checkpoint, tmp_path / "whole", [method], RECIPE)]))
    out = tmp_path / "killed"
    process = start([*command, *arguments(checkpoint, out, [method], RECIPE)])
    while steps_done(out) < kill_at and process.poll() is None:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 0 < steps_done(out) < 12, "the run was not killed in the middle"
    finish(start([*command, *arguments(checkpoint, out, [method], RECIPE)]))
    (metrics, tensors), (again, resumed) = outcome(tmp_path / "whole"), outcome(out)
    assert again == metrics
    assert tensors.keys() == resumed.keys() and all(torch.equal(tensors[key], resumed[key]) for key in tensors)


def in_two(script: str, *arguments: str) -> None:
    """Run a script in two processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # With --cpu, accelerate 1.15 starts one process and says nothing of the number asked for.
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port)]
    finish(start([*launch, str(ROOT / "scripts" / script), *arguments]))


@pytest.mark.slow
def test_two_processes_do_the_work_of_one(tmp_path: Path, checkpoint: str) -> None:
    """Two cells in one launch, so that the process group has to outlive the first."""
    recipe = ["--epochs", "2", "--batch-size", "14", "--clip", "1.0", "--augment", "flip", "--workers", "0"]
    methods = ["lora:rank=2", "linear"]
    finish(start(["-m", "visionpeft.cli", "classify", *arguments(checkpoint, tmp_path / "one", methods, recipe)]))
    in_two("train_classification.py", *arguments(checkpoint, tmp_path / "two", methods, recipe))
    for method in ("lora", "linear"):
        (metrics, tensors), (again, shared) = outcome(tmp_path / "one", method), outcome(tmp_path / "two", method, "2")
        assert again.keys() == metrics.keys()
        assert again["train_loss"] == pytest.approx(metrics["train_loss"], rel=1e-5)
        assert again["test_accuracy"] == pytest.approx(metrics["test_accuracy"], abs=0.021)
        assert all(torch.allclose(tensors[key], shared[key], atol=1e-5) for key in tensors)


@pytest.mark.slow
def test_two_processes_segment_as_one(tmp_path: Path, checkpoint: str) -> None:
    """Losses image by image and one confusion matrix: the same update and, but for rounding, the same mIoU."""
    given = ["--model", "test_vit", "--checkpoint", checkpoint, "--img-size", "32", "--data", "bundled?train=20&test=5",
             "--method", "lora:rank=2", "--epochs", "2", "--batch-size", "6", "--workers", "0", "--jobs", "1"]
    finish(start(["-m", "visionpeft.cli", "segment", *given, "--out", str(tmp_path / "one")]))
    in_two("train_segmentation.py", *given, "--out", str(tmp_path / "two"))
    (metrics, tensors), (again, shared) = outcome(tmp_path / "one"), outcome(tmp_path / "two", processes="2")
    assert again["train_loss"] == pytest.approx(metrics["train_loss"], rel=1e-5)
    assert again["test_mIoU"] == pytest.approx(metrics["test_mIoU"], abs=1e-3)
    assert all(torch.allclose(tensors[key], shared[key], atol=1e-5) for key in tensors)


@pytest.mark.slow
def test_two_processes_learn_clouds(tmp_path: Path) -> None:
    """Each has its own batch statistics in the classifier, so that nothing but the course is the same."""
    rng = np.random.default_rng(0)
    clouds = np.stack([made_clouds.make(name, rng, 64) for name in ("bed", "lamp") for _ in range(12)])
    np.savez(tmp_path / "a.npz", points=clouds, label=np.repeat([0, 1], 12))
    in_two("train_point_cloud.py", "--data", f"npz:{tmp_path / 'a.npz'}", "--points", "64", "--groups", "8", "--method",
           "pointgst:rank=4,local=4", "--epochs", "2", "--batch-size", "8", "--jobs", "1", "--out", str(tmp_path / "o"))
    metrics, tensors = outcome(tmp_path / "o", processes="2")
    assert {"test_accuracy", "test_mean_per_class", "train_loss"} <= metrics.keys()
    assert any(key.endswith("turn_weight") and value.any() for key, value in tensors.items())
