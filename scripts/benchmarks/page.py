"""The figures as a Markdown page and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.goals import GOALS
from benchmarks.measure import TIMED
from benchmarks.models import KEEPS

Row = dict[str, Any]
AXES = {"batch": "images in a batch", "resolution": "pixels (batch 2)", "rank": "rank (batch 4)"}
COUNTED = (
    "FLOPs are those of torch's counter, but for the weight gradient of grouped convolutions, which it takes for that "
    "of dense ones. PEFT and LyCORIS are given every Linear by name; in open_clip they do not reach query, key and "
    "value, which are no Linears there."
)


def markdown(found: dict[str, Any], picture: str) -> str:
    """The page; `picture` is the file of the plots beside it."""
    machine = found["machine"]
    lines = ["# Memory and speed", ""]
    lines += ["Made by `python scripts/benchmark.py`, whose head says what the columns mean.", ""]
    lines += ["; ".join(f"{key} {value}" for key, value in machine.items()) + ".", ""]
    if machine["device"] == "cpu":
        lines += ["**CPU figures.** On a GPU other kernels run, which may keep more or less.", ""]
    rows = found.get("rows", [])
    lines += ["## Goals", "", *table(("", "", "", "at most", "measured", ""), [goal.row(rows) for goal in GOALS]), ""]
    lines += ["## What must be kept", "", "Between forward and backward, beyond what the frozen model keeps.", ""]
    lines += [*table(("", "what, and why"), list(KEEPS.items())), "", COUNTED, ""]
    for title, part in _PARTS.items():
        if shown := found.get(part.__name__.strip("_")):
            lines += [f"## {title}", "", *part(shown), ""]
    if "curves" in found:
        lines += [f"![Memory against batch and resolution, time against rank]({picture})", ""]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["subject"], row["precision"]), []).append(row)
    for (subject, precision), group in groups.items():
        lines += [f"## {subject}, {precision}, batch {group[0]['batch']}", "", *_contenders(group), ""]
    return "\n".join(lines)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = "|" + "|".join(["---", *["---:"] * (len(header) - 1)]) + "|"
    return ["| " + " | ".join(header) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)]


def _contenders(rows: Sequence[Row]) -> list[str]:
    header = ["", "alive after forward, MiB", "of frozen", "GFLOP a step", "of frozen", "step, s", "of frozen"]
    body = []
    for r in rows:
        timed = ["-", "-"]
        if "step_ratio" in r:
            timed = [f"{r['step_seconds']:.3f}", f"{r['step_ratio']:.2f} ± {r['step_spread']:.2f}"]
        flops = [f"{r['gflops']:.1f}", f"{r['flops_ratio']:.3f}"] if "gflops" in r else ["-", "-"]
        body.append([r["contender"], f"{r['live_mib']:.0f}", f"{r['live_ratio']:.3f}", *flops, *timed])
    return table(header, body)


def _largest_batches(rows: Sequence[Row]) -> list[str]:
    budget = (
        f"{rows[0]['budget_mib']:.0f} MiB for parameters, gradients, AdamW's moments and what is alive after forward"
    )
    lines = [f"ViT-S/16, 224 px, fp32; {budget}.", ""]
    body = [[r["contender"], f"{r['image_mib']:.1f}", str(r["batch"]), f"{r['images_per_second']:.2f}"] for r in rows]
    return lines + table(["", "MiB an image", "largest batch", f"images / s at it (or at {TIMED})"], body)


def _merged_latency(rows: Sequence[Row]) -> list[str]:
    body = [[r["contender"], f"{r['ratio']:.3f} ± {r['spread']:.3f}"] for r in rows]
    return table(["ViT-S/16, batch 4, no gradients", "of base"], body)


def _fleets(rows: Sequence[Row]) -> list[str]:
    header = ["adapters", "load, ms each", "MiB each", "switch, ms", "images / s: one for all", "mixed", "one by one"]
    body = [[str(r["adapters"]), f"{r['load_ms']:.0f}", f"{r['mib']:.2f}", f"{r['switch_ms']:.1f}",
             f"{r['uniform']:.1f}", f"{r['mixed']:.1f}", f"{r['single']:.1f}"] for r in rows]  # fmt: skip
    return ["LoRA of rank 8 on query and value of a ViT-S/16, each with its classifier of 100; batch of 8.", "",
            *table(header, body)]  # fmt: skip


def _graphs(rows: Sequence[Row]) -> list[str]:
    return table(["change, in turn", "new graphs"], [[r["change"], str(r["new_graphs"])] for r in rows])


def _compiled(rows: Sequence[Row]) -> list[str]:
    body = [[r["contender"], "torch's default" if r["banned"] else "False", f"{r['live_mib']:.0f}",
             f"{r['live_ratio']:.3f}"] for r in rows]  # fmt: skip
    setting = "torch._functorch.config.ban_recompute_materialized_backward"
    return table(["ViT-S/16, batch 8, fp32", f"`{setting}`", "alive after forward, MiB", "of frozen"], body)


def _curves(rows: Sequence[Row]) -> list[str]:
    """The points behind the picture, a line a contender and a column a value."""
    lines = []
    for axis, label in AXES.items():
        own = [r for r in rows if r["axis"] == axis]
        values = sorted({r["value"] for r in own})
        points = {(r["contender"], r["value"]): _point(r) for r in own}
        body = [[name, *(points.get((name, v), "-") for v in values)] for name in dict.fromkeys(c for c, _ in points)]
        what = "step of frozen" if axis == "rank" else "MiB alive after forward"
        lines += [*table([f"ViT-S/16, fp32; {what}, by {label}", *map(str, values)], body), ""] if own else []
    return lines[:-1]


def _point(row: Row) -> str:
    return f"{row['mib']:.0f}" if "mib" in row else f"{row['ratio']:.2f} ± {row['spread']:.2f}"


_PARTS = {
    "The largest batch that fits": _largest_batches,
    "Merged": _merged_latency,
    "Many adapters on one backbone": _fleets,
    "Graphs of torch.compile": _graphs,
    "What compiled models keep (min-cut partitioner)": _compiled,
    "Against batch, resolution and rank": _curves,
}


def plot(rows: Sequence[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axes = [axis for axis in AXES if any(r["axis"] == axis for r in rows)]
    figure, panels = plt.subplots(1, len(axes), figsize=(4.2 * len(axes), 3.4), layout="constrained", squeeze=False)
    for axis, panel in zip(axes, panels[0], strict=True):
        own = [r for r in rows if r["axis"] == axis]
        for i, name in enumerate(dict.fromkeys(r["contender"] for r in own)):
            points = sorted((r["value"], r.get("mib", r.get("ratio"))) for r in own if r["contender"] == name)
            width = (6, 2, 6, 2, 2)[i % 5] if axis != "rank" else 2  # lines that lie upon one another are both seen
            panel.plot(*zip(*points, strict=True), linewidth=width, label=name)
        panel.set(xlabel=AXES[axis], ylabel="step, times frozen" if axis == "rank" else "MiB alive after forward")
        if axis == "rank":
            panel.set_xscale("log", base=2)
        panel.set_ylim(bottom=0)
        panel.legend(fontsize=7, frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
