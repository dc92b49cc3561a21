"""Cells side by side: worker processes, each with its share of the cores, fed through pipes.

A small model gains little from a second thread, and loses much where the cores are busy: two processes of one thread
each do more than one of two. A worker ends by itself when its pipe closes, so none outlives a killed sweep.

    parent -> worker   one line of JSON per cell: {"job": name, "config": {...}}
    worker -> parent   lines of JSON: {"progress": [done, all, loss]} and at last {"result": {...}} or {"error": "..."}
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from visionpeft.pipelines.settings import OneCell, Result

Progress = Callable[[int, int, float], None]
Watch = Callable[[int, Any], Progress | None]
SECONDS = 0.2
"""Between two lines of progress."""


def side_by_side(todo: Sequence[OneCell], jobs: int, watch: Watch) -> Iterator[tuple[OneCell, Result | str]]:
    """Do all cells, `jobs` at a time; yield each with its result or error message as it ends.

    Args:
        watch: called in a thread before a cell with (its number, config); gives its progress callback.
    """
    waiting: queue.SimpleQueue[tuple[int, OneCell] | None] = queue.SimpleQueue()
    ended: queue.SimpleQueue[tuple[OneCell, Result | str]] = queue.SimpleQueue()
    for item in [*enumerate(todo), *[None] * jobs]:
        waiting.put(item)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    for _ in range(jobs):
        threading.Thread(target=_keep_busy, args=(waiting, ended, watch, threads), daemon=True).start()
    for _ in todo:
        yield ended.get()


def _keep_busy(waiting: Any, ended: Any, watch: Watch, threads: int) -> None:
    """Feed one worker until nothing waits; a worker that dies is replaced."""
    worker = _start(threads)
    while (item := waiting.get()) is not None:
        number, config = item
        news = _ask(worker, config, watch(number, config))
        if news is None:
            worker.wait()
            news = f"its process died with status {worker.returncode}; out of memory?"
            worker = _start(threads)
        ended.put((config, news))
    worker.stdin.close()
    worker.wait()


def _start(threads: int) -> Any:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return subprocess.Popen([sys.executable, "-m", "visionpeft.pipelines.parallel"], text=True, env=environment,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _ask(worker: Any, config: OneCell, progress: Progress | None) -> Result | str | None:
    """One cell; None if the worker died."""
    try:
        print(json.dumps({"job": config.job, "config": asdict(config)}), file=worker.stdin, flush=True)
    except BrokenPipeError:
        return None
    for line in worker.stdout:
        try:
            message = json.loads(line)
        except ValueError:
            continue  # something that a library printed
        if "progress" in message and progress is not None:
            progress(*message["progress"])
        elif "result" in message:
            return Result(**message["result"])
        elif "error" in message:
            return message["error"]
    return None


def serve() -> None:
    """The worker: read cells, do them, tell."""
    from visionpeft.pipelines.running import attempt, job_of

    for line in sys.stdin:
        asked = json.loads(line)
        given: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in asked["config"].items()}
        news = attempt(job_of(asked["job"]).config(**given), _Teller())
        _tell({"error": news} if isinstance(news, str) else {"result": asdict(news)})


class _Teller:
    """A progress callback that speaks a few times a second."""

    def __init__(self) -> None:
        self.last = 0.0

    def __call__(self, done: int, steps: int, loss: float) -> None:
        if time.monotonic() - self.last > SECONDS:
            self.last = time.monotonic()
            _tell({"progress": [done, steps, loss]})


def _tell(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    serve()
