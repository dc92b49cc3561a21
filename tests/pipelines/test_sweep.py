"""Sweeps: which cells, what becomes of failures, one after the other or side by side."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import psutil
import pytest

from visionpeft.errors import DataError
from visionpeft.pipelines import running
from visionpeft.pipelines.classification import Config, Settings, Sweep, cells, sweep
from visionpeft.pipelines.methods import MethodError

DATA = "digits?train=60&test=50"


def plan(config: Config, **changes: object) -> Sweep:
    shared = {f.name: getattr(config, f.name) for f in fields(Settings)}
    return Sweep(**(shared | changes))  # type: ignore[arg-type]


def test_tasks_then_methods_then_seeds() -> None:
    found = cells(Sweep(data="vtab", root="here", tasks=("dtd", "cifar"), method=("ssf", "lora"), seeds=(0, 1)))
    assert [(c.data, c.method, c.seed) for c in found[:5]] == [
        ("vtab:dtd", "ssf", 0), ("vtab:dtd", "ssf", 1), ("vtab:dtd", "lora", 0), ("vtab:dtd", "lora", 1),
        ("vtab:cifar", "ssf", 0)]
    assert len(cells(Sweep(data="vtab", root="here", method=("ssf",)))) == 19
    assert len(cells(Sweep(method=("ssf", "ssf")))) == 1


def test_mistakes_are_told_before_any_work(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "run", None)
    with pytest.raises(MethodError):
        sweep(plan(config, method=("linear", "lorra")))
    with pytest.raises(DataError):
        sweep(plan(config, data="vtab", tasks=("imagenet",)))


@pytest.mark.slow
def test_side_by_side_gives_what_one_after_the_other_gives(config: Config, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a failing cell, and cells finished before."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    methods = ("linear", "lora:rank=1000", "ssf", "bitfit")
    alone = sweep(plan(config, method=methods, out=str(tmp_path / "a")))
    sweep(plan(config, method=("ssf",), out=str(tmp_path / "b")))
    seen: list[str] = []
    beside = sweep(plan(config, method=methods, out=str(tmp_path / "b"), jobs=2),
                   done=lambda cell, news: seen.append(cell.method))
    assert [r.metrics for r in beside.results] == [r.metrics for r in alone.results]
    assert list(beside.failures) == [f"{DATA} lora:rank=1000 seed 0"] and beside.failures == alone.failures
    assert sorted(seen) == sorted(methods) and (alone.skipped, beside.skipped) == (0, 1)
    assert (tmp_path / "b" / "report.html").exists()


@pytest.mark.slow
def test_a_worker_that_dies_fails_its_cell_alone(config: Config) -> None:
    killed: list[str] = []

    def watch(number: int, total: int, cell: Config) -> object:
        def progress(done: int, steps: int, loss: float) -> None:
            if cell.method == "ssf" and not killed:
                killed.append(cell.method)
                for child in psutil.Process().children():
                    child.kill()
        return progress

    outcome = sweep(plan(config, method=("ssf",), epochs=200, jobs=2), watch=watch)
    assert list(outcome.failures.values()) == ["its process died with status -9; out of memory?"]


@pytest.mark.slow
def test_workers_end_with_their_sweep(config: Config, tmp_path: Path) -> None:
    program = ("from visionpeft.pipelines.classification import *\n"
               f"sweep(Sweep(model='test_vit', checkpoint={config.checkpoint!r}, img_size=32, data={DATA!r}, "
               f"out={str(tmp_path)!r}, method=('ssf', 'lora'), epochs=100000, warmup_epochs=0, jobs=2))")
    parent = subprocess.Popen([sys.executable, "-c", program])
    deadline = time.monotonic() + 120
    while len(list(tmp_path.rglob("metrics.jsonl"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    workers = psutil.Process(parent.pid).children()
    assert len(workers) == 2
    parent.kill()
    parent.wait()
    assert psutil.wait_procs(workers, timeout=60)[1] == []
