"""A table of few-shot methods over seeds: accuracy on the tuned set, and on other sets before and after.

    python scripts/evaluate_few_shot.py --methods clip_lora coop gda --seeds 1 2 3 --shots 16 --others npz:cifar.npz

Every cell is a run of `visionpeft few-shot` with its folder below `--out`; finished ones are read, not done again, and
features of the model alone are computed once. With `--base-to-new` the harmonic mean is that of the two accuracies
averaged over the seeds, as published tables have it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from visionpeft.clip.data import harmonic
from visionpeft.clip.features import FeatureCache
from visionpeft.errors import VisionPEFTError
from visionpeft.pipelines.few_shot import Config, Result, run
from visionpeft.pipelines.fitting import HEADS
from visionpeft.training import runs


def config(args: argparse.Namespace, method: str, seed: int) -> Config:
    """`--iterations` and `--lr` are for adapters, `--prompt-updates` for ivlp and promptsrc; heads take neither."""
    out = str(Path(args.out) / runs.slug(f"{method}-{args.shots}shots-seed{seed}"))
    given = {"iterations": args.iterations, "lr": args.lr} if method not in HEADS else {}
    if method in ("ivlp", "promptsrc") and args.prompt_updates is not None:
        given = {"iterations": args.prompt_updates}
    return Config(args.model, args.checkpoint, args.data, args.root, method, args.shots, seed, out=out,
                  others=tuple(args.others), base_to_new=args.base_to_new, **given)  # fmt: skip


def cell(values: list[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.2f}{spread}"


def line(method: str, found: list[Result], first: bool) -> str:
    """One row; `first` is that of the model alone."""
    which = [r.before if first else r.after for r in found]
    names = list(found[0].before)
    cells = [cell([scores[name]["top1"] for scores in which]) for name in names]
    if found[0].harmonic is not None:
        base, new = (statistics.mean(scores[half]["top1"] for scores in which) for half in ("base", "new"))
        cells.append(f"{100 * harmonic(base, new):.2f}")
    parameters = "0" if first else f"{found[0].parameters:,}"
    seconds = "-" if first else f"{statistics.median(r.seconds for r in found):.0f}"
    return f"| {method} | " + " | ".join(cells) + f" | {parameters} | {seconds} |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--model", default="nano_clip")
    parser.add_argument("--checkpoint")
    parser.add_argument("--data", default="bundled")
    parser.add_argument("--root")
    parser.add_argument("--others", nargs="*", default=[])
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--base-to-new", action="store_true")
    parser.add_argument("--iterations", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--prompt-updates", type=int)
    parser.add_argument("--out", default="runs/few_shot_table")
    args = parser.parse_args(arguments)
    found: dict[str, list[Result]] = {method: [] for method in args.methods}
    cache = FeatureCache(Path(args.out) / "features")
    try:
        for seed in args.seeds:
            for method in args.methods:
                result = run(config(args, method, seed), cache=cache)
                found[method].append(result)
                first = next(iter(result.after.values()))
                print(f"{method} seed {seed}: {100 * first['top1']:.2f} %", file=sys.stderr, flush=True)
    except VisionPEFTError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(table(found)))
    return 0


def table(found: dict[str, list[Result]]) -> list[str]:
    """Markdown, the model alone in the first row."""
    alone = next(iter(found.values()))
    columns = [f"{name}, %" for name in alone[0].before]
    columns += ["harmonic mean"] if alone[0].harmonic is not None else []
    head = ["| method | " + " | ".join(columns) + " | scalars | s |", "|---|" + "---:|" * (len(columns) + 2)]
    return [*head, line("zero-shot", alone, True), *(line(method, r, False) for method, r in found.items())]


if __name__ == "__main__":
    sys.exit(main())
