"""Means and PPT recomputed from the published accuracies per task (V-PETL Bench's and Convpass's tables)."""

import pytest

from visionpeft.data.vtab import TASKS
from visionpeft.errors import DataError
from visionpeft.metrics import ppt, vtab_means

# 19 accuracies in percent | natural, specialised, structured, mean of groups, mean of 19 | millions, PPT
TABLE = """
Full_fine-tuning 68.9 87.7 64.3 97.2 86.9 87.4 38.8 79.7 95.7 84.2 73.9 56.3 58.6 41.7 65.5 57.5 46.7 25.7 29.1
    | 75.89 83.38 47.64 68.97 65.57 | 85.8 0.246
Linear_probing   63.4 85 63.2 97 86.3 36.6 51 78.5 87.5 68.6 74 34.3 30.6 33.2 55.4 12.5 20 9.6 19.2
    | 68.93 77.15 26.85 57.64 52.94 | 0 0.529
Adapter          69.2 90.1 68 98.8 89.9 82.8 54.3 84 94.9 81.9 75.5 80.9 65.3 48.6 78.3 74.8 48.5 29.9 41.6
    | 79.01 84.08 58.49 73.86 71.44 | 0.16 0.709
VPT-Shallow      77.7 86.9 62.6 97.5 87.3 74.5 51.2 78.2 92 75.6 72.9 50.5 58.6 40.5 67.1 68.7 36.1 20.2 34.1
    | 76.81 79.67 46.98 67.82 64.85 | 0.08 0.646
VPT-Deep         78.8 90.8 65.8 98 88.3 78.1 49.6 81.8 96.1 83.4 68.4 68.5 60 46.5 72.8 73.6 47.9 32.9 37.8
    | 78.49 82.42 55.00 71.97 69.43 | 0.56 0.678
BitFit           72.8 87 59.2 97.5 85.3 59.9 51.4 78.7 91.6 72.9 69.8 61.5 55.6 32.4 55.9 66.6 40 15.7 25.1
    | 73.30 78.25 44.10 65.22 62.05 | 0.10 0.618
LoRA             67.1 91.4 69.4 98.8 90.4 85.3 54 84.9 95.3 84.4 73.6 82.9 69.2 49.8 78.5 75.7 47.1 31 44
    | 79.49 84.55 59.78 74.60 72.25 | 0.29 0.714
AdaptFormer      70.8 91.2 70.5 99.1 90.9 86.6 54.8 83 95.8 84.4 76.3 81.9 64.3 49.3 80.3 76.3 45.7 31.7 41.1
    | 80.56 84.88 58.83 74.75 72.32 | 0.16 0.718
SSF              69 92.6 75.1 99.4 91.8 90.2 52.9 87.4 95.9 87.4 75.5 75.9 62.3 53.3 80.6 77.3 54.9 29.5 37.9
    | 81.57 86.55 58.96 75.69 73.10 | 0.21 0.724
NOAH             69.6 92.7 70.2 99.1 90.4 86.1 53.7 84.4 95.4 83.9 75.8 82.8 68.9 49.9 81.7 81.8 48.3 32.8 44.2
    | 80.26 84.88 61.30 75.48 73.25 | 0.43 0.719
SCT              75.3 91.6 72.2 99.2 91.1 91.2 55 85 96.1 86.3 76.2 81.5 65.1 51.7 80.2 75.4 46.2 33.2 45.7
    | 82.23 85.90 59.87 76.00 73.59 | 0.11 0.732
FacT             70.6 90.6 70.8 99.1 90.7 88.6 54.1 84.8 96.2 84.5 75.7 82.6 68.2 49.8 80.7 80.8 47.4 33.2 43
    | 80.64 85.30 60.71 75.55 73.23 | 0.07 0.730
RepAdapter       72.4 91.6 71 99.2 91.4 90.7 55.1 85.3 95.9 84.6 75.9 82.3 68 50.4 79.9 80.4 49.2 38.6 41
    | 81.63 85.42 61.23 76.09 73.84 | 0.22 0.731
Hydra            72.7 91.3 72 99.2 91.4 90.7 55.5 85.8 96 86.1 75.9 83.2 68.2 50.9 82.3 80.3 50.8 34.5 43.1
    | 81.83 85.95 61.66 76.48 74.21 | 0.28 0.733
LST              59.5 91.5 69 99.2 89.9 79.5 54.6 86.9 95.9 85.3 74.1 81.8 61.8 52.2 81 71.7 49.5 33.7 45.2
    | 77.60 85.55 59.61 74.25 71.70 | 2.38 0.654
DTL              69.6 94.8 71.3 99.3 91.3 83.3 56.2 87.1 96.2 86.1 75 82.8 64.2 48.8 81.9 93.9 53.9 34.2 47.1
    | 80.83 86.10 63.35 76.76 74.58 | 0.04 0.744
HST              76.7 94.1 74.8 99.6 91.1 91.2 52.3 87.1 96.3 88.6 76.5 85.4 63.7 52.9 81.7 87.2 56.8 35.8 52.1
    | 82.83 87.12 64.45 78.13 75.99 | 0.78 0.736
GPS              81.1 94.2 75.8 99.4 91.7 91.6 52.4 87.9 96.2 86.5 76.5 79.9 62.6 55 82.4 84 55.4 29.7 46.1
    | 83.74 86.78 61.89 77.47 75.18 | 0.22 0.745
LAST             66.7 93.4 76.1 99.6 89.8 86.1 54.3 86.2 96.3 86.8 75.4 81.9 65.9 49.4 82.6 87.9 46.7 32.3 51.5
    | 80.86 86.18 62.28 76.44 74.15 | 0.66 0.721
SNF              84 94 72.7 99.3 91.3 90.3 54.9 87.2 97.3 85.5 74.5 82.3 63.8 49.8 82.5 75.8 49.2 31.4 42.1
    | 83.79 86.12 59.61 76.51 74.10 | 0.25 0.733
Convpass 72.29 91.16 72.18 99.15 90.9 91.26 54.87 84.19 96.13 85.32 75.6 82.26 67.86 51.31 80.03 85.94 53.13 36.43 44.44
    | 81.69 85.31 62.68 76.56 74.44 | - -
Cp-attn 71.84 90.62 71.97 99.06 90.98 89.93 54.25 85.17 95.57 83.43 74.76 79.86 66.97 50.31 79.89 84.27 53.2 34.81 42.95
    | 81.24 84.73 61.53 75.83 73.68 | - -
"""
ROWS = {line.split()[0]: [part.split() for part in line.split(maxsplit=1)[1].split("|")]
        for line in TABLE.replace("\n    |", " |").strip().splitlines()}  # fmt: skip


@pytest.mark.parametrize("method", ROWS)
def test_both_means_and_ppt(method):
    accuracies, means, (millions, score) = ROWS[method]
    found = vtab_means(dict(zip(TASKS, map(float, accuracies), strict=True)))
    assert list(found) == ["natural", "specialised", "structured", "mean_of_groups", "mean_of_19"]
    assert list(found.values()) == pytest.approx([float(m) for m in means], abs=0.0051)
    if score != "-":
        assert ppt(found["mean_of_19"] / 100, float(millions) * 1e6) == pytest.approx(float(score), abs=0.00051)


def test_the_table_is_whole():
    assert len(ROWS) == 22 and sum(row[2][1] != "-" for row in ROWS.values()) == 20


def test_printed_ppt():
    printed = {"LoRA": 0.71, "SSF": 0.72, "FacT": 0.73, "DTL": 0.75, "LST": 0.65}
    for method, score in printed.items():
        _, means, (millions, _) = ROWS[method]
        assert ppt(float(means[4]) / 100, float(millions) * 1e6) == pytest.approx(score, abs=0.01)


def test_means_need_all_tasks_by_name():
    scores = {f"vtab:{task}": 0.5 for task in TASKS}
    assert vtab_means(scores)["mean_of_19"] == 0.5
    del scores["vtab:dtd"]
    with pytest.raises(DataError, match=r"missing \['dtd'\]"):
        vtab_means({**scores, "food": 1.0})


def test_ppt_refuses_percent():
    with pytest.raises(DataError, match="fraction"):
        ppt(72.3, 1e5)
    assert ppt(0.5, 0) == 0.5
