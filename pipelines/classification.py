"""Image classification from data to a run folder, and sweeps over tasks, methods and seeds.

    result = run(Config(model="nano_vit", data="bundled", method="lora"))
    outcome = sweep(Sweep(method=("linear", "lora"), seeds=(0, 1, 2)))

A run folder holds config.json, adapter.safetensors, metrics.jsonl, result.json, report.html and, while it runs, a
checkpoint from which a killed run goes on to the same numbers. The test set is looked at once, after the last epoch.
"""

from __future__ import annotations

import os
import platform
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visionpeft import data
from visionpeft.data.vtab import GROUPS, TASKS
from visionpeft.errors import VisionPEFTError
from visionpeft.metrics import ppt, vtab_means
from visionpeft.pipelines.baselines import raw_pixels
from visionpeft.pipelines.cell import Cell, load_splits
from visionpeft.pipelines.methods import method_name, parse_method
from visionpeft.pipelines.parallel import Progress, side_by_side
from visionpeft.pipelines.recipes import plan_for
from visionpeft.pipelines.selection import grid_points, select
from visionpeft.pipelines.settings import BASELINES, Config, Result, Settings, Sweep
from visionpeft.report.classification import cell_report, sweep_report
from visionpeft.report.table import Row, markdown, summarise, write_csv
from visionpeft.training import make_accelerator, runs, score

__all__ = ["BASELINES", "Config", "Outcome", "Result", "Settings", "Sweep", "run", "sweep"]

MOST_CLASSES = 100
"""Confusion matrices of more classes are not kept."""


def run(config: Config, progress: Progress | None = None) -> Result:
    """Do one cell, go on with a killed one, or return the result of a finished one.

    Args:
        progress: called with (updates done, all updates, loss).

    Raises:
        VisionPEFTError: bad settings or data, a diverged run, or a folder that holds another run.
    """
    folder = config.folder
    _check(config)
    runs.claim(folder, config.identity())
    if (folder / "result.json").exists():
        return Result(**runs.read_json(folder / "result.json"))
    begin = time.perf_counter()
    accelerator = make_accelerator(config.precision, config.trackers, folder)
    result = Result(config.data_name, config.model, config.method, config.seed, folder=str(folder),
                    versions=_versions() | {"processes": str(accelerator.num_processes)})
    work = _raw if method_name(config.method) == "raw" else _adapt
    logits, rows = work(config, result, accelerator, progress)
    result.seconds = time.perf_counter() - begin
    if accelerator.is_main_process:
        runs.write_text(folder / "report.html", cell_report(result, rows, logits, load_splits(config)))
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


def _check(config: Config) -> None:
    """Refuse misspelt methods and grids before any work."""
    if method_name(config.method) not in BASELINES:
        parse_method(config.method)
    grid_points(config.grid)


def _raw(config: Config, result: Result, accelerator: Any, progress: Any) -> tuple[Tensor, list[dict[str, float]]]:
    splits = load_splits(config)
    logits, result.selection = raw_pixels(splits)
    _put_scores(result, logits, splits)
    return logits, []


def _adapt(config: Config, result: Result, accelerator: Any,
           progress: Any) -> tuple[Tensor, list[dict[str, float]]]:
    plan = plan_for(config)
    if config.grid:
        plan, result.selection = select(config, plan, accelerator, progress)
    cell = Cell(config, plan, accelerator)
    cell.train("train_val", config.folder, config.track_test, progress)
    logits = cell.logits("test")
    _put_scores(result, logits, cell.splits)
    path = config.folder / "adapter.safetensors"
    if accelerator.is_main_process:
        cell.save(path)
        result.file_bytes = path.stat().st_size
    _put_training(result, cell)
    return logits, cell.history.rows


def _put_scores(result: Result, logits: Tensor, splits: data.Splits) -> None:
    scores = score(logits, torch.from_numpy(splits.test.labels), splits.multi_label)
    result.accuracy, result.test_images, result.classes = scores["accuracy"], len(splits.test), list(splits.classes)
    result.metrics |= {f"test_{k}": v for k, v in scores.items() if isinstance(v, float)}
    if splits.multi_label:
        return
    right = logits.argmax(1).numpy() == splits.test.labels
    result.correct = "".join("1" if r else "0" for r in right)
    if len(splits.classes) <= MOST_CLASSES:
        result.confusion = scores["confusion"].tolist()


def _put_training(result: Result, cell: Cell) -> None:
    result.adapter_parameters = cell.tuner.num_parameters
    result.trained_parameters = sum(p.numel() for p in cell.model.parameters() if p.requires_grad)
    result.seconds_per_step, result.peak_memory = cell.history.seconds_per_step, cell.peak_memory
    result.recipe, result.notes = asdict(cell.recipe) | {"protocol": cell.plan.protocol}, cell.notes
    last = cell.history.rows[-1]
    result.metrics |= {key: last[key] for key in ("train_loss", "train_accuracy") if key in last}
    tracked = [row["test_accuracy"] for row in cell.history.rows if "test_accuracy" in row]
    if tracked:
        result.metrics["best_test_epoch_accuracy"] = max(tracked)


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


def cells(plan: Sweep) -> list[Config]:
    """All cells of a sweep: tasks outermost, then methods, then seeds."""
    shared = {f.name: getattr(plan, f.name) for f in fields(Settings)}
    tasks = "all" if tuple(plan.tasks) == ("all",) else list(plan.tasks)
    found = [Config(**(shared | {"data": spec}), method=method, seed=seed)
             for spec in data.expand(plan.data, tasks) for method in plan.method for seed in plan.seeds]
    return list(dict.fromkeys(found))  # a method named twice is one row


def sweep(plan: Sweep, watch: Callable[[int, int, Config], Progress] | None = None,
          done: Callable[[Config, Result | str], None] | None = None) -> Outcome:
    """Do all cells; finished ones are skipped, a failed one is noted and the others go on.

    Writes results.csv, results.md and report.html into `plan.out`.

    Args:
        watch: called before a cell with (its number, number of cells, config); gives its progress callback.
        done: called after a cell with its result or error message.
    """
    todo = cells(plan)
    for config in todo:
        _check(config)
    outcome = Outcome(folder=Path(plan.out), skipped=sum((c.folder / "result.json").exists() for c in todo))

    def begin(number: int, config: Config) -> Progress | None:
        return None if watch is None else watch(number, len(todo), config)

    news = {}
    for config, what in side_by_side(todo, plan.jobs, begin) if (plan.jobs or 1) > 1 else _in_turn(todo, begin):
        news[config] = what
        if done is not None:
            done(config, what)
    outcome.results = [what for config in todo if isinstance(what := news[config], Result)]
    outcome.failures = {f"{c.data_name} {c.method} seed {c.seed}": what
                        for c in todo if isinstance(what := news[c], str)}
    _write_summary(plan, outcome)
    return outcome


def _in_turn(todo: Sequence[Config], begin: Callable[[int, Config], Progress | None]) -> Iterator[
        tuple[Config, Result | str]]:
    for number, config in enumerate(todo):
        yield config, attempt(config, begin(number, config))


def attempt(config: Config, progress: Progress | None = None) -> Result | str:
    """`run`, or the error message of a cell that failed; its traceback goes to error.txt in its folder."""
    try:
        return run(config, progress)
    except Exception as error:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise  # the other processes would wait for this one for ever
        runs.write_text(config.folder / "error.txt", traceback.format_exc())
        message = str(error) if isinstance(error, VisionPEFTError) else f"{type(error).__name__}: {error}"
        return message.strip().splitlines()[0] if message.strip() else type(error).__name__


def _write_summary(plan: Sweep, outcome: Outcome) -> None:
    if int(os.environ.get("RANK", 0)) or not (outcome.results or outcome.failures):
        return
    rows = summarise(outcome.results)
    write_csv(outcome.folder / "results.csv", rows)
    runs.write_text(outcome.folder / "results.md", markdown(rows))
    runs.write_text(outcome.folder / "report.html", sweep_report(outcome, rows, vtab_table(rows)))


def vtab_table(rows: Sequence[Row]) -> list[list[str]]:
    """Head and rows of both VTAB-1k averages, for the methods that have all 19 tasks; empty if none has.

    PPT uses the mean of 19 and the mean adapter size, without heads.
    """
    methods: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.data.startswith("vtab:"):
            methods.setdefault(row.method, {})[row.data.partition("?")[0]] = row
    table = [[method, *_averages(tasks)] for method, tasks in methods.items() if len(tasks) == len(TASKS)]
    head = ["method", *(f"{group} %" for group in GROUPS), "mean of groups %", "mean of 19 %", "PPT of the mean of 19"]
    return [head, *table] if table else []


def _averages(tasks: Mapping[str, Row]) -> list[str]:
    means = vtab_means({task: row.accuracy for task, row in tasks.items()})
    size = sum(row.adapter_parameters or 0 for row in tasks.values()) / len(tasks)
    return [f"{100 * value:.2f}" for value in means.values()] + [f"{ppt(means['mean_of_19'], size):.3f}"]
