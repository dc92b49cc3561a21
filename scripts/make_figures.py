"""Draw the picture of the README from a finished sweep.

    OMP_NUM_THREADS=1 visionpeft classify --precision bf16 --seeds 0 1 2 --out runs/demo3
    python scripts/make_figures.py runs/demo3/results.csv assets/demo.png
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BELOW = ("ssf", "full")  # labels under their points, so that neighbours and the line stay legible
LABELS = {"linear": "linear probe", "ssf": "SSF", "lora": "LoRA", "full": "full fine-tuning", "scratch": "from scratch"}


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """Accuracy with one deviation against the number of scalars that learn, classifier included."""
    figure, axes = plt.subplots(figsize=(7, 3.6), dpi=150)
    for row in (r for r in rows if r["trained_parameters"]):
        x, y = int(row["trained_parameters"]), 100 * float(row["accuracy"])
        error = 100 * float(row["deviation"]) if row["deviation"] else None
        colour = "tab:grey" if row["method"] in ("linear", "full", "scratch") else "tab:blue"
        axes.errorbar(x, y, yerr=error, fmt="o", color=colour, capsize=3)
        shift, side = ((-6, -14), "right") if row["method"] in BELOW else ((8, -14), "left")
        label = LABELS.get(row["method"], row["method"])
        axes.annotate(label, (x, y), shift, textcoords="offset points", ha=side)
    for row in (r for r in rows if r["method"] == "raw"):
        y = 100 * float(row["accuracy"])
        axes.axhline(y, color="tab:grey", lw=1, ls=":")
        axes.annotate("logistic regression on pixels", (0.01, y), (0, 4), xycoords=("axes fraction", "data"),
                      textcoords="offset points", color="tab:grey")  # fmt: skip
    axes.set(xscale="log", xlabel="trained parameters, with classifier", ylabel="test accuracy, %")
    axes.set_title("A small ViT, pre-trained on CIFAR-10, learns Fashion-MNIST from 1,000 images", fontsize=10)
    axes.margins(0.22)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    source, target = sys.argv[1:]
    with open(source, newline="", encoding="utf-8") as file:
        draw(list(csv.DictReader(file)), Path(target))
