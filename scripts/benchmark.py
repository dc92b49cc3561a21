"""Memory and time of adapters against the frozen model, full fine-tuning and PEFT.

    python scripts/benchmark.py                               # everything; writes docs/benchmarks.{md,json,png}
    python scripts/benchmark.py --parts rows --subjects vit_s --steps 10
    python scripts/benchmark.py --check                       # deterministic goals only, on small models; no timing

Bytes are those alive after the forward pass, counted by the allocator (`visionpeft.memory.live_bytes`), and FLOPs
those of torch's counter: both are the same on every run. Times are CPU seconds of this process for forward and backward
on one thread (wall seconds on an accelerator): contenders take turns, step by step, and the figure is the median over
the rounds of the ratio to the frozen model in the same round. "Frozen" lets the gradient through to the input, as
adapters near it need. Runs of parts go into the same files; what was measured before stays beside.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
from benchmarks import goals, measure, page
from benchmarks.models import CONTENDERS, SUBJECTS
from benchmarks.program import DOCS, device, known, machine

PRECISIONS = ["fp32", "bf16", "bf16-model"]  # the second by autocast, the third with weights of bf16
FLEETS = (1, 10, 100)
PARTS = ("rows", "largest_batches", "merged_latency", "fleets", "graphs", "compiled", "curves")


def write(found: dict[str, Any], out: Path) -> None:
    out.write_text(page.markdown(found, out.with_suffix(".png").name), encoding="utf-8")
    out.with_suffix(".json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    if found.get("curves"):
        page.plot(found["curves"], out.with_suffix(".png"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--subjects", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS[:2], choices=PRECISIONS)
    parser.add_argument("--steps", type=int, default=7, help="timed rounds; 0 measures bytes and FLOPs only")
    parser.add_argument("--budget", type=float, default=1024, help="MiB for the largest batch")
    parser.add_argument("--device", default=device())
    parser.add_argument("--out", type=Path, default=DOCS / "benchmarks.md")
    parser.add_argument("--check", action="store_true", help="deterministic goals on small models, then exit")
    given = parser.parse_args()
    if given.device == "cpu":
        torch.set_num_threads(1)
    if given.check:
        return goals.check()
    found = known(given.out, machine(given.device))
    single = {
        "largest_batches": lambda: measure.largest_batches(given.budget, given.steps, given.device),
        "merged_latency": lambda: measure.merged_latency(3 * given.steps, given.device),
        "fleets": lambda: measure.fleets(FLEETS, given.steps, given.device),
        "graphs": measure.graphs,
        "compiled": lambda: measure.compiled(given.device),
        "curves": lambda: measure.curves(given.steps, given.device),
    }
    for part in given.parts:
        if part == "rows":
            rows(given, found)
        else:
            found[part] = single[part]()
        write(found, given.out)
    return 0


def place(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["subject"], row["precision"], row["contender"]


def rows(given: argparse.Namespace, found: dict[str, Any]) -> None:
    """Every subject in every precision, each written as soon as it is measured, in the place of what was there."""
    names = ["frozen", *(c for c in given.contenders if c != "frozen")]
    titles = [subject.title for subject in SUBJECTS.values()]
    order = {where: i for i, where in enumerate(product(titles, PRECISIONS, CONTENDERS))}
    for key in given.subjects:
        for precision in given.precisions:
            new = measure.rows(SUBJECTS[key], names, precision, given.steps, given.device)
            old = {place(r): r for r in found.get("rows", ())}
            merged = {place(r): old.get(place(r), {}) | r for r in new}  # times stay where none were taken now
            found["rows"] = list((old | merged).values())
            found["rows"].sort(key=lambda r: order[place(r)])
            write(found, given.out)


if __name__ == "__main__":
    sys.exit(main())
