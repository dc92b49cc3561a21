"""The report of a sweep shows what there is and says what failed."""

from __future__ import annotations

from pathlib import Path

import pytest

from visionpeft.pipelines.classification import Outcome, vtab_table
from visionpeft.pipelines.settings import Result
from visionpeft.report.cells import sweep_report
from visionpeft.report.table import summarise

pytest.importorskip("matplotlib")


def result(tmp_path: Path, method: str, data: str = "digits", accuracy: float = 0.5) -> Result:
    folder = tmp_path / method
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text('{"epoch": 1, "train_loss": 2.0}\n{"epoch": 2, "train_loss": 1.0}\n')
    return Result(data, "nano_vit", method, 0, accuracy, adapter_parameters=100, test_images=10, folder=str(folder),
                  classes=["one", "two"], confusion=[[3, 2], [1, 4]])


def test_a_sweep_with_a_failure(tmp_path: Path) -> None:
    outcome = Outcome([result(tmp_path, "linear"), result(tmp_path, "ssf")], {"digits full seed 0": "out of <memory>"})
    html = sweep_report(outcome, summarise(outcome.results))
    assert html.count("<svg") == 3 and "ssf against the linear probe: +0.00 points, one seed" in html
    assert "out of &lt;memory&gt;" in html and "training loss" in html and "one" in html


def test_both_vtab_means_need_all_tasks(tmp_path: Path) -> None:
    from visionpeft.data.vtab import TASKS

    all_tasks = [result(tmp_path, "ssf", f"vtab:{task}", 0.5 + 0.25 * (group.group == "natural"))
                 for task, group in TASKS.items()]
    head, row = vtab_table(summarise(all_tasks))
    assert dict(zip(head, row, strict=True)) == {
        "method": "ssf", "natural %": "75.00", "specialised %": "50.00", "structured %": "50.00",
        "mean of groups %": "58.33", "mean of 19 %": f"{50 + 25 * 7 / 19:.2f}", "PPT of the mean of 19": "0.592"}
    assert vtab_table(summarise(all_tasks[:18])) == []
