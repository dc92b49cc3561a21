"""Print finished runs of any job as Markdown tables, method by seed, as docs/results.md shows them.

    python scripts/results_table.py runs/cifar runs/fashion

One table for each data set, model and score. Scores in per cent; "-" is not run. The deviation is that of a sample,
over the seeds that there are. Folders are searched for result.json; those of grid points are left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIRST, LAST = ("raw", "scratch", "linear"), ("full",)


@dataclass(frozen=True)
class Score:
    """One score of one run; sizes are None where nothing learnt."""

    table: tuple[str, str, str]
    """Data, model, and what the score is."""
    method: str
    seed: int
    value: float
    sizes: tuple[int | None, int | None, int | None]
    """Scalars of the adapter, all that learnt, bytes of the file."""


def scores(folders: Sequence[Path]) -> Iterator[Score]:
    """All scores of the finished runs below some folders.

    Raises:
        SystemExit: there is none below one of them.
    """
    for folder in folders:
        files = [f for f in sorted(folder.rglob("result.json")) if f.parent.parent.name != "grid"]
        if not files:
            raise SystemExit(f"{folder}: no finished run here (no result.json)")
        for file in files:
            yield from _of_run(file.parent, json.loads(file.read_text()))


def _of_run(folder: Path, result: dict[str, Any]) -> Iterator[Score]:
    config = json.loads((folder / "config.json").read_text())
    method, seed, model = str(config.get("method", "-")), int(config.get("seed", 0)), str(config.get("model", "-"))
    data = str(result.get("data", config.get("data", "-")))
    if "accuracy" in result:
        sizes = (result["adapter_parameters"], result["trained_parameters"], result["file_bytes"])
        yield Score((data, model, result.get("measure", "accuracy")), method, seed, result["accuracy"], sizes)
        return
    file = folder / "adapter.safetensors"
    sizes = (result.get("parameters"), result.get("parameters"), file.stat().st_size if file.is_file() else None)
    for name, value in result.get("after", {}).items():  # jobs of CLIP: scores by test set, or one number each
        for kind, number in value.items() if isinstance(value, dict) else [("", value)]:
            yield Score((data, model, f"{name} {kind}".strip()), method, seed, number, sizes)


def table(found: Sequence[Score]) -> str:
    """Markdown of the scores of one table."""
    seeds = sorted({score.seed for score in found})
    head = ["method", *(f"seed {seed}" for seed in seeds), "mean", "deviation", "adapter parameters", "with head",
            "file bytes"]
    methods = sorted({s.method for s in found}, key=_place)
    rows = [_row(method, [s for s in found if s.method == method], seeds) for method in methods]
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rule, *rows))


def _place(method: str) -> tuple[int, str]:
    name = method.partition(":")[0]
    return (FIRST.index(name) if name in FIRST else len(FIRST) + (name in LAST), method)


def _row(method: str, found: Sequence[Score], seeds: Sequence[int]) -> list[str]:
    by_seed = {s.seed: 100 * s.value for s in found}
    if len(by_seed) < len(found):
        raise SystemExit(f"{method}: two runs of the same seed: give their folders one at a time")
    values = list(by_seed.values())
    spread = f"{statistics.stdev(values):.2f}" if len(values) > 1 else "-"
    return [method, *(f"{by_seed[seed]:.2f}" if seed in by_seed else "-" for seed in seeds),
            f"{statistics.mean(values):.2f}", spread, *("-" if n is None else f"{n:,}" for n in found[0].sizes)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    found = list(scores(parser.parse_args(arguments).folders))
    for key in dict.fromkeys(score.table for score in found):
        print("{}, {}, {} %\n\n{}".format(*key, table([s for s in found if s.table == key])))


if __name__ == "__main__":
    main()
