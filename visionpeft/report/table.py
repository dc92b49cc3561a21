"""One row per method and data set: means and deviations over seeds, and what it cost."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visionpeft.training import runs

COLUMNS = {
    "data": "data", "model": "model", "method": "method", "seeds": "seeds", "accuracy": "accuracy",
    "deviation": "deviation", "adapter_parameters": "adapter parameters", "trained_parameters": "with head",
    "file_bytes": "file bytes", "seconds_per_step": "s / step", "peak_memory": "peak memory",
}


@dataclass(frozen=True)
class Row:
    """A method on a data set."""

    data: str
    model: str
    method: str
    seeds: int
    accuracy: float
    """The main score: mean over seeds, a fraction."""
    deviation: float | None
    """Sample standard deviation over seeds; None for a single seed."""
    adapter_parameters: int | None
    trained_parameters: int | None
    file_bytes: int | None
    seconds_per_step: float | None
    peak_memory: int | None
    best_test_epoch_accuracy: float | None
    """Mean of the best test scores over epochs: not comparable with `accuracy`."""
    measure: str = "accuracy"
    """What `accuracy` is."""


def summarise(results: Iterable[Any]) -> list[Row]:
    """Rows in the order in which methods first occur."""
    groups: dict[tuple[str, str, str], list[Any]] = {}
    for result in results:
        groups.setdefault((result.data, result.model, result.method), []).append(result)
    return [_row(group) for group in groups.values()]


def _row(group: list[Any]) -> Row:
    first, accuracies = group[0], [r.accuracy for r in group]
    key = f"best_test_epoch_{first.measure}"
    best = [r.metrics[key] for r in group if key in r.metrics]
    steps = [r.seconds_per_step for r in group if r.seconds_per_step is not None]
    memory = [r.peak_memory for r in group if r.peak_memory is not None]
    return Row(
        first.data, first.model, first.method, len(group), statistics.mean(accuracies),
        statistics.stdev(accuracies) if len(group) > 1 else None, first.adapter_parameters, first.trained_parameters,
        first.file_bytes, statistics.median(steps) if steps else None, max(memory) if memory else None,
        statistics.mean(best) if best else None, first.measure)


def cells(row: Row) -> list[str]:
    """A row as shown: accuracy in per cent, sizes with units; "-" where there is nothing to tell."""
    return [
        row.data, row.model, row.method, str(row.seeds), f"{100 * row.accuracy:.2f}",
        "-" if row.deviation is None else f"{100 * row.deviation:.2f}", count(row.adapter_parameters),
        count(row.trained_parameters), count(row.file_bytes),
        "-" if row.seconds_per_step is None else f"{row.seconds_per_step:.3g}",
        "-" if row.peak_memory is None else f"{row.peak_memory / 2**20:,.0f} MiB",
    ]


def shown(rows: Sequence[Row]) -> tuple[str, list[str], list[list[str]]]:
    """What all rows share of data and model, then head and body of the table without those columns."""
    body = [cells(row) for row in rows]
    same = [i for i in range(2) if len({line[i] for line in body}) == 1]
    keep = [i for i in range(len(COLUMNS)) if i not in same]
    head = [name for i, name in enumerate(_head(rows)) if i in keep]
    return ", ".join(body[0][i] for i in same) if body else "", head, [[line[i] for i in keep] for line in body]


def _head(rows: Sequence[Row]) -> list[str]:
    """Column names, the score by its own."""
    return [rows[0].measure if rows and key == "accuracy" else name for key, name in COLUMNS.items()]


def count(value: int | None) -> str:
    """A number with thousands separated."""
    return "-" if value is None else f"{value:,}"


def markdown(rows: list[Row]) -> str:
    """The table for a Markdown file."""
    lines = [_head(rows), ["---"] * len(COLUMNS), *map(cells, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_csv(path: Path, rows: list[Row]) -> None:
    """All columns, accuracies as fractions, sizes in bytes."""
    names = [name for name in Row.__dataclass_fields__]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([["" if (v := getattr(row, n)) is None else v for n in names] for row in rows])
    runs.write_text(path, text.getvalue())


def against_probe(results: Sequence[Any]) -> list[str]:
    """For each data set, whether each method beats the linear probe by more than two deviations.

    The deviation of the difference: over seeds where both have several, else over the test examples, which are the same
    for both (each counts +1, 0 or -1, as one, both or the other is right).
    """
    groups: dict[tuple[str, str, str], list[Any]] = {}
    for result in results:
        groups.setdefault((result.data, result.model, result.method), []).append(result)
    lines = []
    for (data, model, method), probe in groups.items():
        if method.partition(":")[0] == "linear":
            lines += [_verdict(group, probe) for key, group in groups.items()
                      if key[:2] == (data, model) and key[2] != method and group[0].adapter_parameters is not None]
    return lines


def _verdict(group: Sequence[Any], probe: Sequence[Any]) -> str:
    gain = statistics.mean(r.accuracy for r in group) - statistics.mean(r.accuracy for r in probe)
    if min(len(group), len(probe)) > 1:
        spread = math.hypot(*(statistics.stdev(r.accuracy for r in some) for some in (group, probe)))
        kind = f"over {len(group)} seeds"
    elif group[0].correct and probe[0].correct:
        spread, kind = _paired(group[0].correct, probe[0].correct), f"over the {len(probe[0].correct):,} test examples"
    else:
        return f"{group[0].data}: {group[0].method} against the linear probe: {100 * gain:+.2f} points, one seed"
    beats = "beats" if gain > 2 * spread else "does not beat"
    return (f"{group[0].data}: {group[0].method} {beats} the linear probe by more than two deviations "
            f"({100 * gain:+.2f} points, deviation {100 * spread:.2f} {kind})")


def _paired(first: str, second: str) -> float:
    """Deviation of the difference of two accuracies on the same examples, given which were right ("1") or wrong."""
    differences = [int(a) - int(b) for a, b in zip(first, second, strict=True)]
    return statistics.pstdev(differences) / math.sqrt(len(differences))
