"""Segmentation: a class for every pixel, from images and masks to a run folder, and sweeps over methods and seeds.

    result = run(Config(data="folder:camvid", model="vit_small_patch14_dinov2", method="lora", decoder="fpn"))
    outcome = sweep(Sweep(method=("linear", "lora"), seeds=(0, 1, 2)))

The adapter acts in the encoder; the decoder learns whole, as the classifier does in classification. Training sees
crops, evaluation whole images or overlapping windows. The main score is mIoU on the test set after the last epoch. The
run folder and all that happens around a cell are those of visionpeft.pipelines.running.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from visionpeft import data
from visionpeft.data.mask_transforms import together
from visionpeft.data.masks import PairArrays, pixel_counts
from visionpeft.data.segmentation import load_segmentation
from visionpeft.data.weights import weights_of_counts
from visionpeft.errors import DataError
from visionpeft.metrics.iou import scores_of
from visionpeft.models.segmentation import Segmenter, find_fixed, segmenter
from visionpeft.pipelines.backbone import Backbone, build
from visionpeft.pipelines.baselines import colour_table
from visionpeft.pipelines.cell import MOST_CLASSES, BaseCell
from visionpeft.pipelines.methods import method_name
from visionpeft.pipelines.recipes import HEAD_RATES, LEARNING_RATES, OTHERWISE, Plan, override
from visionpeft.pipelines.running import Job, Outcome, cells, run, sweep
from visionpeft.pipelines.segmentation_settings import Config, Settings, Sweep
from visionpeft.pipelines.settings import Result
from visionpeft.report.segmentation import Sample, masks_shown
from visionpeft.training import Feed, Recipe, make_feed
from visionpeft.training.dense import DenseLoss, Windows, score_masks
from visionpeft.training.recipe import Criterion

__all__ = ["JOB", "Config", "Outcome", "Result", "Settings", "Sweep", "cells", "make_model", "run", "sweep"]

SAMPLES = 8
"""Test images in a report."""


BUNDLED = {"linear": 3e-2, "full": 5e-4, "scratch": 1e-3, "ssf": 1e-2, "lora": 5e-3, "adaptformer": 5e-3}
"""Peak learning rates for the bundled model and data, which have half a minute a row."""


def plan_for(config: Config) -> Plan:
    """AdamW with cosine, cross-entropy and Dice; what the user named goes over it."""
    method = method_name(config.method)
    lr = OTHERWISE if method == "linear" and config.decoder != "linear" else LEARNING_RATES.get(method, OTHERWISE)
    recipe = Recipe(lr=lr, head_lr=HEAD_RATES.get(method, 1.0), epochs=30, batch_size=8, warmup_epochs=2, min_lr=0.0,
                    weight_decay=0.05 if method in ("full", "scratch") else 1e-4, schedule="update", decay_1d=False,
                    augment="scale", dice=1.0)
    if config.data == "bundled":
        recipe = replace(recipe, lr=BUNDLED.get(method, lr), head_lr=1.0, epochs=20, batch_size=16, warmup_epochs=1,
                         augment="flip")
    given = config.given_recipe()
    if given.get("augment") == "none":
        given["augment"] = None
    return Plan(override(recipe, given), {}, config.protocol or "checkpoint")


def make_model(backbone: Backbone, classes: int, decoder: str, channels: int, *, pretrained: bool = True,
               drop_path: float = 0.0, seed: int = 0) -> Segmenter:
    """The backbone that a run names, with its decoder, all random draws from `seed`."""
    encoder = build(backbone, 0, pretrained=pretrained, drop_path=drop_path, seed=seed, any_size=True)
    return segmenter(encoder, classes, decoder, channels)


@lru_cache(maxsize=4)
def _splits(spec: str, root: str | None, values: tuple[int, ...], ignore: int | None) -> data.Splits:
    splits = load_segmentation(spec, root=root, mask_values=values, ignore_index=ignore)
    test: Any = splits.test
    test.check()
    return splits


def load_splits(config: Config) -> data.Splits:
    """The data of a cell; listed once for the cells of a sweep that share them, and held out alike for all seeds.

    Raises:
        DataError: the data are unfit, or a test mask is; the file is named.
    """
    return _splits(config.data, config.root, config.mask_values, config.ignore_index)


@dataclass
class Cell(BaseCell):
    """Segmentation."""

    measure: ClassVar[str] = "mIoU"

    def load(self) -> data.Splits:
        splits, config = load_splits(self.config), self.config
        Windows(config.windows or None, config.overlap)  # what is wrong here and there is told before training
        for spec in config.shift:
            self._other(spec, splits.classes)
        return splits

    def build(self) -> tuple[nn.Module, data.Preprocessing]:
        config = self.config
        model = make_model(config.backbone, len(self.splits.classes), config.decoder, config.channels,
                           pretrained=not self.scratch, drop_path=self.recipe.drop_path, seed=config.seed)
        spec = data.preprocessing(model.encoder, self.plan.protocol)
        side = config.img_size or min(spec.size)
        find_fixed(model, side)
        if model.fixed and config.windows is None:
            self.notes.append(f"evaluated by windows of {min(model.fixed)} pixels: the encoder takes one size only")
        return model, replace(spec, size=(side, side))

    @property
    def windows(self) -> Windows:
        side, fixed = self.config.windows, self.model.fixed
        if side is None and (fixed or self.config.data.startswith("bundled")):
            side = min(fixed or self.spec.size)  # type: ignore[arg-type]
        return Windows(side or None, self.config.overlap)

    def _images(self, splits: data.Splits, part: str, side: int | None, augment: str | None = None) -> Any:
        return getattr(splits, part).with_transform(together(self.spec, side, augment))

    def _workers(self, images: Any) -> int | None:
        """Processes that read images; none for those that are in memory already."""
        held = isinstance(images.source, PairArrays)
        return 0 if self.config.workers is None and held else self.config.workers

    def train_feed(self, part: str) -> Feed:
        augment = self.recipe.augment
        images = self._images(self.splits, part, self.spec.size[0], augment)
        return make_feed(images, random=augment is not None, workers=self._workers(images))

    def criterion(self, part: str) -> Criterion:
        weights = None
        if self.recipe.class_weights:
            weights = weights_of_counts(pixel_counts(getattr(self.splits, part), len(self.splits.classes)))
        return DenseLoss(self.recipe.dice, weights, self.recipe.label_smoothing)

    def _score(self, splits: data.Splits, part: str, module: nn.Module | None = None,
               keep: Sequence[int] = ()) -> tuple[dict[str, Any], dict[int, Tensor]]:
        images = self._images(splits, part, None)
        return score_masks(module or self.model, images, len(splits.classes), self.accelerator, self.windows,
                           self._workers(images), keep)

    def score(self, part: str, module: nn.Module | None = None) -> dict[str, Any]:
        return self._score(self.splits, part, module)[0]

    def finish(self, result: Result) -> list[str]:
        test = self.splits.test.with_transform(None)
        chosen = np.linspace(0, len(test) - 1, min(SAMPLES, len(test))).astype(int).tolist()
        scores, kept = self._score(self.splits, "test", keep=chosen)
        _put_scores(result, scores, self.splits)
        for spec, name in zip(self.config.shift, _domains(self.config.shift), strict=True):
            other = self._other(spec, self.splits.classes)
            result.metrics[f"{name}_mIoU"] = self._score(other, "test")[0]["mIoU"]
        samples = [Sample(*test[index], predicted.numpy()) for index, predicted in sorted(kept.items())]
        return masks_shown(result, samples)

    def _other(self, spec: str, classes: list[str]) -> data.Splits:
        """Data of another domain.

        Raises:
            DataError: its classes are not those that the model learns.
        """
        config = self.config
        said = (config.mask_values, config.ignore_index) if spec.startswith("folder") else ((), None)
        other = _splits(spec, config.root, *said)
        if other.classes != classes:
            raise DataError(f"--shift {spec}: its classes are {', '.join(other.classes)}, but the model learns "
                            f"{', '.join(classes)}")
        return other

    def metadata(self) -> dict[str, Any]:
        config = self.config
        return {"decoder": config.decoder, "channels": config.channels, "windows": self.windows.side,
                "overlap": config.overlap, "fixed": self.model.fixed}


OWN = ("test_mIoU", "best_test_epoch_mIoU")
"""Scores on the data that a cell was trained for."""


def _domains(specs: Sequence[str]) -> list[str]:
    """Short names of other data, whole specs where two would be alike or one would be taken for the test set."""
    short = [spec.partition("?")[0].rstrip("/").rpartition("/")[2] for spec in specs]
    return [spec if short.count(name) > 1 or f"{name}_mIoU" in OWN else name
            for spec, name in zip(specs, short, strict=True)]


def _put_scores(result: Result, scores: dict[str, Any], splits: data.Splits) -> None:
    result.accuracy, result.test_images, result.classes = scores["mIoU"], len(splits.test), list(splits.classes)
    result.metrics |= {"test_mIoU": scores["mIoU"], "test_pixels": scores["pixels"]}
    result.per_class = {name: float(value) for name, value in zip(splits.classes, scores["per_class"], strict=True)
                        if value == value}
    if len(splits.classes) <= MOST_CLASSES:
        result.confusion = scores["confusion"].tolist()


def _raw(config: Config, result: Result) -> list[str]:
    """What colours give away: every pixel gets the class that its colour mostly had in training."""
    splits = load_splits(config)
    classify = colour_table(splits.train_val, len(splits.classes))
    confusion = np.zeros((len(splits.classes) + 1, len(splits.classes)), np.int64)
    for image, mask in (splits.test[i] for i in range(len(splits.test))):
        np.add.at(confusion, (np.minimum(mask, len(splits.classes)), classify(np.asarray(image))), 1)
    _put_scores(result, scores_of(torch.from_numpy(confusion[:-1])), splits)
    return masks_shown(result, [])


def _shifts(results: Sequence[Result]) -> tuple[str, list[list[str]]]:
    """mIoU of each method on the data it was trained for and on others, mean over seeds."""
    others = list(dict.fromkeys(key for r in results for key in r.metrics if key.endswith("_mIoU") and key not in OWN))
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.data, result.method), []).append(result)
    body = [[method, *(_mean([r.metrics.get(key) for r in group]) for key in ("test_mIoU", *others))]
            for (_, method), group in groups.items()]
    head = ["method", "mIoU %", *(f"on {key.removesuffix('_mIoU')} %" for key in others)]
    return "Trained on one set, tested on others", [head, *body] if others else []


def _mean(values: Sequence[float | None]) -> str:
    return "-" if any(v is None for v in values) else f"{100 * statistics.mean(v for v in values if v is not None):.2f}"


JOB = Job(Config, Settings, plan_for, Cell, _raw, lambda plan: [plan.data], _shifts)
