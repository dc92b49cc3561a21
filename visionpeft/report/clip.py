"""The pages of CLIP's training runs: one table of what was gained and lost, and the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from visionpeft.report import page, plots
from visionpeft.report.zero_shot import NAMES

Table = tuple[list[str], list[list[str]]]


def few_shot_rows(result: Any) -> Table:
    """Head and body: a line for each set and score that has a value (top-5 has none below five classes)."""
    return ["set", "score", "before", "after", "difference"], [
        [name, NAMES[key], *_change(before, after)]
        for name, scores in result.before.items()
        for key, before in scores.items()
        if (after := result.after[name][key]) == after
    ]


def few_shot_notes(result: Any) -> list[str]:
    found = []
    if result.harmonic is not None:
        found.append(f"harmonic mean of base and new: {100 * result.harmonic:.2f} %")
    return [*found, f"chosen on validation images: {result.chosen}"] if result.chosen else found


def few_shot_title(result: Any, shots: int) -> str:
    return f"{result.data}, {shots} shots, {result.method}, {result.parameters:,} parameters"


def few_shot_page(result: Any, shots: int) -> str:
    """A self-contained page."""
    return _page(few_shot_title(result, shots), few_shot_notes(result), few_shot_rows(result), result.losses)


def contrast_rows(result: Any) -> Table:
    """Head and body: a line for each recall."""
    return ["recall %", "before", "after", "difference"], [
        [key.replace("_", " "), *_change(before, result.after[key])] for key, before in result.before.items()
    ]


def contrast_title(result: Any, method: str) -> str:
    return f"{result.held_out} held-out images, {method}, {result.parameters:,} parameters"


def contrast_page(result: Any, method: str) -> str:
    """A self-contained page."""
    return _page(contrast_title(result, method), [], contrast_rows(result), result.losses)


def _change(before: float, after: float) -> list[str]:
    return [f"{100 * before:.2f}", f"{100 * after:.2f}", f"{100 * (after - before):+.2f}"]


def _page(title: str, notes: Sequence[str], table: Table, losses: Sequence[float]) -> str:
    sections = [page.paragraphs(notes), page.table(*table)]
    if losses:
        steps, means = thinned(losses)
        sections += [page.heading("Training"), page.figure(plots.lines(steps, {"loss": means}, "update", "loss"))]
    return page.page(title, sections)


def thinned(losses: Sequence[float], points: int = 100) -> tuple[list[int], list[float]]:
    """At most so many points: the last update of each stretch, and the mean of its losses."""
    size = -(-len(losses) // points)
    stretches = [losses[start : start + size] for start in range(0, len(losses), size)]
    ends = [min((i + 1) * size, len(losses)) for i in range(len(stretches))]
    return ends, [sum(stretch) / len(stretch) for stretch in stretches]
