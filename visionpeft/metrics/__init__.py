"""Accuracy, and the benchmark averages built on it."""

from __future__ import annotations

from visionpeft.metrics.accuracy import Accuracy, MeanAveragePrecision, metric_for
from visionpeft.metrics.averages import ppt, vtab_means

__all__ = ["Accuracy", "MeanAveragePrecision", "metric_for", "ppt", "vtab_means"]
