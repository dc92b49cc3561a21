"""Part segmentation of point clouds: what `visionpeft points` does with data that have a part for every point.

    result = run(Config(model="point_mae", checkpoint="pretrain.pth", data="shapenetpart:FOLDER"))

The main score is instance mIoU after the last epoch, each point getting the likeliest part of its shape's category, as
on ShapeNetPart. Two things differ from the official code: clouds are tested on their farthest points and not on a
random draw, so that a score is always the same, and augmentation is that of classification.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from visionpeft.data.parts import PartSplits
from visionpeft.errors import VisionPEFTError, require
from visionpeft.metrics.parts import part_scores, shape_ious
from visionpeft.pipelines import points
from visionpeft.pipelines.methods import method_name
from visionpeft.pipelines.point_settings import Config, Sampling, Settings
from visionpeft.pipelines.points import plain_feed
from visionpeft.pipelines.recipes import Plan
from visionpeft.pipelines.running import Job
from visionpeft.pipelines.settings import Result
from visionpeft.report.clouds import parts_shown
from visionpeft.training import predict_logits
from visionpeft.training.dense import DenseLoss
from visionpeft.training.recipe import Criterion

EPOCHS = {"linear": 10, "scratch": 10, "full": 8}
RATES = {"linear": 3e-3, "scratch": 1e-3, "full": 1e-3}


class VotingError(VisionPEFTError):
    """Voting was asked for where it is not defined."""


def plan_for(config: Config) -> Plan:
    """AdamW 2e-4 and batches of 16 clouds, as Point-MAE's for parts.

    Raises:
        VotingError: votes are for classification.
    """
    if config.votes:
        raise VotingError("--votes is for data with one class a cloud: passes draw other points each time")
    method = method_name(config.method)
    return points.planned(config, 2e-4, 16, RATES.get(method, 2e-3), EPOCHS.get(method, 8))


class Likeliest(nn.Module):
    """Points (B, N, 4) -> the likeliest part (B, N) of each among those of its category, as float."""

    owns: Tensor

    def __init__(self, model: nn.Module, owned: Sequence[Sequence[int]], parts: int) -> None:
        super().__init__()
        self.model = model
        owns = torch.zeros(len(owned), parts, dtype=torch.bool)
        for category, own in enumerate(owned):
            owns[category, list(own)] = True
        self.register_buffer("owns", owns)
        self.train(model.training)

    def forward(self, points: Tensor) -> Tensor:
        owns = self.owns.to(points.device)[points[:, 0, 3].long()]
        return self.model(points).masked_fill(~owns.unsqueeze(-1), -torch.inf).argmax(1).float()


@dataclass
class Cell(points.Cell):
    """Part segmentation."""

    measure: ClassVar[str] = "instance_mIoU"

    @property
    def known(self) -> PartSplits:
        """The data with what they say of parts."""
        assert isinstance(self.splits, PartSplits)
        return self.splits

    def build(self) -> tuple[nn.Module, Any]:
        config, splits = self.config, self.known
        model = points.build(config.backbone, len(splits.parts), len(splits.classes), pretrained=not self.scratch,
                             drop_path=self.recipe.drop_path, seed=config.seed)
        return model, Sampling(config.seen, True)

    def criterion(self, part: str) -> Criterion:
        if self.recipe.class_weights:
            raise VisionPEFTError("class weights are for data with one class a cloud")
        return DenseLoss(smoothing=self.recipe.label_smoothing)

    def predicted(self, part: str, module: nn.Module | None = None) -> Tensor:
        """Parts int64 [N, P] of all clouds of a part of the data."""
        likeliest = Likeliest(module or self.model, self.known.owned, len(self.known.parts))
        return predict_logits(likeliest, plain_feed(self.config, part), self.accelerator, 16).long()

    def score(self, part: str, module: nn.Module | None = None) -> dict[str, Any]:
        return scores_of(self.predicted(part, module), self.config, part)[0]

    def finish(self, result: Result) -> list[str]:
        return put_scores(result, self.predicted("test"), self.config)

    def metadata(self) -> dict[str, Any]:
        return {"parts": list(self.known.parts), "owned": [list(own) for own in self.known.owned]}


def scores_of(predicted: Tensor, config: Config, part: str) -> tuple[dict[str, float], dict[str, float]]:
    """Scores of predicted parts [N, P], and mIoU of each category."""
    splits: Any = points.load_splits(config)
    categories = torch.from_numpy(getattr(splits, part).labels)
    true = points._ordered(config.data, config.root, part, config.seen)[..., 3].long()
    scores, each = part_scores(shape_ious(predicted, true, categories, splits.owned), categories, splits.classes)
    return scores | {"points": (predicted == true).double().mean().item()}, each


def put_scores(result: Result, predicted: Tensor, config: Config) -> list[str]:
    """Put what predicted parts [N, P] of the test set are worth into `result`; gives sections of the report."""
    splits: Any = points.load_splits(config)
    scores, result.per_class = scores_of(predicted, config, "test")
    result.accuracy, result.test_images = scores["instance_mIoU"], len(splits.test)
    result.classes = list(splits.classes)
    result.metrics |= {f"test_{key}": value for key, value in scores.items()}
    clouds = points._ordered(config.data, config.root, "test", config.seen).numpy()
    return parts_shown(predicted.numpy(), splits, clouds)


MOST = 100
"""Training shapes of a category that the raw row looks at."""


def _raw(config: Config, result: Result) -> list[str]:
    """What places give away: each point gets the part that the nearest points of training shapes of its kind have.

    How many of these count is chosen on the validation split.
    """
    tried = []
    for count in (1, 5, 15):
        score = scores_of(_by_place(config, "train", "val", count), config, "val")[0]["instance_mIoU"]
        tried.append({"neighbours": count, "val_instance_mIoU": score})
    best = max(tried, key=lambda row: row["val_instance_mIoU"])["neighbours"]
    result.selection = tried
    return put_scores(result, _by_place(config, "train_val", "test", int(best)), config)


def _by_place(config: Config, known: str, asked: str, count: int) -> Tensor:
    neighbours = require("sklearn.neighbors", extra="train")
    splits: Any = points.load_splits(config)
    given, wanted = (points._ordered(config.data, config.root, p, config.seen).numpy() for p in (known, asked))
    labels, found = getattr(splits, known).labels, np.zeros(wanted.shape[:2], np.int64)
    for category in range(len(splits.classes)):
        mine = getattr(splits, asked).labels == category
        rows = given[labels == category][:MOST, ::4].reshape(-1, 4)
        if mine.any() and len(rows):
            nearest = neighbours.KNeighborsClassifier(count).fit(rows[:, :3], rows[:, 3].astype(int))
            found[mine] = nearest.predict(wanted[mine][..., :3].reshape(-1, 3)).reshape(-1, wanted.shape[1])
    return torch.from_numpy(found)


def _summary(results: Sequence[Result]) -> tuple[str, list[list[str]]]:
    """Mean over categories, and each category."""
    names = results[0].classes if results else []
    rows = [["method", "seed", "class mIoU %", *names]]
    for result in results:
        each = [result.per_class.get(name) for name in names]
        shown = [result.metrics["test_class_mIoU"], *each]
        rows.append([result.method, str(result.seed), *("-" if v is None else f"{100 * v:.2f}" for v in shown)])
    return "mIoU of categories", rows


JOB = Job(Config, Settings, plan_for, Cell, _raw, lambda plan: [plan.data], _summary)
