"""The numbers of a table, and what is said of them."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from visionpeft.pipelines.settings import Result
from visionpeft.report.table import against_probe, cells, markdown, summarise, write_csv


def results(method: str, accuracies: list[float], images: int = 1000) -> list[Result]:
    return [Result("digits", "nano_vit", method, seed, accuracy, adapter_parameters=1234567, test_images=images,
                   seconds_per_step=0.5 + seed, peak_memory=2**21 * (seed + 1))
            for seed, accuracy in enumerate(accuracies)]


def test_mean_deviation_and_cost() -> None:
    (row,) = summarise(results("lora", [0.5, 0.6, 0.7]))
    assert (row.seeds, row.accuracy, row.deviation) == (3, pytest.approx(0.6), pytest.approx(0.1))
    assert (row.seconds_per_step, row.peak_memory) == (1.5, 3 * 2**21)
    assert cells(row)[2:7] == ["lora", "3", "60.00", "10.00", "1,234,567"]


def test_one_seed_has_no_deviation() -> None:
    (row,) = summarise(results("lora", [0.5]))
    assert row.deviation is None and cells(row)[5] == "-"


@pytest.mark.parametrize("accuracies, verdict", [
    ([0.70, 0.71, 0.72], "lora beats"), ([0.61, 0.62, 0.63], "lora does not beat")])
def test_two_deviations_over_seeds(accuracies: list[float], verdict: str) -> None:
    """Deviations 0.01 each: that of the difference is 0.0141, so 0.028 is not enough and 0.1 is."""
    rows = summarise(results("linear", [0.59, 0.60, 0.61]) + results("lora", accuracies))
    (line,) = against_probe(rows)
    assert verdict in line and "deviation 1.41 over 3 seeds" in line


@pytest.mark.parametrize("accuracy, verdict", [(0.64, "does not beat"), (0.65, "beats")])
def test_two_deviations_of_one_seed_are_binomial(accuracy: float, verdict: str) -> None:
    """sqrt(0.6 * 0.4 / 1000 + p (1 - p) / 1000) is 0.0217 and 0.0216: twice that lies between the two gains."""
    (line,) = against_probe(summarise(results("linear", [0.6]) + results("lora", [accuracy])))
    assert f"lora {verdict} the linear probe" in line and "binomial, 1,000 test images" in line


def test_raw_pixels_are_not_compared() -> None:
    raw = [Result("digits", "nano_vit", "raw", 0, 0.9, test_images=10)]
    assert against_probe(summarise(results("linear", [0.5]) + raw)) == []


def test_files(tmp_path: Path) -> None:
    rows = summarise(results("lora", [0.5, 0.6]))
    write_csv(tmp_path / "t.csv", rows)
    with open(tmp_path / "t.csv") as file:
        (line,) = csv.DictReader(file)
    assert float(line["accuracy"]) == pytest.approx(0.55) and line["adapter_parameters"] == "1234567"
    assert line["best_test_epoch_accuracy"] == ""
    assert len(markdown(rows).splitlines()) == 3 and "| 55.00 |" in markdown(rows)
