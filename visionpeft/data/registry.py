"""From a spec such as "vtab:cifar" or "folder:birds?train=1000" to Splits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from visionpeft.data.sets import Splits
from visionpeft.data.splitting import subset
from visionpeft.errors import DataError

KINDS = ("bundled", "vtab", "fgvc", "fewshot", "folder", "csv", "torchvision", "npz", "fashion-mnist", "digits")
ROOTED = ("vtab", "fgvc", "fewshot", "torchvision")  # what follows the colon is a name below `root`
PATHS = ("folder", "csv", "npz")  # what follows the colon is a path
FAMILIES = ("vtab", "fgvc", "fewshot")


def load(spec: str, *, root: str | None = None, seed: int = 0, shots: int | None = None) -> Splits:
    """Load a data set.

    `spec` is "bundled", "vtab:<task>", "fgvc:<set>", "fewshot:<set>", "folder:<path>", "csv:<path>",
    "torchvision:<Class>", "npz:<path>", "fashion-mnist" or "digits". An ending such as "?train=1000&test=2000&seed=0"
    draws a fixed class-balanced subset (train 1000 is 800 train and 200 val); what it does not name stays whole.
    `root` is the folder that holds the data sets; `shots` (with `seed`) chooses a few-shot list; `seed` otherwise
    draws the validation hold-out where the data have none.

    Raises:
        DataError: unknown spec, an argument that this kind does not use, or data that are missing or malformed.
    """
    kind, name, options = _parse(spec)
    if shots is not None and kind != "fewshot":
        raise DataError(f"shots={shots} has no meaning for {spec!r}: only 'fewshot:<set>' takes it")
    if root is None and kind in ROOTED:
        raise DataError(f"{spec!r} needs root=, the folder that holds the {kind} data")
    if root is not None and kind in ("bundled", "digits"):
        raise DataError(f"root={root!r} has no meaning for {spec!r}, which comes with its package")
    splits = _load(kind, name, root, seed, shots)
    if not options:
        return splits
    return subset(splits, options.get("train"), options.get("test"), options.get("seed", 0))


def expand(spec: str, tasks: str | Sequence[str] = "all") -> list[str]:
    """The specs of a family: "vtab" gives its 19 tasks, "fgvc" and "fewshot" their five sets; others themselves.

    `tasks` names some of them. A subset ending is kept on each.

    Raises:
        DataError: an unknown task, or tasks of something that has none.
    """
    base, mark, ending = spec.partition("?")
    if base not in FAMILIES:
        _parse(spec)
        if tasks != "all":
            raise DataError(f"{spec!r} has no tasks to choose from; tasks= goes with {', '.join(FAMILIES)}")
        return [spec]
    chosen = members(base) if tasks == "all" else [_member(base, task) for task in _listed(tasks)]
    return [f"{base}:{task}{mark}{ending}" for task in chosen]


def members(family: str) -> list[str]:
    """Names of the tasks of "vtab", "fgvc" or "fewshot", in the order of the tables."""
    from visionpeft.data import fewshot, fgvc, vtab

    tables: dict[str, Iterable[str]] = {"vtab": vtab.TASKS, "fgvc": fgvc.SETS, "fewshot": fewshot.SETS}
    return list(tables[family])


def _load(kind: str, name: str, root: str | None, seed: int, shots: int | None) -> Splits:
    from visionpeft.data import arrays, csv, fewshot, fgvc, folder, torchvision_sets, vtab

    path = Path(root or "", Path(name).expanduser())
    where = root or ""
    loaders = {
        "bundled": lambda: arrays.load_bundled(seed),
        "vtab": lambda: vtab.load_vtab(_member("vtab", name), where),
        "fgvc": lambda: fgvc.load_fgvc(_member("fgvc", name), where, seed),
        "fewshot": lambda: fewshot.load_fewshot(_member("fewshot", name), where, shots, seed),
        "folder": lambda: folder.load_folder(path, seed),
        "csv": lambda: csv.load_csv(path, seed),
        "torchvision": lambda: torchvision_sets.load_torchvision(name, where, seed),
        "npz": lambda: arrays.load_npz(path, seed),
        "fashion-mnist": lambda: arrays.load_fashion_mnist(root, seed),
        "digits": lambda: arrays.load_digits(seed),
    }
    return loaders[kind]()


def _parse(spec: str) -> tuple[str, str, dict[str, int]]:
    base, options = subset_options(spec)
    kind, _, name = base.partition(":")
    if kind not in KINDS:
        raise DataError(f"unknown data {spec!r}: use one of {', '.join(KINDS)}")
    if bool(name) != (kind in ROOTED + PATHS):
        example = "name" if kind in ROOTED else "path"
        raise DataError(f"{spec!r}: write {kind}:<{example}>" if not name else f"{spec!r}: {kind} takes no name")
    return kind, name, options


def subset_options(spec: str) -> tuple[str, dict[str, int]]:
    """A spec without its ending, and what the ending "?train=1000&test=2000&seed=0" says."""
    base, mark, ending = spec.rpartition("?")
    if not mark:
        return spec, {}
    pairs = [re.fullmatch(r"(train|test|seed)=(\d+)", part) for part in ending.split("&")]
    if None in pairs:
        raise DataError(f"{spec!r}: the ending must be like ?train=1000&test=2000&seed=0")
    options = {pair[1]: int(pair[2]) for pair in pairs if pair}
    if not {"train", "test"} & set(options):
        raise DataError(f"{spec!r}: a subset needs train= or test=")
    return base, options


def _member(family: str, task: str) -> str:
    from visionpeft.data.vtab import ALIASES

    task = ALIASES.get(task, task) if family == "vtab" else task
    if task not in members(family):
        raise DataError(f"unknown {family} task {task!r}: one of {', '.join(members(family))}")
    return task


def _listed(tasks: str | Sequence[str]) -> list[str]:
    return tasks.replace(",", " ").split() if isinstance(tasks, str) else list(tasks)
