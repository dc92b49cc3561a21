"""Few-shot classification with CLIP: adapters in the towers, learnt prompts, heads on features.

    result = run(Config(model="ViT-B-16-quickgelu", checkpoint="openai", data="coop:eurosat", root="~/data", shots=16))

The test set is looked at twice, before and after: nothing is chosen on it. What has strengths or epochs to choose
(Tip-Adapter, GDA, CLIP-Adapter) chooses on the validation images; adapters and prompts take the last update.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import visionpeft as vp
from visionpeft import data
from visionpeft.clip.data import base_and_new, draw_shots, harmonic, load_coop
from visionpeft.clip.errors import ClipError
from visionpeft.clip.features import FeatureCache, image_features
from visionpeft.clip.heads import FACTOR, GDA, CLIPAdapter, TipAdapter
from visionpeft.clip.model import Clip, build
from visionpeft.clip.prompts import CoOp
from visionpeft.clip.scores import classification_scores
from visionpeft.clip.templates import PHOTO, read_templates
from visionpeft.clip.text import class_prompts, encode_tokens, tokenize, zero_shot_weights
from visionpeft.clip.tuning import Steps, descend, views
from visionpeft.data.sets import ImageSet, Splits
from visionpeft.pipelines.methods import method_name, parse_method
from visionpeft.training import make_accelerator, runs

HEADS = ("gda", "tip", "tip_f", "clip_adapter", "coop")

# CLIP-LoRA: rank 2 on query, key and value of every block of both towers, scale 1 / sqrt 2, 500 updates a shot.
CLIP_LORA = "lora:rank=2,alpha=1,rslora=True,dropout=0.25,targets=query key value"
PER_SHOT = 500


@dataclass(frozen=True)
class Config:
    """What to tune, on what, and how. None means: as the method's paper does."""

    model: str = "nano_clip"
    """nano_clip, or a model of open_clip."""
    checkpoint: str | None = None
    """Weights: a local file, or one of open_clip's tags."""
    data: str = "bundled"
    """coop:SET for CoOp's layout, or as in `visionpeft classify`."""
    root: str | None = None
    """Folder that holds the data sets."""
    method: str = "clip_lora"
    """clip_lora, gda, tip, tip_f, clip_adapter, coop, or an adapter such as lora:rank=4,tower=image."""
    shots: int = 16
    """Images per class to train on."""
    seed: int = 1
    templates: str = PHOTO
    """As in `visionpeft zero-shot`; adapters train with the first."""
    base_to_new: bool = False
    """Train on the first half of the classes, and test on both halves."""
    iterations: int | None = None
    """Updates; 500 a shot for adapters, 50 epochs for prompts, 20 for heads."""
    batch_size: int = 32
    lr: float | None = None
    views: int = 10
    """Augmented passes over the images for gda, tip and tip_f; 0 takes the images as they are."""
    augment: bool = True
    """Random crops and flips while training adapters and prompts."""
    precision: str = "fp32"
    out: str = "runs/few_shot"


@dataclass
class Result:
    """Scores by test set ("test", or "base" and "new"), as fractions."""

    data: str
    method: str
    before: dict[str, dict[str, float]] = field(default_factory=dict)
    after: dict[str, dict[str, float]] = field(default_factory=dict)
    harmonic: float | None = None
    """Of the two accuracies of base-to-new."""
    chosen: dict[str, float] = field(default_factory=dict)
    """Strengths found on the validation images."""
    parameters: int = 0
    seconds: float = 0.0
    folder: str = ""


@dataclass
class Fitted:
    """A tuned model: images and class names -> logits.

    `seen` tells whether the classes are those of the training images.
    """

    logits: Callable[[ImageSet, Sequence[str], bool], Tensor]
    tensors: dict[str, Tensor]
    """All that was learnt."""
    chosen: dict[str, float] = field(default_factory=dict)
    tuner: vp.Tuner | None = None


def run(config: Config, watch: Callable[[int, int, float], None] | None = None) -> Result:
    """Tune, evaluate, and write result.json and the adapter, or the head's tensors.

    Raises:
        VisionPEFTError: unknown data or method, a class without images, a diverged run.
    """
    splits = load(config)
    train, tests = splits, {"test": splits}
    if config.base_to_new:
        base, new = base_and_new(splits)
        train, tests = base, {"base": base, "new": new}
    accelerator = make_accelerator(config.precision)
    clip = build(config.model, config.checkpoint)
    clip.model.to(accelerator.device).requires_grad_(False)
    fitter = Fitter(config, clip, accelerator, watch)
    result = Result(splits.name, config.method, folder=config.out)
    result.before = _scores(fitter.zero_shot(), tests, train)
    begin = time.perf_counter()
    fitted = fitter.fit(train.train, train.val, train.classes)
    result.seconds = time.perf_counter() - begin
    result.after, result.chosen = _scores(fitted, tests, train), fitted.chosen
    result.parameters = fitted.tuner.num_parameters if fitted.tuner else sum(t.numel() for t in fitted.tensors.values())
    if config.base_to_new:
        result.harmonic = harmonic(result.after["base"]["top1"], result.after["new"]["top1"])
    _write(config, result, fitted, train.classes)
    return result


def load(config: Config) -> Splits:
    """The data with `shots` images a class to train on, and min(shots, 4) to choose on."""
    kind, _, name = config.data.partition(":")
    if kind == "coop":
        if config.root is None:
            raise ClipError(f"{config.data!r} needs root=, the folder that holds CoOp's data sets")
        return load_coop(name, config.root, config.shots, config.seed)
    if kind == "fewshot":
        return data.load(config.data, root=config.root, shots=config.shots, seed=config.seed)
    splits = data.load(config.data, root=config.root)
    train = draw_shots(splits.train, config.shots, config.seed)
    return replace(splits, train=train, val=draw_shots(splits.val, min(config.shots, 4), config.seed), train_val=train)


def _scores(fitted: Fitted, tests: dict[str, Splits], train: Splits) -> dict[str, dict[str, float]]:
    found = {}
    for name, splits in tests.items():
        logits = fitted.logits(splits.test, splits.classes, splits is train)
        found[name] = classification_scores(logits.float().cpu(), torch.from_numpy(splits.test.labels))
    return found


def _write(config: Config, result: Result, fitted: Fitted, classes: Sequence[str]) -> None:
    from safetensors.torch import save

    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    if fitted.tuner is not None:
        metadata = {"classes": list(classes), "model": config.model, "template": config.templates}
        fitted.tuner.save(folder / "adapter.safetensors", **metadata)
    else:
        with runs.replacing(folder / "head.safetensors") as temporary:
            temporary.write_bytes(save({k: v.contiguous() for k, v in fitted.tensors.items()}))
    runs.write_json(folder / "result.json", asdict(result) | {"config": asdict(config)})


@dataclass
class Fitter:
    """Everything that learns; none of it is ever given a test set."""

    config: Config
    clip: Clip
    accelerator: Any
    watch: Callable[[int, int, float], None] | None = None
    cache: FeatureCache = field(default_factory=FeatureCache)

    def __post_init__(self) -> None:
        self.templates = read_templates(self.config.templates)
        self.is_head = method_name(self.config.method) in HEADS
        if not self.is_head:
            self.method = parse_method(CLIP_LORA if self.config.method == "clip_lora" else self.config.method)

    def fit(self, train: ImageSet, val: ImageSet, classes: Sequence[str]) -> Fitted:
        """Tune on the training images; strengths and epochs from the validation images."""
        if not self.is_head:
            return self._adapter(train, classes)
        if self.config.method == "coop":
            return self._coop(train, classes)
        return {"gda": self._gda, "tip": self._tip, "tip_f": self._tip, "clip_adapter": self._clip_adapter}[
            self.config.method
        ](train, val, classes)

    def zero_shot(self) -> Fitted:
        return Fitted(lambda images, classes, seen: FACTOR * self._features(images) @ self._weights(classes), {})

    def _features(self, images: ImageSet) -> Tensor:
        return image_features(self.clip.model, images, self.clip.preprocessing, self.cache)

    def _weights(self, classes: Sequence[str]) -> Tensor:
        return zero_shot_weights(self.clip.model, self.clip.tokenizer, classes, self.templates).float().cpu()

    def _steps(self, default: int, **other: Any) -> Steps:
        given = {"lr": self.config.lr} if self.config.lr is not None else {}
        augment = "resized_crop" if self.config.augment else None
        return Steps(self.config.iterations or default, self.config.batch_size, augment=augment, **{**other, **given})

    def _adapter(self, train: ImageSet, classes: Sequence[str]) -> Fitted:
        torch.manual_seed(self.config.seed)
        model = self.clip.model
        tuner = vp.attach(model, self.method, train="" if self.method.trains is None else None)
        ids = tokenize(self.clip.tokenizer, class_prompts(classes, self.templates[:1]), model.context_length)
        ids = ids.to(self.accelerator.device)

        def weights() -> Tensor:
            return torch.nn.functional.normalize(encode_tokens(model, ids), dim=-1).t()

        model.train()
        steps = self._steps(PER_SHOT * self.config.shots)
        descend(self.clip, tuner.parameters(), train, weights, steps, self.config.seed, self.accelerator, self.watch)
        model.eval()
        return Fitted(self.zero_shot().logits, tuner.state_dict(), tuner=tuner)

    def _coop(self, train: ImageSet, classes: Sequence[str]) -> Fitted:
        torch.manual_seed(self.config.seed)
        coop = CoOp(self.clip, classes)
        epoch = -(-len(train) // self.config.batch_size)
        steps = self._steps(50 * epoch, lr=2e-3, optimizer="sgd", weight_decay=5e-4, min_lr=0.0, warmup=epoch)
        descend(self.clip, coop.parameters(), train, coop, steps, self.config.seed, self.accelerator, self.watch)

        @torch.no_grad()
        def logits(images: ImageSet, names: Sequence[str], seen: bool) -> Tensor:
            return FACTOR * self._features(images) @ coop.name(names)().float().cpu()

        return Fitted(logits, {"context": coop.context.detach().clone()})

    def _tip(self, train: ImageSet, val: ImageSet, classes: Sequence[str]) -> Fitted:
        w, y, (f, val_y) = self._weights(classes), torch.from_numpy(train.labels), self._validation(val)
        tip = TipAdapter.build(views(self.clip, train, self.config.views, self.config.seed), y, len(classes))
        if self.config.method == "tip_f":
            lr = self.config.lr or 1e-3
            tip = tip.fine_tune(self._features(train), y, w, f, val_y, lr=lr, seed=self.config.seed)
        tip = tip.search(f, val_y, w)

        def logits(images: ImageSet, names: Sequence[str], seen: bool) -> Tensor:
            x = self._features(images)
            return tip.logits(x, w) if seen else FACTOR * x @ self._weights(names)

        return Fitted(logits, {"keys": tip.keys, "values": tip.values}, {"alpha": tip.alpha, "beta": tip.beta})

    def _gda(self, train: ImageSet, val: ImageSet, classes: Sequence[str]) -> Fitted:
        w, (f, val_y) = self._weights(classes), self._validation(val)
        x = views(self.clip, train, self.config.views, self.config.seed)
        y = torch.from_numpy(train.labels).repeat(len(x))
        fit = GDA.fit_base if self.config.base_to_new else GDA.fit
        gda = fit(x.flatten(0, 1), y, len(classes)).search(f, val_y, w)

        def logits(images: ImageSet, names: Sequence[str], seen: bool) -> Tensor:
            if seen:
                return gda.logits(self._features(images), w)
            new = self._weights(names)
            unseen = replace(GDA.fit_new(x.flatten(0, 1), new), alpha=gda.alpha)
            return unseen.logits(self._features(images), new)

        return Fitted(logits, {"v": gda.v, "b": gda.b}, {"alpha": gda.alpha})

    def _clip_adapter(self, train: ImageSet, val: ImageSet, classes: Sequence[str]) -> Fitted:
        w, y, (f, val_y) = self._weights(classes), torch.from_numpy(train.labels), self._validation(val)
        torch.manual_seed(self.config.seed)
        head = CLIPAdapter(len(w))
        head.fit(self._features(train), y, w, f, val_y, lr=self.config.lr or 1e-3, seed=self.config.seed)

        @torch.no_grad()
        def logits(images: ImageSet, names: Sequence[str], seen: bool) -> Tensor:
            return FACTOR * head(self._features(images)) @ (w if seen else self._weights(names))

        return Fitted(logits, head.state_dict())

    def _validation(self, val: ImageSet) -> tuple[Tensor, Tensor]:
        return self._features(val), torch.from_numpy(val.labels)
