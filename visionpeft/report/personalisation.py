"""Pictures of a personalisation: contact sheets, and the page of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from visionpeft.errors import require
from visionpeft.report import page, plots

NAMES = {"dino": "DINO", "clip_i": "CLIP-I", "clip_t": "CLIP-T"}


def sheet(rows: Mapping[str, Sequence[Any]], side: int = 96) -> Any:
    """A PIL image with a line of pictures for each name; the name stands before them.

    Args:
        rows: name -> PIL images; lines may differ in length.
        side: pixels of a picture.
    """
    image_module, draw_module = (require(f"PIL.{m}", extra="train") for m in ("Image", "ImageDraw"))
    margin, gap = 150, 4
    columns = max((len(images) for images in rows.values()), default=0)
    whole = image_module.new("RGB", (margin + columns * (side + gap), len(rows) * (side + gap)), "white")
    draw = draw_module.Draw(whole)
    for line, (name, images) in enumerate(rows.items()):
        top = line * (side + gap)
        draw.text((4, top + side // 2 - 6), name[:26], fill="black")
        for column, image in enumerate(images):
            small = image.convert("RGB").resize((side, side), image_module.Resampling.NEAREST if image.width < side
                                                else image_module.Resampling.LANCZOS)  # fmt: skip
            whole.paste(small, (margin + column * (side + gap), top))
    return whole


def score_rows(result: Any) -> list[list[str]]:
    """A line for each score: of the real images, before and after."""
    return [[NAMES.get(key, key), _shown(result.real.get(key)), _shown(result.before.get(key)), _shown(value)]
            for key, value in result.after.items()]  # fmt: skip


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def report(result: Any, rows: Sequence[Mapping[str, float]], folder: Path) -> str:
    """A self-contained page: what was found, the loss, previews over the updates, scores."""
    sections = [page.paragraphs([*result.account, *(f"NOTE: {note}" for note in result.notes)])]
    head = ["base", "method", "token", "updates", "parameters", "file, bytes", "loss at the end", "seconds"]
    body = [result.base, result.method, result.token, f"{result.steps}", f"{result.parameters:,}",
            f"{result.file_bytes:,}", f"{result.loss:.4f}", f"{result.seconds:.0f}"]  # fmt: skip
    sections.append(page.table(head, [body]))
    steps = [float(row["step"]) for row in rows]
    series = {"mean of the last 20": smooth([row["loss"] for row in rows], 20)}
    sections += [page.heading("Loss"), plots.lines(steps, series, "update", "loss")]
    sections += [page.heading("Previews"), *_previews(folder)]
    if result.after:
        sections += [page.heading("Scores"), page.table(["score", "real", "before", "after"], score_rows(result))]
        sections.append(_picture(folder / "sheet.png", "before and after", 900))
    return page.page(f"Personalised: {result.prompt}", sections)


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Mean of each value and those before it, at most `width`."""
    return [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i + 1 - width) : i + 1])]


def _previews(folder: Path) -> list[str]:
    found = sorted((folder / "previews").glob("*.png"))
    return [_picture(path, f"update {int(path.stem.split('_')[0])}", 128) for path in found]


def _picture(path: Path, caption: str, side: int) -> str:
    with require("PIL.Image", extra="train").open(path) as image:
        return page.figure(plots.picture(image.convert("RGB"), side), caption)
