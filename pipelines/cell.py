"""One model, one method, one recipe: train on a part of the data, score another, save the adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import visionpeft as vp
from visionpeft import data
from visionpeft.methods import spt
from visionpeft.pipelines.backbone import build
from visionpeft.pipelines.methods import Budget, method_name, parse_job_method, parse_method
from visionpeft.pipelines.recipes import Plan
from visionpeft.pipelines.settings import Config, Result
from visionpeft.report.classification import predictions
from visionpeft.training import Feed, History, Recipe, features, fit, make_feed, predict_logits, score
from visionpeft.training.cost import peak_memory, reset_peak_memory
from visionpeft.training.recipe import Criterion, Mixing, RecipeError, make_criterion, make_mixup

MOST_CLASSES = 100
"""Confusion matrices of more classes are not kept."""


@dataclass
class BaseCell:
    """A model with its method attached, ready to train. Each job has its own."""

    measure: ClassVar[str]
    """Name of the main score."""

    config: Any
    plan: Plan
    accelerator: Any
    splits: data.Splits = field(init=False)
    model: nn.Module = field(init=False)
    tuner: Any = field(init=False)
    spec: data.Preprocessing = field(init=False)
    notes: list[str] = field(default_factory=list)
    history: History = field(default_factory=History)
    peak_memory: int | None = None

    def __post_init__(self) -> None:
        self.splits = self.load()
        self.model, self.spec = self.build()
        method = parse_job_method("full" if self.scratch else self.config.method, self.plan.fields)
        if isinstance(method, Budget):
            method = self._allocate(method)
        self.tuner = vp.attach(self.model, method, train="head")
        self.model.to(self.accelerator.device)

    def _allocate(self, asked: Budget) -> spt.SPT:
        """What SPT buys, by the sensitivities of the first 16 batches of train, in the order of the data."""
        size, feed = self.recipe.batch_size, self.train_feed("train")
        device, criterion = self.accelerator.device, self.criterion("train")
        pieces = [list(range(i, min(i + size, len(feed)))) for i in range(0, min(len(feed), 16 * size), size)]
        batches = ((x.to(device), y.to(device)) for x, y in feed.batches(pieces, self.config.seed, 0))
        scores = spt.sensitivity(self.model.to(device), batches, lambda logits, y: criterion(logits, y).mean())
        method = None if asked.method is None else parse_method(asked.method)
        return spt.allocate(self.model, scores, method, budget=asked.budget)

    @property
    def recipe(self) -> Recipe:
        return self.plan.recipe

    @property
    def scratch(self) -> bool:
        """Whether this is the row that starts from random weights."""
        return method_name(self.config.method) == "scratch"

    @property
    def trained(self) -> nn.Module:
        """What runs in every step."""
        return self.model

    def load(self) -> data.Splits:
        raise NotImplementedError

    def build(self) -> tuple[nn.Module, data.Preprocessing]:
        """The model without the method, and what happens to its images."""
        raise NotImplementedError

    def train_feed(self, part: str) -> Feed:
        raise NotImplementedError

    def criterion(self, part: str) -> Criterion:
        """The loss, with class weights of a part of the data where the recipe asks for them."""
        raise NotImplementedError

    def mixup(self) -> Mixing | None:
        return None

    def score(self, part: str, module: nn.Module | None = None) -> dict[str, Any]:
        """Scores on a part of the data, the main one as `measure`."""
        raise NotImplementedError

    def finish(self, result: Result) -> list[str]:
        """Score the test set into `result`; gives sections of the report."""
        raise NotImplementedError

    def metadata(self) -> dict[str, Any]:
        """What `visionpeft predict` needs to know, beside what all jobs write."""
        raise NotImplementedError

    def train(self, part: str, folder: Path, evaluate_test_every: int = 0, progress: Any = None) -> None:
        """Train on a part of the data; progress and checkpoints go to `folder`."""
        feed = self.train_feed(part)
        evaluate = self._evaluate_test if evaluate_test_every else None
        reset_peak_memory(self.accelerator.device)
        self.history = fit(
            self.trained, feed, self.recipe, self.accelerator, self.criterion(part), seed=self.config.seed,
            mixup=self.mixup(), folder=folder, evaluate=evaluate, evaluate_every=max(evaluate_test_every, 1),
            progress=progress, checkpoint_seconds=self.config.checkpoint_seconds, consistency=self._consistency())
        self.peak_memory = peak_memory(self.accelerator.device)
        if self.history.resumed_at:
            self.notes.append(f"resumed after {self.history.resumed_at} updates")

    def _consistency(self) -> float:
        """Weight of the method's own term of the loss; of all methods MoSA has one."""
        weight: float = getattr(self.tuner.method, "consistency", 0.0)
        if weight and self.splits.multi_label:
            raise RecipeError("MoSA's consistency compares softmaxes, which multi-label data have none of: write "
                              "mosa:consistency=0")
        return weight

    def _evaluate_test(self, module: nn.Module) -> dict[str, float]:
        return {f"test_{self.measure}": self.score("test", module)[self.measure]}

    def save(self, path: Path) -> None:
        """Write the adapter file."""
        self.tuner.save(
            path, task=self.config.job, classes=list(self.splits.classes), preprocessing=self.spec.to_dict(),
            backbone=self.config.backbone.to_dict(), pretrained=not self.scratch, data=self.config.data_name,
            **self.metadata())


# ---- classification --------------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def _splits(spec: str, root: str | None, seed: int, shots: int | None) -> data.Splits:
    return data.load(spec, root=root, seed=seed, shots=shots)


def _data_key(config: Config) -> tuple[str, str | None, int, int | None]:
    # All seeds share one hold-out; few-shot lists go by seed, as their paper has it.
    return config.data, config.root, config.seed if config.data.startswith("fewshot") else 0, config.shots


def load_splits(config: Config) -> data.Splits:
    """The data of a cell; read once for the cells of a sweep that share them."""
    return _splits(*_data_key(config))


@lru_cache(maxsize=4)
def _plain_feed(key: tuple[str, str | None, int, int | None], part: str, spec: data.Preprocessing,
                workers: int | None) -> Feed:
    """Images without augmentation: decoded once for all cells of a sweep, where memory allows."""
    images = getattr(_splits(*key), part).with_transform(spec.transform())
    return make_feed(images, random=False, workers=workers)


def put_classes(result: Result, logits: Tensor, splits: data.Splits) -> None:
    """Put what the logits [N, C] of the test set are worth into `result`."""
    scores = score(logits, torch.from_numpy(splits.test.labels), splits.multi_label)
    result.accuracy, result.test_images, result.classes = scores["accuracy"], len(splits.test), list(splits.classes)
    result.metrics |= {f"test_{k}": v for k, v in scores.items() if isinstance(v, float)}
    if splits.multi_label:
        return
    right = logits.argmax(1).numpy() == splits.test.labels
    result.correct = "".join("1" if r else "0" for r in right)
    if len(splits.classes) <= MOST_CLASSES:
        result.confusion = scores["confusion"].tolist()


def finish(result: Result, logits: Tensor, splits: data.Splits) -> list[str]:
    """The same, and sections of the report."""
    put_classes(result, logits, splits)
    return [] if splits.multi_label else predictions(result, logits.argmax(1).numpy(), splits)


@dataclass
class Cell(BaseCell):
    """Classification."""

    measure: ClassVar[str] = "accuracy"
    _head: nn.Module | None = field(default=None, init=False)
    _features: dict[str, Feed] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._head = self._cacheable_head()

    @property
    def trained(self) -> nn.Module:
        """The model, or its classifier alone on features computed once."""
        return self.model if self._head is None else self._head

    def load(self) -> data.Splits:
        return load_splits(self.config)

    def build(self) -> tuple[nn.Module, data.Preprocessing]:
        config = self.config
        model = build(config.backbone, len(self.splits.classes), pretrained=not self.scratch,
                      drop_path=self.plan.recipe.drop_path, seed=config.seed)
        return model, data.preprocessing(model, self.plan.protocol, size=config.img_size)

    def feed(self, part: str) -> Feed:
        """Items of "train", "val", "train_val" or "test", as `trained` takes them."""
        plain = _plain_feed(_data_key(self.config), part, self.spec, self.config.workers)
        if self._head is None:
            return plain
        if part not in self._features:
            self._features[part] = features.compute(self.model, self._head, plain, self.accelerator)
        return self._features[part]

    def train_feed(self, part: str) -> Feed:
        if self.recipe.augment is None:
            return self.feed(part)
        images = getattr(self.splits, part).with_transform(self.spec.transform(self.recipe.augment))
        return make_feed(images, random=True, workers=self.config.workers)

    def _cacheable_head(self) -> nn.Module | None:
        recipe = self.recipe
        head = features.classifier_alone(self.model)
        if head is None or recipe.augment is not None or recipe.mixup or recipe.cutmix:
            return None
        plain = _plain_feed(_data_key(self.config), "val", self.spec, self.config.workers)
        if not features.is_exact(self.model, head, plain, self.accelerator):
            return None
        self.notes.append("only the classifier learns: features of the frozen backbone were computed once")
        return head

    def criterion(self, part: str) -> Criterion:
        weights = None
        if self.recipe.class_weights:
            weights = data.class_weights(getattr(self.splits, part).labels, len(self.splits.classes))
        return make_criterion(self.recipe, self.splits.multi_label, weights)

    def mixup(self) -> Mixing | None:
        return make_mixup(self.recipe, len(self.splits.classes))

    def logits(self, part: str, module: nn.Module | None = None) -> Tensor:
        """Logits [N, C] of a part of the data."""
        return predict_logits(module or self.trained, self.feed(part), self.accelerator)

    def score(self, part: str, module: nn.Module | None = None) -> dict[str, Any]:
        labels = torch.from_numpy(getattr(self.splits, part).labels)
        return score(self.logits(part, module), labels, self.splits.multi_label)

    def finish(self, result: Result) -> list[str]:
        return finish(result, self.logits("test"), self.splits)

    def metadata(self) -> dict[str, Any]:
        return {"multi_label": self.splits.multi_label}
