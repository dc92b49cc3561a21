"""One model, one method, one recipe: train on a part of the data, give logits for another, save the adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import visionpeft as vp
from visionpeft import data
from visionpeft.pipelines.backbone import build
from visionpeft.pipelines.methods import method_name, parse_method
from visionpeft.pipelines.recipes import Plan
from visionpeft.pipelines.settings import Config
from visionpeft.training import Feed, History, Recipe, features, fit, make_feed, predict_logits, score
from visionpeft.training.cost import peak_memory, reset_peak_memory
from visionpeft.training.recipe import make_criterion, make_mixup


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


@dataclass
class Cell:
    """A model with its method attached, ready to train."""

    config: Config
    plan: Plan
    accelerator: Any
    model: nn.Module = field(init=False)
    tuner: Any = field(init=False)
    spec: data.Preprocessing = field(init=False)
    notes: list[str] = field(default_factory=list)
    history: History = field(default_factory=History)
    peak_memory: int | None = None

    def __post_init__(self) -> None:
        config, scratch = self.config, method_name(self.config.method) == "scratch"
        self.splits = load_splits(config)
        self.model = build(config.backbone, len(self.splits.classes), pretrained=not scratch,
                           drop_path=self.plan.recipe.drop_path, seed=config.seed)
        self.spec = data.preprocessing(self.model, self.plan.protocol, size=config.img_size)
        method = parse_method("full" if scratch else config.method, self.plan.fields)
        self.tuner = vp.attach(self.model, method, train="head")
        self.model.to(self.accelerator.device)
        self._head = self._cacheable_head()
        self._features: dict[str, Feed] = {}

    @property
    def recipe(self) -> Recipe:
        return self.plan.recipe

    @property
    def trained(self) -> nn.Module:
        """What runs in every step: the model, or its classifier alone on features computed once."""
        return self.model if self._head is None else self._head

    def feed(self, part: str) -> Feed:
        """Items of "train", "val", "train_val" or "test", as `trained` takes them."""
        plain = _plain_feed(_data_key(self.config), part, self.spec, self.config.workers)
        if self._head is None:
            return plain
        if part not in self._features:
            self._features[part] = features.compute(self.model, self._head, plain, self.accelerator)
        return self._features[part]

    def _train_feed(self, part: str) -> Feed:
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

    def train(self, part: str, folder: Path, evaluate_test_every: int = 0, progress: Any = None) -> None:
        """Train on a part of the data; progress and checkpoints go to `folder`."""
        feed = self._train_feed(part)
        classes, multi_label = len(self.splits.classes), self.splits.multi_label
        weights = None
        if self.recipe.class_weights:
            weights = data.class_weights(getattr(self.splits, part).labels, classes)
        evaluate = self._evaluate_test if evaluate_test_every else None
        reset_peak_memory(self.accelerator.device)
        self.history = fit(
            self.trained, feed, self.recipe, self.accelerator, make_criterion(self.recipe, multi_label, weights),
            seed=self.config.seed, mixup=make_mixup(self.recipe, classes), folder=folder, evaluate=evaluate,
            evaluate_every=max(evaluate_test_every, 1), progress=progress,
            checkpoint_seconds=self.config.checkpoint_seconds)
        self.peak_memory = peak_memory(self.accelerator.device)
        if self.history.resumed_at:
            self.notes.append(f"resumed after {self.history.resumed_at} updates")

    def _evaluate_test(self, module: nn.Module) -> dict[str, float]:
        scores = self.score("test", module)
        return {"test_accuracy": scores["accuracy"]}

    def logits(self, part: str, module: nn.Module | None = None) -> Tensor:
        """Logits [N, C] of a part of the data."""
        return predict_logits(module or self.trained, self.feed(part), self.accelerator)

    def score(self, part: str, module: nn.Module | None = None) -> dict[str, Any]:
        return score(self.logits(part, module), self.feed(part).targets, self.splits.multi_label)

    def save(self, path: Path) -> None:
        """Write the adapter file, with all that `visionpeft predict` needs."""
        self.tuner.save(
            path, task="classification", classes=list(self.splits.classes), multi_label=self.splits.multi_label,
            preprocessing=self.spec.to_dict(), backbone=self.config.backbone.to_dict(),
            pretrained=method_name(self.config.method) != "scratch", data=self.config.data_name)
