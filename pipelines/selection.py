"""Choosing hyper-parameters on the validation split."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from typing import Any

from visionpeft.errors import VisionPEFTError
from visionpeft.pipelines.cell import BaseCell
from visionpeft.pipelines.methods import literal
from visionpeft.pipelines.recipes import Plan, override
from visionpeft.pipelines.settings import OneCell
from visionpeft.training import Recipe, runs


class GridError(VisionPEFTError):
    """A grid is malformed."""


def grid_points(grid: tuple[str, ...]) -> list[dict[str, Any]]:
    """All combinations of "lr=1e-3,3e-3" "weight_decay=0,0.05".

    Raises:
        GridError: names the malformed entry and the fields that there are.
    """
    axes = []
    known = [f.name for f in fields(Recipe)]
    for entry in grid:
        name, equals, values = entry.partition("=")
        if not equals or not values or name not in known:
            raise GridError(f"--grid {entry!r}: write field=value,value with a field of {', '.join(known)}")
        axes.append([(name, literal(value)) for value in values.split(",")])
    return [dict(point) for point in itertools.product(*axes)]


def select(make: type[BaseCell], config: OneCell, plan: Plan, accelerator: Any,
           progress: Any) -> tuple[Plan, list[dict[str, Any]]]:
    """The plan that does best on val after training on train, and what every point scored; test stays untouched."""
    tried, key = [], f"val_{make.measure}"
    for point in grid_points(config.grid):
        folder = config.folder / "grid" / runs.slug(",".join(f"{k}={v}" for k, v in point.items()))
        done = folder / "result.json"
        if not done.exists():
            folder.mkdir(parents=True, exist_ok=True)
            cell = make(config, _with(plan, point), accelerator)
            cell.train("train", folder, progress=progress)
            row = point | {key: cell.score("val")[make.measure]}
            if accelerator.is_main_process:
                runs.write_json(done, row)
                (folder / "checkpoint.pt").unlink(missing_ok=True)
            accelerator.wait_for_everyone()
        tried.append(runs.read_json(done))
    best = max(tried, key=lambda row: row[key])
    return _with(plan, {k: v for k, v in best.items() if k != key}), tried


def _with(plan: Plan, point: dict[str, Any]) -> Plan:
    return replace(plan, recipe=override(plan.recipe, point))
