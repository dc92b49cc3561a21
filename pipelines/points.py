"""Classification of point clouds, from data to a run folder, and sweeps over methods and seeds.

Data with a part for every point are learnt part by part: see visionpeft.pipelines.point_parts.

    result = run(Config(model="point_mae", checkpoint="pretrain.pth", data="scanobjectnn:pb_t50_rs", root="h5_files"))
    outcome = sweep(Sweep(method=("linear", "pointgst"), seeds=(0, 1, 2)))

The score is that of the last epoch. The papers of this field report the best test epoch: `track_test` gives that
beside it, apart and named so, and `votes` the mean over augmented passes. The run folder and all that happens around a
cell are those of visionpeft.pipelines.running.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from visionpeft import data
from visionpeft.data.clouds import load_clouds
from visionpeft.data.parts import PartSplits, check_parts, is_parts, load_parts
from visionpeft.methods.point_memory import remember
from visionpeft.methods.pointgst import PointGST, SpectralAdapter, keep_spectra
from visionpeft.models import point_parts, point_transformer
from visionpeft.pipelines.backbone import ModelError
from visionpeft.pipelines.baselines import regression
from visionpeft.pipelines.cell import BaseCell, put_classes
from visionpeft.pipelines.methods import method_name
from visionpeft.pipelines.point_settings import NANO, CloudBackbone, Config, Sampling, Settings, Sweep
from visionpeft.pipelines.recipes import Plan, override
from visionpeft.pipelines.running import Job, Outcome, cells, run, sweep
from visionpeft.pipelines.settings import Result
from visionpeft.report.clouds import predictions
from visionpeft.training import Feed, Recipe, predict_logits, score
from visionpeft.training.clouds import CloudFeed, PartFeed, check_augmentation, drawn_from, ordered
from visionpeft.training.order import mix, seed_all
from visionpeft.training.recipe import Criterion, make_criterion

__all__ = ["JOB", "CloudBackbone", "Config", "Outcome", "Result", "Settings", "Sweep", "cells", "run", "sweep"]

KEPT = 10_000
"""Most clouds whose spectra are kept; of 128 centres each they take 0.9 GB."""


def build(backbone: CloudBackbone, num_classes: int, categories: int = 0, *, pretrained: bool = True,
          drop_path: float = 0.0, seed: int = 0) -> nn.Module:
    """The model with a fresh classifier, all random draws from `seed`.

    Args:
        num_classes: of clouds; of points where there are categories.
        categories: of whole clouds, for a model that tells their parts apart.

    Raises:
        ModelError: pre-trained weights are asked for and none are named.
    """
    checkpoint = (backbone.checkpoint or bundled_weights(backbone.name)) if pretrained else None
    sizes = {"groups": backbone.groups, "drop_path": drop_path}
    seed_all(seed)
    if categories:
        return point_parts.create(backbone.name, num_classes, categories, checkpoint, **sizes)
    return point_transformer.create(backbone.name, num_classes, checkpoint, **sizes)


def bundled_weights(name: str) -> str:
    """The weights that come with this library.

    Raises:
        ModelError: there are none for this model.
    """
    from importlib.resources import files

    path = files("visionpeft.assets") / f"{name}.safetensors"
    if not path.is_file():
        raise ModelError(f"no weights of {name} come with this library: give --checkpoint, or choose the method "
                         "scratch; `visionpeft points pretrain` makes some")
    return str(path)


EPOCHS = {"linear": 30, "scratch": 20, "full": 12}
# Of the nano model. 1e-3 or 4e-3, as scripts/point_table.py chose on validation clouds; linear and full, where both
# tied, were set by hand.
RATES = {"linear": 5e-3, "full": 5e-4, "scratch": 1e-3, "ppt": 1e-3, "ssf": 1e-3, "bitfit": 1e-3}


def plan_for(config: Config) -> Plan:
    """AdamW 5e-4 and batches of 32 clouds, as in the papers."""
    method = method_name(config.method)
    return planned(config, 5e-4, 32, RATES.get(method, 4e-3), EPOCHS.get(method, 15))


def planned(config: Config, lr: float, batch_size: int, nano_lr: float, nano_epochs: int) -> Plan:
    """Point-MAE's recipe: AdamW, cosine, 300 epochs; what the user named goes over it.

    Args:
        nano_lr, nano_epochs: for the nano model, whose bundled data have half a minute a row.

    Raises:
        AugmentError: no such augmentation of clouds.
    """
    recipe = Recipe(lr=lr, weight_decay=0.05, epochs=300, batch_size=batch_size, warmup_epochs=10, min_lr=1e-6,
                    clip=10.0, schedule="epoch", decay_1d=False, drop_path=0.1, augment="scale_translate",
                    drop_last=True)
    if config.model == NANO:
        recipe = replace(recipe, lr=nano_lr, epochs=nano_epochs, warmup_epochs=1, drop_path=0.0, schedule="update",
                         augment="rotate" if config.data.startswith("bundled") else "scale_translate")
    recipe = override(recipe, config.given_recipe())
    check_augmentation(recipe.augment)
    return Plan(recipe, {}, config.protocol or "official")


@lru_cache(maxsize=2)
def _splits(spec: str, root: str | None) -> data.Splits:
    return load_parts(spec, root) if is_parts(spec) else load_clouds(spec, root)


@lru_cache(maxsize=8)
def _ordered(spec: str, root: str | None, part: str, count: int) -> Tensor:
    splits = _splits(spec, root)
    clouds = ordered(getattr(splits, part), count)
    if isinstance(splits, PartSplits):
        check_parts(clouds.numpy(), splits, getattr(splits, part))
    return clouds


def load_splits(config: Config) -> data.Splits:
    """The data of a cell; read once for the cells of a sweep, and held out alike for all seeds."""
    return _splits(config.data, config.root)


def plain_feed(config: Config, part: str) -> CloudFeed:
    """A part of the data as evaluation sees it."""
    clouds = getattr(load_splits(config), part)
    make = PartFeed if is_parts(config.data) else CloudFeed
    return make(_ordered(config.data, config.root, part, config.seen), torch.from_numpy(clouds.labels), config.seen,
                names=clouds)


@dataclass
class Cell(BaseCell):
    """Classification of clouds."""

    measure: ClassVar[str] = "accuracy"

    def load(self) -> data.Splits:
        return load_splits(self.config)

    def build(self) -> tuple[nn.Module, Any]:
        config = self.config
        model = build(config.backbone, len(self.splits.classes), pretrained=not self.scratch,
                      drop_path=self.recipe.drop_path, seed=config.seed)
        return model, Sampling(config.seen, not config.data.startswith("scanobjectnn"))

    def train_feed(self, part: str) -> Feed:
        config, clouds = self.config, getattr(self.splits, part)
        many = _ordered(config.data, config.root, part, drawn_from(config.seen))
        make = PartFeed if is_parts(config.data) else CloudFeed
        return make(many, torch.from_numpy(clouds.labels), config.seen, self.recipe.augment or "none", clouds)

    def train(self, part: str, folder: Path, evaluate_test_every: int = 0, progress: Any = None) -> None:
        if getattr(self.tuner.method, "memory", 0):
            remember(self.tuner, plain_feed(self.config, part).clouds[:, : self.config.seen, :3])
        if self.recipe.augment == "fixed" and isinstance(self.tuner.method, PointGST) and not self.tuner.method.legacy:
            keep_spectra(self.tuner, min(len(getattr(self.splits, part)), KEPT))
        super().train(part, folder, evaluate_test_every, progress)

    def criterion(self, part: str) -> Criterion:
        weights = None
        if self.recipe.class_weights:
            weights = data.class_weights(getattr(self.splits, part).labels, len(self.splits.classes))
        return make_criterion(self.recipe, False, weights)

    def logits(self, part: str, module: nn.Module | None = None) -> Tensor:
        """Logits [N, C] of a part of the data."""
        return predict_logits(module or self.model, plain_feed(self.config, part), self.accelerator, 32)

    def score(self, part: str, module: nn.Module | None = None) -> dict[str, Any]:
        labels = torch.from_numpy(getattr(self.splits, part).labels)
        return score(self.logits(part, module), labels)

    def finish(self, result: Result) -> list[str]:
        sections = put_scores(result, self.logits("test"), self.config, _energy(self))
        if self.config.votes:
            labels = torch.from_numpy(self.splits.test.labels)
            result.metrics["voted_accuracy"] = score(self.voted(), labels)["accuracy"]
        return sections

    def voted(self) -> Tensor:
        """Mean of the logits over augmented passes over the test set."""
        feed = self.train_feed("test")
        total = torch.zeros(len(feed), len(self.splits.classes))
        for vote in range(self.config.votes):
            one = _Pass(feed, mix(self.config.seed, vote, 7))
            total += predict_logits(self.model, one, self.accelerator, 32)
        return total / self.config.votes

    def metadata(self) -> dict[str, Any]:
        return {}


class _Pass:
    """A training feed whose draws are those of one pass."""

    def __init__(self, feed: Any, seed: int) -> None:
        self.feed, self.seed, self.targets, self.name = feed, seed, feed.targets, feed.name

    def __len__(self) -> int:
        return len(self.feed)

    def batches(self, pieces: Sequence[list[int]], seed: int, epoch: int) -> Any:
        return self.feed.batches(pieces, self.seed, epoch)


def put_scores(result: Result, logits: Tensor, config: Config, energy: np.ndarray | None = None) -> list[str]:
    """Put what logits [N, C] of the test set are worth into `result`; gives sections of the report."""
    splits = load_splits(config)
    put_classes(result, logits, splits)
    clouds = _ordered(config.data, config.root, "test", config.seen).numpy()
    return predictions(result, logits.argmax(1).numpy(), splits, clouds, energy)


@torch.no_grad()
def _energy(cell: Cell) -> np.ndarray | None:
    """Where the last spectral adapter changes most, spread from centres to points [N, P]; None without PointGST."""
    from visionpeft.models.point_ops import interpolate

    adapters = [a for a in cell.tuner.adapters.values() if isinstance(a, SpectralAdapter)]
    if not adapters:
        return None
    feed, found = plain_feed(cell.config, "test"), []
    cell.model.eval()
    for start in range(0, len(feed), 32):
        points = feed.clouds[start : start + 32].to(cell.accelerator.device)
        centres, strength = adapters[-1].watched(cell.model, points)
        found.append(interpolate(points, centres, strength.unsqueeze(-1)).squeeze(-1).cpu())
    return torch.cat(found).numpy()


# ---- features by hand ------------------------------------------------------------------------------------------------


def features_by_hand(clouds: np.ndarray) -> np.ndarray:
    """What clouds [N, P, 3] give away without a network: distances between points, heights, and spreads [N, 48].

    None of it depends on a turn about the upright axis.
    """
    rng = np.random.default_rng(0)
    i, j = rng.integers(0, clouds.shape[1], (2, 4096))
    found = []
    for cloud in clouds:
        distances = np.histogram(np.linalg.norm(cloud[i] - cloud[j], axis=1), 24, (0, 2))[0] / len(i)
        heights = np.histogram(cloud[:, 1], 12, (-1, 1))[0] / len(cloud)
        rings = np.histogram(np.linalg.norm(cloud[:, [0, 2]], axis=1), 9, (0, 1))[0] / len(cloud)
        spreads = np.linalg.eigvalsh(np.cov(cloud.T))
        found.append(np.concatenate([distances, heights, rings, spreads]))
    return np.stack(found)


def _raw(config: Config, result: Result) -> list[str]:
    """Logistic regression on features by hand; its strength is chosen on the validation split."""
    def features(part: str) -> np.ndarray:
        return features_by_hand(_ordered(config.data, config.root, part, config.seen).numpy())

    logits, result.selection = regression(features, load_splits(config), (0.1, 1.0, 10.0, 100.0), tol=1e-4,
                                          max_iter=500)
    return put_scores(result, logits, config)


def _summary(results: Sequence[Result]) -> tuple[str, list[list[str]]]:
    """Mean accuracy over classes, and the voted one, which is another protocol."""
    rows = [["method", "seed", "mean class accuracy %", "voted accuracy %"]]
    for result in results:
        scores = [result.metrics.get(key) for key in ("test_mean_per_class", "voted_accuracy")]
        rows.append([result.method, str(result.seed), *("-" if v is None else f"{100 * v:.2f}" for v in scores)])
    return "Mean over classes, and voting", rows


JOB = Job(Config, Settings, plan_for, Cell, _raw, lambda plan: [plan.data], _summary)
