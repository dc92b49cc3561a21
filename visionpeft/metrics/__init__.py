"""Accuracy and mean IoU, and the benchmark averages built on accuracy."""

from __future__ import annotations

from visionpeft.metrics.accuracy import Accuracy, MeanAveragePrecision, metric_for
from visionpeft.metrics.averages import ppt, vtab_means
from visionpeft.metrics.iou import MeanIoU

__all__ = ["Accuracy", "MeanAveragePrecision", "MeanIoU", "metric_for", "ppt", "vtab_means"]
