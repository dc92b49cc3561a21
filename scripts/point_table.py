"""The table of methods for point clouds: 430 pieces of furniture (Sweet Home 3D), 13 classes, three seeds.

    python scripts/point_table.py --data sweethome3d_points.npz --into docs/points.md

For each method the peak learning rate is chosen among two on the validation split of the training data, with the first
seed; the test set is looked at after the last epoch only. Finished cells are skipped, so that the same command goes on
after a kill. The section "Results" of the page given by --into is written anew.
"""

from __future__ import annotations

import argparse
import math
import re
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

METHODS = ("raw", "scratch", "linear", "full", "pointgst", "idpt", "dapt", "ppt:tokens=16", "point_peft",
           "point_peft:memory=200", "lora", "ssf", "bitfit", "ln_tuning", "adaptformer", "houlsby", "pfeiffer", "vpt")
RATES = "lr=1e-3,4e-3"
SEEDS = (0, 1, 2)


def results(data: str, out: str, epochs: int, jobs: int, checkpoint: str | None) -> list[Any]:
    """Every method with every seed; the first seed chooses the rate for the others."""
    from visionpeft.pipelines.points import Sweep, sweep

    shared: dict[str, Any] = {"data": f"npz:{data}", "out": out, "epochs": epochs, "jobs": jobs,
                              "checkpoint": checkpoint}  # fmt: skip
    first = sweep(Sweep(method=METHODS, seeds=SEEDS[:1], grid=(RATES,), **shared), done=told)
    found, failed = list(first.results), dict(first.failures)
    for result in first.results:
        if result.method != "raw":  # which knows no seed
            rate = max(result.selection, key=lambda row: row["val_accuracy"])["lr"]
            more = sweep(Sweep(method=(result.method,), seeds=SEEDS[1:], lr=rate, **shared), done=told)
            found, failed = found + more.results, failed | more.failures
    if failed:
        raise SystemExit("\n".join(f"{cell}: {why}" for cell, why in failed.items()))
    return found


def told(config: Any, what: Any) -> None:
    score = what if isinstance(what, str) else f"{100 * what.accuracy:.2f} % in {what.seconds:.0f} s"
    print(f"{config.method} seed {config.seed}: {score}", flush=True)


def table(found: Sequence[Any]) -> str:
    """Markdown rows: mean and deviation over seeds, what learnt, the chosen rate."""
    from visionpeft.report.table import count, summarise

    lines = ["| method | accuracy % | deviation | adapter parameters | with head | rate |", "|---|---|---|---|---|---|"]
    for row in summarise(found):
        recipe = next(r.recipe for r in found if r.method == row.method)
        deviation = "-" if row.deviation is None else f"{100 * row.deviation:.2f}"
        rate = f"{recipe['lr']:g}" if recipe else "-"
        lines.append(f"| {row.method} | {100 * row.accuracy:.2f} | {deviation} | {count(row.adapter_parameters)} | "
                     f"{count(row.trained_parameters)} | {rate} |")
    return "\n".join(lines)


def verdict(found: Sequence[Any], better: str, worse: str) -> str:
    """Whether one method is better than another by more than two deviations of the difference."""
    a, b = ([r.accuracy for r in found if r.method == name] for name in (better, worse))
    gain, spread = statistics.mean(a) - statistics.mean(b), math.hypot(statistics.stdev(a), statistics.stdev(b))
    says = "is better than" if gain > 2 * spread else "is not better than"
    return (f"- {better} {says} {worse} by more than two deviations ({100 * gain:+.2f} points, deviation "
            f"{100 * spread:.2f} over {len(a)} seeds)")


def put(page: Path, text: str, title: str = "Results") -> None:
    """Write the section `title` anew, or behind all others."""
    old = page.read_text()
    start = re.search(f"^## {re.escape(title)}$", old, re.MULTILINE)
    if start is None:
        page.write_text(f"{old.rstrip()}\n\n## {title}\n\n{text}\n")
        return
    end = re.search(r"^## ", old[start.end():], re.MULTILINE)
    rest = old[start.end() + end.start():] if end else ""
    page.write_text(f"{old[: start.end()]}\n\n{text}\n" + (f"\n{rest}" if rest else ""))


def section(found: Sequence[Any], epochs: int) -> str:
    pairs = (("full", "scratch"), ("pointgst", "scratch"), ("pointgst", "linear"), ("full", "linear"))
    tests = found[0].test_images
    return "\n\n".join([
        f"430 pieces of furniture (Sweet Home 3D), 13 classes, its split: {tests} to test. The nano Point-MAE, "
        f"{epochs} epochs of 32 clouds for every method, last epoch, mean and sample deviation over three seeds (one "
        "cloud more or less is "
        f"{100 / tests:.2f} points). The rate is the better of {RATES.removeprefix('lr=')} on a fifth of the training "
        "clouds, with the first seed. `raw` is logistic regression on 48 features by hand, `scratch` the same network "
        "from random weights.",
        f"    {shlex.join(['python', *sys.argv])}", table(found),
        "\n".join(verdict(found, *pair) for pair in pairs)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="sweethome3d_points.npz")
    parser.add_argument("--into", required=True, help="page whose section Results is written anew")
    parser.add_argument("--out", default="runs/point_table")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time")
    parser.add_argument("--checkpoint", help="other weights than the bundled ones")
    args = parser.parse_args()
    found = results(args.data, args.out, args.epochs, args.jobs, args.checkpoint)
    put(Path(args.into), section(found, args.epochs))
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
