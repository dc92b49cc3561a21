"""The page of a zero-shot evaluation: one table, one curve."""

from __future__ import annotations

from typing import Any

from visionpeft.report import page, plots

NAMES = {"top1": "top-1 %", "top5": "top-5 %", "mean_per_class": "mean per class %", "ece": "calibration error %"}


def rows(result: Any) -> tuple[list[str], list[list[str]]]:
    """Head and body: a line for each set and score; before, after and the difference where there is an adapter."""
    head = ["set", "images", "score", "before"]
    adapted = bool(result.after)
    body = []
    for name, scores in result.before.items():
        for key, value in scores.items():
            label = NAMES.get(key, f"{key} %".replace("_", " "))
            line = [name, f"{result.images[name]:,}", label, f"{100 * value:.2f}"]
            if adapted:
                after = result.after[name][key]
                line += [f"{100 * after:.2f}", f"{100 * (after - value):+.2f}"]
            body.append(line)
    return head + (["after", "difference"] if adapted else []), body


def curve_rows(result: Any) -> tuple[list[str], list[list[str]]]:
    """Head and body: a line for each scale, a column for each set."""
    names = list(result.before)
    body = [[f"{p['scale']:.2f}", *(f"{100 * p['scores'][name]:.2f}" for name in names)] for p in result.curve]
    return ["scale", *(f"{name} %" for name in names)], body


def title(result: Any) -> str:
    return f"{result.model}, {result.templates} template{'' if result.templates == 1 else 's'}"


def report(result: Any) -> str:
    """A self-contained page."""
    notes = [title(result)]
    if result.adapter:
        notes += [f"adapter: {result.adapter}, {result.parameters:,} parameters", *result.notes]
    sections = [page.paragraphs(notes), page.table(*rows(result))]
    if result.curve:
        series = {name: [100 * point["scores"][name] for point in result.curve] for name in result.before}
        scales = [point["scale"] for point in result.curve]
        sections += [page.heading("Over the adapter's scale"), plots.lines(scales, series, "scale", "accuracy %")]
    return page.page(f"Zero-shot: {result.model}", sections)
