"""Image classification from data to a run folder, and sweeps over tasks, methods and seeds.

    result = run(Config(model="nano_vit", data="bundled", method="lora"))
    outcome = sweep(Sweep(method=("linear", "lora"), seeds=(0, 1, 2)))

The run folder and all that happens around a cell are those of visionpeft.pipelines.running.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from visionpeft import data
from visionpeft.data.vtab import GROUPS, TASKS
from visionpeft.metrics import ppt, vtab_means
from visionpeft.pipelines.baselines import raw_pixels
from visionpeft.pipelines.cell import Cell, finish, load_splits
from visionpeft.pipelines.recipes import plan_for
from visionpeft.pipelines.running import Job, Outcome, cells, run, sweep
from visionpeft.pipelines.settings import BASELINES, Config, Result, Settings, Sweep
from visionpeft.report.table import Row, summarise

__all__ = ["BASELINES", "JOB", "Config", "Outcome", "Result", "Settings", "Sweep", "cells", "run", "sweep"]


def _raw(config: Config, result: Result) -> list[str]:
    splits = load_splits(config)
    logits, result.selection = raw_pixels(splits)
    return finish(result, logits, splits)


def _expand(plan: Sweep) -> list[str]:
    return data.expand(plan.data, "all" if tuple(plan.tasks) == ("all",) else list(plan.tasks))


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


def _summary(results: Sequence[Result]) -> tuple[str, list[list[str]]]:
    return "Averages", vtab_table(summarise(results))


JOB = Job(Config, Settings, plan_for, Cell, _raw, _expand, _summary)
