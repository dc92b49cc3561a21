"""Commands of CLIP jobs, which `visionpeft.cli` takes in."""

from __future__ import annotations

from typing import Any

from visionpeft.pipelines.zero_shot import Config as ZeroShot

_ZERO_SHOT = ZeroShot()


def register(app: Any) -> None:
    """Enter the commands into a tyro app."""
    app.command(_zero_shot, name="zero-shot")


def _zero_shot(config: ZeroShot = _ZERO_SHOT) -> int:
    """Evaluate a CLIP model without training, alone and with an adapter.

    With an adapter: scores before and after on every set, and accuracy over the adapter's scale from 0 to 1.
    """
    from visionpeft.pipelines.zero_shot import run
    from visionpeft.report.console import _console, _table
    from visionpeft.report.zero_shot import curve_rows, rows

    console = _console()
    result = run(config, lambda line: console.print(line, markup=False, style="dim"))
    head, body = rows(result)
    console.print(_table(head, body, f"{result.model}, {result.templates} templates"))
    if result.curve:
        console.print(_table(*curve_rows(result), "over the adapter's scale"))
    console.print(f"report: {result.folder}/report.html", markup=False)
    return 0
