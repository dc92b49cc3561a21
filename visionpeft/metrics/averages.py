"""The two averages of VTAB-1k, which differ by 2 to 4 points and must not be mixed, and the PPT score."""

from __future__ import annotations

import math
from collections.abc import Mapping

from visionpeft.data.vtab import GROUPS, TASKS
from visionpeft.errors import DataError


def vtab_means(per_task: Mapping[str, float]) -> dict[str, float]:
    """Group means, `mean_of_groups` (VPT's line of papers) and `mean_of_19` (V-PETL Bench, EVA), in the unit given.

    Keys are the task folders of VTAB-1k, with or without "vtab:".

    Raises:
        DataError: a task is missing or unknown: a mean over fewer tasks is another number.
    """
    scores = {key.removeprefix("vtab:"): value for key, value in per_task.items()}
    if set(scores) != set(TASKS):
        missing, unknown = sorted(set(TASKS) - set(scores)), sorted(set(scores) - set(TASKS))
        raise DataError(f"VTAB means need all 19 tasks: missing {missing}, unknown {unknown}")
    means = {group: _mean([scores[t] for t, task in TASKS.items() if task.group == group]) for group in GROUPS}
    return {**means, "mean_of_groups": _mean(list(means.values())), "mean_of_19": _mean(list(scores.values()))}


def ppt(accuracy: float, params: float) -> float:
    """Performance per trainable parameter, `accuracy * exp(-log10(params / 1e7 + 1))` (V-PETL Bench).

    `accuracy` is a fraction in [0, 1]; `params` counts trainable scalars without the head.

    Raises:
        DataError: accuracy in percent, or a negative count.
    """
    if not 0 <= accuracy <= 1 or params < 0:
        raise DataError(f"ppt({accuracy}, {params}): accuracy is a fraction in [0, 1] and params a count")
    return accuracy * math.exp(-math.log10(params / 1e7 + 1))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
