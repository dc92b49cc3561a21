"""Few-shot classification with CLIP: adapters in the towers, learnt prompts, heads on features.

    result = run(Config(model="ViT-B-16-quickgelu", checkpoint="openai", data="coop:eurosat", root="~/data", shots=16))

The test set is looked at twice, before and after: nothing is chosen on it. What has strengths or epochs to choose
(Tip-Adapter, GDA, CLIP-Adapter) chooses on the validation images; adapters and prompts take the last update.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from visionpeft import data
from visionpeft.clip.data import (
    VAL_SHOTS,
    Labelled,
    base_and_new,
    draw_shots,
    harmonic,
    load_coop,
    load_images,
    read_classes,
    root_of,
)
from visionpeft.clip.features import FeatureCache
from visionpeft.clip.model import build
from visionpeft.clip.scores import classification_scores
from visionpeft.clip.stepping import Watch, alone
from visionpeft.clip.templates import PHOTO
from visionpeft.data.sets import Splits
from visionpeft.pipelines.fitting import CLIP_LORA, HEADS, Fitted, Fitter
from visionpeft.report.clip import few_shot_page
from visionpeft.training import make_accelerator, runs

__all__ = ["CLIP_LORA", "HEADS", "Config", "Result", "load", "run"]

HEAD, HEADER = "head.safetensors", "visionpeft_clip"
"""File of what gives no adapter, and the entry of its header that says what it is, as JSON."""


@dataclass(frozen=True)
class Config:
    """What to tune, on what, and how. None means: as the method's paper does."""

    model: str = "nano_clip"
    """nano_clip, or a model of open_clip, also local-dir:PATH or hf-hub:NAME with its weights."""
    checkpoint: str | None = None
    """Weights: a local file, one of open_clip's tags, or random; models without any are refused."""
    data: str = "bundled"
    """coop:SET for CoOp's layout, or as in `visionpeft classify`."""
    root: str | None = None
    """Folder that holds the data sets."""
    method: str = "clip_lora"
    """clip_lora, clipfit, gda, tip, tip_f, clip_adapter, linear_probe, coop, ivlp, promptsrc, or an adapter such as
    lora:rank=4,tower=image."""
    shots: int = 16
    """Images per class to train on."""
    seed: int = 1
    templates: str = PHOTO
    """As in `visionpeft zero-shot`; adapters train with the first."""
    others: tuple[str, ...] = ()
    """More sets to test on, by their class names, as in `visionpeft zero-shot`: what tuning costs elsewhere."""
    base_to_new: bool = False
    """Train on the first half of the classes, and test on both halves."""
    iterations: int | None = None
    """Updates; 500 a shot for adapters, 300 for ln_tuning; epochs: 100 for clipfit, 50 for coop and promptsrc (20 with
    base_to_new), 20 for ivlp and for heads, which take no other number."""
    batch_size: int | None = None
    """32, and 4 for ivlp and promptsrc."""
    lr: float | None = None
    views: int = 10
    """Augmented passes over the images for gda, tip and tip_f; 0 takes the images as they are."""
    augment: bool = True
    """Random crops and flips while training adapters and prompts."""
    precision: str = "fp32"
    out: str | None = None
    """Folder of this run; runs/few_shot/ with a name made of model, data, method, shots and seed."""
    checkpoint_seconds: float = 60.0
    """Least time between two checkpoints, from which a killed run goes on to the same numbers."""
    classes: str | None = None
    """Names to prompt with, as in `visionpeft zero-shot`; else the data's own."""

    @property
    def folder(self) -> Path:
        parts = (self.model, re.sub(r":.*/", ":", self.data), self.method, f"{self.shots}shots", f"seed{self.seed}")
        return Path("runs", "few_shot", *map(runs.slug, parts)) if self.out is None else Path(self.out)

    def identity(self) -> dict[str, Any]:
        """What decides the numbers: all but where to and how often."""
        found = {key: value for key, value in asdict(self).items() if key not in ("out", "checkpoint_seconds")}
        if self.classes is None:
            del found["classes"]  # folders of runs from before it was there are theirs still
        return found


@dataclass
class Result:
    """Scores by test set ("test", or "base" and "new", then the others by name), as fractions."""

    data: str
    method: str
    before: dict[str, dict[str, float]] = field(default_factory=dict)
    after: dict[str, dict[str, float]] = field(default_factory=dict)
    harmonic: float | None = None
    """Of the two accuracies of base-to-new."""
    chosen: dict[str, float] = field(default_factory=dict)
    """Strengths found on the validation images."""
    losses: list[float] = field(default_factory=list)
    """Of every update."""
    parameters: int = 0
    seconds: float = 0.0
    folder: str = ""


def run(config: Config, watch: Watch | None = None, cache: FeatureCache | None = None) -> Result:
    """Tune, evaluate, and write config.json, result.json, report.html and the adapter, or the head's tensors.

    A killed run goes on from its checkpoint, a finished one only gives its result.

    Args:
        watch: called with (updates done, all updates, loss).
        cache: features that several runs share.

    Raises:
        VisionPEFTError: unknown data or method, a class without images, a diverged run, a folder of another run.
    """
    splits = load(config)
    train, tests = splits, [("test", splits)]
    if config.base_to_new:
        train, new = base_and_new(splits)
        tests = [("base", train), ("new", new)]
    labelled = [Labelled(name, part.classes, part.test) for name, part in tests]
    labelled += [load_images(spec, config.root) for spec in config.others]
    accelerator = alone(make_accelerator(config.precision))
    clip = build(config.model, config.checkpoint)
    clip.model.to(accelerator.device).requires_grad_(False)
    folder = config.folder
    fitter = Fitter(config, clip, accelerator, watch, folder, cache or FeatureCache())
    runs.claim(folder, config.identity())
    if (folder / "result.json").exists():
        return Result(**runs.read_json(folder / "result.json"))
    result = Result(splits.name, config.method, folder=str(folder))
    result.before = _scores(fitter.zero_shot(), labelled)
    begin = time.perf_counter()
    fitted = fitter.fit(train.train, train.val, train.classes)
    result.seconds = time.perf_counter() - begin
    result.after, result.chosen, result.losses = _scores(fitted, labelled), fitted.chosen, fitted.losses
    result.parameters = fitted.parameters
    if config.base_to_new:
        result.harmonic = harmonic(result.after["base"]["top1"], result.after["new"]["top1"])
    _write(config, result, fitted, train.classes)
    return result


def load(config: Config) -> Splits:
    """The data with `shots` images a class to train on, and min(shots, 4) to choose on."""
    kind, _, name = config.data.partition(":")
    if kind == "coop":
        splits = load_coop(name, config.root, config.shots, config.seed)
    elif kind == "fewshot":
        splits = data.load(config.data, root=config.root, shots=config.shots, seed=config.seed)
    else:
        splits = data.load(config.data, root=root_of(config.data, config.root))
        train = draw_shots(splits.train, config.shots, config.seed)
        val = draw_shots(splits.val, min(config.shots, VAL_SHOTS), config.seed)
        splits = replace(splits, train=train, val=val, train_val=train)
    return splits if config.classes is None else replace(splits, classes=read_classes(config.classes, splits.classes))


def _scores(fitted: Fitted, tests: Sequence[Labelled]) -> dict[str, dict[str, float]]:
    """The first set has the classes of the training images."""
    found = {}
    for i, labelled in enumerate(tests):
        logits = fitted.logits(labelled.images, labelled.classes, i == 0)
        found[labelled.name] = classification_scores(logits.float().cpu(), torch.from_numpy(labelled.images.labels))
    return found


def _write(config: Config, result: Result, fitted: Fitted, classes: Sequence[str]) -> None:
    folder = config.folder
    told = {"task": "clip", "job": "few-shot", "classes": list(classes), "model": config.model,
            "checkpoint": config.checkpoint, "templates": config.templates, "method": config.method}  # fmt: skip
    if fitted.tuner is not None:
        fitted.tuner.save(folder / "adapter.safetensors", **told)
    else:
        with runs.replacing(folder / HEAD) as temporary:
            tensors = {k: v.contiguous() for k, v in fitted.tensors.items()}
            temporary.write_bytes(save(tensors, {HEADER: json.dumps(told | {"chosen": fitted.chosen})}))
    runs.write_text(folder / "report.html", few_shot_page(result, config.shots))
    runs.write_json(folder / "result.json", asdict(result))  # last, since it marks the run as finished
    (folder / "checkpoint.pt").unlink(missing_ok=True)
