"""Reports that all jobs share: one of a cell, one of a sweep. What a job shows of its test set it brings itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from visionpeft.report import page, plots
from visionpeft.report.table import Row, against_probe, count, shown


def cell_report(result: Any, rows: Sequence[dict[str, float]], sections: Sequence[str]) -> str:
    """HTML of one run: numbers, curves, then the sections of the job.

    Args:
        rows: one per epoch, as in metrics.jsonl.
        sections: markup of what the test set shows.
    """
    drawn = [page.paragraphs(result.notes), page.table(("", ""), _numbers(result)), *_settings(result)]
    if result.selection:
        head = list(result.selection[0])
        drawn += [page.heading("Tried on the validation split"),
                  page.table(head, [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()]
                                    for row in result.selection])]
    return page.page(f"{result.method} on {result.data}, seed {result.seed}", [*drawn, *_curves(rows), *sections])


def _numbers(result: Any) -> list[tuple[str, str]]:
    numbers = [("model", result.model)]
    numbers += [(key.replace("_", " "), f"{value:.4f}") for key, value in result.metrics.items()]
    numbers += [("adapter parameters", count(result.adapter_parameters)),
                ("all that learnt", count(result.trained_parameters)), ("file bytes", count(result.file_bytes)),
                ("test examples", count(result.test_images)), ("seconds", f"{result.seconds:.1f}")]
    if result.seconds_per_step is not None:
        waiting = f", of which {result.seconds_waiting:.2g} waiting for data" if result.seconds_waiting else ""
        numbers.append(("seconds per step", f"{result.seconds_per_step:.3g}{waiting}"))
    if result.peak_memory is not None:
        numbers.append(("peak memory", f"{result.peak_memory / 2**20:,.0f} MiB"))
    return numbers


def _settings(result: Any) -> list[str]:
    """Recipe and versions, folded away."""
    pairs = [*result.recipe.items(), *result.versions.items()]
    return [page.folded("Recipe and versions", page.table(("", ""), [(key, str(value)) for key, value in pairs]))]


def _curves(rows: Sequence[dict[str, float]]) -> list[str]:
    if not rows:
        return []
    series = {key: {row["epoch"]: row[key] for row in rows if key in row} for key in rows[-1]}
    drawn = [page.heading("Training"), page.figure(plots.curves({"train": series["train_loss"]}, "loss"))]
    scores = {key: series[key] for key in series if key not in ("epoch", "lr", "train_loss")}
    for measure in dict.fromkeys(key.partition("_")[2] for key in scores):
        some = {key.partition("_")[0]: values for key, values in scores.items() if key.endswith(f"_{measure}")}
        drawn.append(page.figure(plots.curves(some, measure)))
    return drawn + [page.figure(plots.curves({"lr": series["lr"]}, "learning rate"))]


def sweep_report(outcome: Any, rows: Sequence[Row], more: str = "", lines: Sequence[Sequence[str]] = ()) -> str:
    """HTML of a sweep: the table, a bar chart and loss curves per data set, what failed.

    Args:
        more, lines: title, and head and rows or nothing, of one more table.
    """
    title, head, body = shown(rows)
    sections = [page.paragraphs([title]), page.table(head, body),
                page.paragraphs([NOTE, *against_probe(outcome.results)])]
    if lines:
        sections += [page.heading(more), page.table(lines[0], lines[1:])]
    tracked = [(r.data, r.method, f"{100 * r.best_test_epoch_accuracy:.2f}") for r in rows
               if r.best_test_epoch_accuracy is not None]
    if tracked:
        sections += [page.heading("Best test epoch (chosen on the test set, as in much of the literature)"),
                     page.table(("data", "method", rows[0].measure), tracked)]
    for name in dict.fromkeys(row.data for row in rows):
        sections += _data_set(name, [row for row in rows if row.data == name],
                              [result for result in outcome.results if result.data == name])
    if outcome.failures:
        sections += [page.heading("Failed"), page.table(("cell", "error"), outcome.failures.items())]
    return page.page("visionpeft", sections)


def _data_set(name: str, rows: Sequence[Row], results: Sequence[Any]) -> list[str]:
    chart = plots.bars([r.method for r in rows], [100 * r.accuracy for r in rows],
                       [100 * (r.deviation or 0) for r in rows], f"test {rows[0].measure}, %")
    sections = [page.heading(name), page.figure(chart)]
    losses = {result.method: _losses(result) for result in reversed(results)}
    losses = {method: losses[method] for method in (r.method for r in rows) if losses[method]}
    if losses:
        sections.append(page.figure(plots.curves(losses, "training loss, first seed")))
    best = max(results, key=lambda result: result.accuracy)
    if best.confusion is not None:
        sections.append(page.figure(plots.confusion(np.array(best.confusion), best.classes),
                                    f"{best.method}, seed {best.seed}"))
    return [*sections, page.paragraphs(["Samples and curves of each run are in the report.html of its folder."])]


def _losses(result: Any) -> dict[float, float]:
    """Training loss by epoch, from the run's folder."""
    path = Path(result.folder, "metrics.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {row["epoch"]: row["train_loss"] for row in rows}


NOTE = ("Scores are those of the test set after the last epoch, in per cent, mean over seeds; deviation is the sample "
        "standard deviation over seeds. Adapter parameters leave out classifier and decoder. Peak memory on a CPU is "
        "that of the whole process, libraries and data included.")
