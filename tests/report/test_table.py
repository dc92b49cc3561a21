"""The numbers of a table, and what is said of them."""

from __future__ import annotations

import csv
from dataclasses import replace
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
    (line,) = against_probe(results("linear", [0.59, 0.60, 0.61]) + results("lora", accuracies))
    assert verdict in line and "deviation 1.41 over 3 seeds" in line


@pytest.mark.parametrize("only_lora, verdict", [(20, "does not beat"), (30, "beats")])
def test_one_seed_is_judged_on_the_images(only_lora: int, verdict: str) -> None:
    """Of 100 images 10 are right with the probe alone, 20 or 30 with LoRA alone: gains of 0.1 and 0.2.

    Deviations are sqrt(0.3 - 0.1^2) / 10 = 0.0539 and sqrt(0.4 - 0.2^2) / 10 = 0.06.
    """
    probe, lora = (replace(results(method, [accuracy])[0], correct=correct) for method, accuracy, correct in (
        ("linear", 0.1, "1" * 10 + "0" * 90),
        ("lora", only_lora / 100, "0" * 10 + "1" * only_lora + "0" * (90 - only_lora))))
    (line,) = against_probe([probe, lora])
    deviation = {20: 5.39, 30: 6.00}[only_lora]
    assert f"lora {verdict} the linear probe" in line
    assert f"deviation {deviation:.2f} over the 100 test examples" in line


def test_raw_pixels_are_not_compared() -> None:
    raw = [Result("digits", "nano_vit", "raw", 0, 0.9, test_images=10)]
    assert against_probe(results("linear", [0.5]) + raw) == []


def test_files(tmp_path: Path) -> None:
    rows = summarise(results("lora", [0.5, 0.6]))
    write_csv(tmp_path / "t.csv", rows)
    with open(tmp_path / "t.csv") as file:
        (line,) = csv.DictReader(file)
    assert float(line["accuracy"]) == pytest.approx(0.55) and line["adapter_parameters"] == "1234567"
    assert line["best_test_epoch_accuracy"] == ""
    assert len(markdown(rows).splitlines()) == 3 and "| 55.00 |" in markdown(rows)
