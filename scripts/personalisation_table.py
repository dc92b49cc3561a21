"""The table of methods for the bundled text-to-image pipeline: four drawn toys, three seeds each.

    python scripts/personalisation_table.py --out runs/toys --into docs/diffusion.md

As `visionpeft personalise` without arguments, whose rates were chosen on the fifth toy, bee: figures are the means over
the toys, in per cent; their deviation is that over the seeds. Finished cells are skipped, so that the same command goes
on after a kill. The section "Results" of the page given by --into is written anew.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from point_table import put

from visionpeft.data import scenes
from visionpeft.diffusion.families import Family, family_of
from visionpeft.diffusion.loading import load_pipeline
from visionpeft.pipelines import personalisation_demo as demo
from visionpeft.training import runs

TOYS = ("robo", "frog", "imp", "cow")
SEEDS = (0, 1, 2)
HEAD = "| method | rate | parameters | file, bytes | recognised % | obeyed % | others % |"


def kept(folder: Path, compute: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The figures in a folder; computed, put there and told if there are none."""
    file = folder / "figures.json"
    if not file.exists():
        found = compute()
        runs.write_json(file, found)
        print(folder, found, flush=True)
    return dict(runs.read_json(file))


def cell(family: Family, jury: demo.Judges, config: demo.Config) -> dict[str, float]:
    """Figures of one toy, method and seed, from its folder if they are there."""

    def learn() -> dict[str, float]:
        result, figures, _ = demo.learn(family, jury, config)
        found = dict(zip(("recognised", "obeyed", "others"), figures, strict=True))
        return found | {"parameters": result.parameters, "bytes": result.file_bytes}

    return kept(config.folder, learn)


def spread(cells: Sequence[Sequence[dict[str, float]]], key: str) -> str:
    """Mean over toys (inner) and seeds (outer), and the deviation of the seeds' means."""
    means = [100 * statistics.mean(one[key] for one in seed) for seed in cells]
    return f"{statistics.mean(means):.1f}" + (f" ± {statistics.stdev(means):.1f}" if len(means) > 1 else "")


def table(out: str, cache: str) -> str:
    family, jury = family_of(load_pipeline()), demo.judges()
    base = replace(demo.DEMO, cache=cache, kohya=False)
    figures = [demo.measure(family, jury, scenes.CLASS, replace(base, images=f"bundled:{toy}"))[0] for toy in TOYS]
    before = [f"{100 * statistics.mean(column):.1f}" for column in zip(*figures, strict=True)]
    lines = [HEAD, "|---|---:|---:|---:|---:|---:|---:|", f"| before | | | | {' | '.join(before)} |"]
    for method, rate in demo.METHODS.items():
        cells = [[cell(family, jury, replace(base, method=method, lr=rate, seed=seed, images=f"bundled:{toy}",
                                             out=f"{out}/{runs.slug(method)}-{toy}-{seed}"))
                  for toy in TOYS] for seed in SEEDS]  # fmt: skip
        one = cells[0][0]
        shown = " | ".join(spread(cells, key) for key in ("recognised", "obeyed", "others"))
        lines.append(f"| {method} | {rate:g} | {one['parameters']:,} | {one['bytes']:,} | {shown} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/toys", help="folder of the runs")
    parser.add_argument("--cache", default="runs/cache")
    parser.add_argument("--into", type=Path, help="page whose section Results is written")
    given = parser.parse_args()
    text = table(given.out, given.cache)
    print(text)
    if given.into is not None:
        put(given.into, text)


if __name__ == "__main__":
    main()
