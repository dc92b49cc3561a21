"""Choosing hyper-parameters, of training or of the method, on the validation split."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from typing import Any

from visionpeft.errors import VisionPEFTError
from visionpeft.pipelines.cell import BaseCell
from visionpeft.pipelines.methods import free_fields, literal
from visionpeft.pipelines.recipes import Plan, override
from visionpeft.pipelines.settings import OneCell
from visionpeft.training import Recipe, runs

RECIPE = tuple(f.name for f in fields(Recipe))


class GridError(VisionPEFTError):
    """A grid is malformed."""


def grid_points(grid: tuple[str, ...], method: str) -> list[dict[str, Any]]:
    """All combinations of "lr=1e-3,3e-3" "scale=0.1,1".

    Args:
        method: as on the command line; the fields that it leaves open can be searched too.

    Raises:
        GridError: names the malformed entry and the fields that there are.
    """
    axes = []
    known = [*RECIPE, *free_fields(method)]
    for entry in grid:
        name, equals, values = entry.partition("=")
        if not equals or not values or name not in known:
            raise GridError(f"--grid {entry!r} of {method}: write field=value,value with a field of {', '.join(known)}")
        axes.append([(name, literal(value)) for value in values.split(",")])
    return [dict(point) for point in itertools.product(*axes)]


def grid_of(grid: tuple[str, ...], method: str, methods: tuple[str, ...]) -> tuple[str, ...]:
    """The part of a sweep's grid that is for one of its methods: training's fields, and those that it leaves open.

    Raises:
        GridError: an entry is for none of the methods.
    """
    for entry in grid:
        if not any(_is_for(entry, other) for other in methods):
            raise GridError(f"--grid {entry!r}: neither training nor {' nor '.join(methods)} has that field to search")
    return tuple(entry for entry in grid if _is_for(entry, method))


def _is_for(entry: str, method: str) -> bool:
    return entry.partition("=")[0] in (*RECIPE, *free_fields(method))


def of_method(point: dict[str, Any]) -> dict[str, Any]:
    """What a point says of the method and not of training."""
    return {name: value for name, value in point.items() if name not in RECIPE}


def select(make: type[BaseCell], config: OneCell, plan: Plan, accelerator: Any,
           progress: Any) -> tuple[Plan, list[dict[str, Any]]]:
    """The plan that does best on val after training on train, and what every point scored; test stays untouched."""
    tried, key = [], f"val_{make.measure}"
    for point in grid_points(config.grid, config.method):
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
    own = of_method(point)
    recipe = override(plan.recipe, {name: value for name, value in point.items() if name not in own})
    return replace(plan, recipe=recipe, fields=plan.fields | own)
