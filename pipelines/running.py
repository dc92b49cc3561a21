"""What all jobs share: a cell from its settings to its run folder, and sweeps over methods and seeds.

A run folder holds config.json, adapter.safetensors, metrics.jsonl, result.json, report.html and, while it runs, a
checkpoint from which a killed run goes on to the same numbers. The test set is looked at once, after the last epoch.
"""

from __future__ import annotations

import importlib
import os
import platform
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from visionpeft.errors import VisionPEFTError
from visionpeft.pipelines.cell import BaseCell
from visionpeft.pipelines.methods import method_name, parse_job_method
from visionpeft.pipelines.parallel import Progress, side_by_side
from visionpeft.pipelines.recipes import Plan
from visionpeft.pipelines.selection import grid_of, grid_points, of_method, select
from visionpeft.pipelines.settings import BASELINES, Common, ManyCells, OneCell, Result
from visionpeft.report.cells import cell_report, sweep_report
from visionpeft.report.table import markdown, summarise, write_csv
from visionpeft.training import make_accelerator, runs


@dataclass(frozen=True)
class Job:
    """What one job brings along; each module of a job has one, called JOB."""

    config: type[OneCell]
    settings: type[Common]
    """What all cells of its sweeps share."""
    plan: Callable[[Any], Plan]
    """Recipe, method's arguments and preprocessing of a cell."""
    cell: type[BaseCell]
    raw: Callable[[Any, Result], list[str]]
    """Do the raw row: put its scores into the result, give sections of the report."""
    expand: Callable[[Any], Sequence[str]]
    """Data of a sweep, one for each task."""
    summary: Callable[[Sequence[Result]], tuple[str, list[list[str]]]]
    """Title, and head and rows or nothing, of one more table in the report of a sweep."""


def job_of(settings: Common | str) -> Job:
    """The job that settings are for, or the one of a name."""
    name = settings if isinstance(settings, str) else settings.job
    return importlib.import_module(f"visionpeft.pipelines.{name}").JOB


def run(config: OneCell, progress: Progress | None = None) -> Result:
    """Do one cell, go on with a killed one, or return the result of a finished one.

    Args:
        progress: called with (updates done, all updates, loss).

    Raises:
        VisionPEFTError: bad settings or data, a diverged run, or a folder that holds another run.
    """
    folder = config.folder
    check(config)
    runs.claim(folder, config.identity())
    if (folder / "result.json").exists():
        return Result(**runs.read_json(folder / "result.json"))
    begin = time.perf_counter()
    accelerator = make_accelerator(config.precision, config.trackers, folder)
    job = job_of(config)
    result = Result(config.data_name, config.model, config.method, config.seed, measure=job.cell.measure,
                    folder=str(folder), versions=_versions() | {"processes": str(accelerator.num_processes)})
    rows: list[dict[str, float]] = []
    if method_name(config.method) == "raw":
        sections = job.raw(config, result)
    else:
        sections, rows = _adapt(job, config, result, accelerator, progress)
    result.seconds = time.perf_counter() - begin
    if accelerator.is_main_process:
        runs.write_text(folder / "report.html", cell_report(result, rows, sections))
        # Last, since it marks the cell as finished.
        runs.write_json(folder / "result.json", asdict(result))
        for left in ("checkpoint.pt", "error.txt"):
            (folder / left).unlink(missing_ok=True)
    # Not end_training(): that would take down the process group, which the next cell needs.
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    return result


def check(config: OneCell) -> None:
    """Refuse misspelt methods and grids before any work."""
    for point in grid_points(config.grid, config.method):
        if method_name(config.method) not in BASELINES:
            parse_job_method(config.method, of_method(point))


def _adapt(job: Job, config: OneCell, result: Result, accelerator: Any,
           progress: Any) -> tuple[list[str], list[dict[str, float]]]:
    plan = job.plan(config)
    if config.grid:
        plan, result.selection = select(job.cell, config, plan, accelerator, progress)
    cell = job.cell(config, plan, accelerator)
    cell.train("train_val", config.folder, config.track_test, progress)
    path = config.folder / "adapter.safetensors"
    if accelerator.is_main_process:  # before scoring, which may fail over a damaged image
        cell.save(path)
        result.file_bytes = path.stat().st_size
    sections = cell.finish(result)
    _put_training(result, cell)
    return sections, cell.history.rows


def _put_training(result: Result, cell: BaseCell) -> None:
    history = cell.history
    result.adapter_parameters = cell.tuner.num_parameters
    result.trained_parameters = sum(p.numel() for p in cell.model.parameters() if p.requires_grad)
    result.seconds_per_step, result.seconds_waiting = history.seconds_per_step, history.seconds_waiting
    result.peak_memory, result.notes = cell.peak_memory, cell.notes
    result.recipe = asdict(cell.recipe) | {"protocol": cell.plan.protocol, "method": cell.tuner.method.summary()}
    last = history.rows[-1]
    result.metrics |= {key: last[key] for key in ("train_loss", "train_accuracy") if key in last}
    tracked = [row[f"test_{result.measure}"] for row in history.rows if f"test_{result.measure}" in row]
    if tracked:
        result.metrics[f"best_test_epoch_{result.measure}"] = max(tracked)


def _versions() -> dict[str, str]:
    import timm

    import visionpeft

    return {"visionpeft": visionpeft.__version__, "torch": torch.__version__, "timm": timm.__version__,
            "python": platform.python_version(), "threads": str(torch.get_num_threads())}


@dataclass
class Outcome:
    """What a sweep did."""

    results: list[Result] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    """Cell -> error message."""
    skipped: int = 0
    """Cells that an earlier sweep had finished."""
    folder: Path = Path()


def cells(plan: ManyCells) -> list[Any]:
    """All cells of a sweep: tasks outermost, then methods, then seeds."""
    job = job_of(plan)
    shared = {f.name: getattr(plan, f.name) for f in fields(job.settings)}
    grids = {method: grid_of(plan.grid, method, plan.method) for method in plan.method}
    found = [job.config(**(shared | {"data": spec, "grid": grids[method]}), method=method, seed=seed)
             for spec in job.expand(plan) for method in plan.method for seed in plan.seeds]
    return list(dict.fromkeys(found))  # a method named twice is one row


def sweep(plan: ManyCells, watch: Callable[[int, int, Any], Progress] | None = None,
          done: Callable[[Any, Result | str], None] | None = None) -> Outcome:
    """Do all cells; finished ones are skipped, a failed one is noted and the others go on.

    Writes results.csv, results.md and report.html into `plan.out`.

    Args:
        watch: called before a cell with (its number, number of cells, config); gives its progress callback.
        done: called after a cell with its result or error message.
    """
    todo = cells(plan)
    for config in todo:
        check(config)
    outcome = Outcome(folder=Path(plan.out), skipped=sum((c.folder / "result.json").exists() for c in todo))

    def begin(number: int, config: OneCell) -> Progress | None:
        return None if watch is None else watch(number, len(todo), config)

    news = {}
    jobs = plan.jobs or 1
    for config, what in side_by_side(todo, jobs, begin) if jobs > 1 else _in_turn(todo, begin):
        news[config] = what
        if done is not None:
            done(config, what)
    outcome.results = [what for config in todo if isinstance(what := news[config], Result)]
    outcome.failures = {f"{c.data_name} {c.method} seed {c.seed}": what
                        for c in todo if isinstance(what := news[c], str)}
    _write_summary(plan, outcome)
    return outcome


def _in_turn(todo: Sequence[OneCell], begin: Callable[[int, OneCell], Progress | None]) -> Iterator[
        tuple[OneCell, Result | str]]:
    for number, config in enumerate(todo):
        yield config, attempt(config, begin(number, config))


def attempt(config: OneCell, progress: Progress | None = None) -> Result | str:
    """`run`, or the error message of a cell that failed; its traceback goes to error.txt in its folder."""
    try:
        return run(config, progress)
    except Exception as error:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise  # the other processes would wait for this one for ever
        runs.write_text(config.folder / "error.txt", traceback.format_exc())
        message = str(error) if isinstance(error, VisionPEFTError) else f"{type(error).__name__}: {error}"
        return message.strip().splitlines()[0] if message.strip() else type(error).__name__


def _write_summary(plan: ManyCells, outcome: Outcome) -> None:
    if int(os.environ.get("RANK", 0)) or not (outcome.results or outcome.failures):
        return
    rows = summarise(outcome.results)
    write_csv(outcome.folder / "results.csv", rows)
    runs.write_text(outcome.folder / "results.md", markdown(rows))
    runs.write_text(outcome.folder / "report.html", sweep_report(outcome, rows, *job_of(plan).summary(outcome.results)))
