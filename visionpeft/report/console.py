"""What a command shows: progress bars, the table at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from visionpeft.report.table import against_probe, shown, summarise


def _console(quiet: bool = False) -> Console:
    console = Console(quiet=quiet, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        # A log is not cut to the width of a terminal that is not there.
        console.width = 160
    return console


class SweepDisplay:
    """A bar for each cell at work, a line for each finished one, and the table."""

    def __init__(self, main: bool = True) -> None:
        self.console = _console(quiet=not main)
        self.bars = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(), console=self.console, transient=True, disable=not main)
        self.tasks: dict[Any, Any] = {}

    def __enter__(self) -> SweepDisplay:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def begin(self, number: int, total: int, config: Any) -> Callable[[int, int, float], None]:
        """A new bar; gives the callback that moves it."""
        name = f"[{number + 1}/{total}] {config.data_name} {config.method} seed {config.seed}"
        task = self.tasks[config] = self.bars.add_task(name.replace("[", r"\["), total=None, loss="")

        def progress(done: int, steps: int, loss: float) -> None:
            self.bars.update(task, completed=done, total=steps, loss=f"loss {loss:.3f}")

        return progress

    def end(self, config: Any, news: Any) -> None:
        """Take the bar away, leave a line."""
        self.bars.remove_task(self.tasks.pop(config))
        name = f"{config.data_name} {config.method} seed {config.seed}"
        if isinstance(news, str):
            self.console.print(f"{name}: failed: {news}", markup=False, style="red")
        else:
            self.console.print(f"{name}: {100 * news.accuracy:.2f} % in {news.seconds:.0f} s", markup=False)

    def summary(self, outcome: Any) -> None:
        """The table, the verdicts, what failed, and where everything is."""
        rows = summarise(outcome.results)
        title, head, body = shown(rows)
        self.console.print(_table(head, body, title))
        lines = against_probe(outcome.results)
        if outcome.skipped:
            lines.append(f"{outcome.skipped} cells had been finished before and were not run again")
        lines += [f"FAILED {cell}: {why}" for cell, why in outcome.failures.items()]
        lines.append(f"report: {outcome.folder / 'report.html'}, table: {outcome.folder / 'results.csv'}")
        for line in lines:
            self.console.print(line, markup=False)


def _table(head: list[str], rows: list[list[str]], title: str = "") -> Table:
    table = Table(title=title or None)
    for index, name in enumerate(head):
        table.add_column(name, justify="left" if index < 3 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def show_predictions(predictions: list[Any], shown: int = 20) -> None:
    """The first predictions as a table."""
    rows = [[p.path, p.label, f"{p.probability:.3f}", ", ".join(f"{name} {chance:.2f}" for name, chance in p.others)]
            for p in predictions[:shown]]
    _console().print(_table(["image", "class", "probability", "next"], rows))
