"""What few-shot classification can tune: one `Fitter` method for each way, and the same from what a file holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import visionpeft as vp
from visionpeft.clip.errors import ClipError
from visionpeft.clip.features import FeatureCache, image_features, may_cache
from visionpeft.clip.heads import FACTOR, GDA, CLIPAdapter, LinearProbe, TipAdapter
from visionpeft.clip.ivlp import IVLP, gaussian_weights
from visionpeft.clip.losses import clipfit_loss, promptsrc_loss
from visionpeft.clip.model import Clip, logit_scale
from visionpeft.clip.prompts import CoOp
from visionpeft.clip.stepping import EpochAverage, Loop, Steps
from visionpeft.clip.templates import read_templates
from visionpeft.clip.text import class_prompts, encode_tokens, tokenize, zero_shot_weights
from visionpeft.clip.tuning import descend, encoder, pixels, views
from visionpeft.data.sets import ImageSet
from visionpeft.methods import LNTuning
from visionpeft.pipelines.methods import method_name, parse_method

if TYPE_CHECKING:
    from visionpeft.pipelines.few_shot import Config

PROMPTS = ("coop", "ivlp", "promptsrc")
ON_FEATURES = ("gda", "tip", "tip_f", "clip_adapter", "linear_probe")
HEADS = (*ON_FEATURES, *PROMPTS)
"""What gives no adapter file."""

# CLIP-LoRA: rank 2 on query, key and value of every block of both towers, scale 1 / sqrt 2, 500 updates a shot.
CLIP_LORA = "lora:rank=2,alpha=1,rslora=True,dropout=0.25,targets=query key value"
PER_SHOT, PER_SHOT_NORMS = 500, 300
CLIPFIT_BIASES = "transformer.resblocks.*.mlp.c_proj.bias"


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
    losses: list[float] = field(default_factory=list)
    """Of every update, where a loop of updates learnt."""

    @property
    def parameters(self) -> int:
        learnt = self.tensors.values() if self.tuner is None else self.tuner.parameters()
        return sum(t.numel() for t in learnt)


@dataclass
class Fitter:
    """Everything that learns; none of it is ever given a test set.

    Logits have the model's own scale, exp(logit_scale), which is the 100 of the official codes in OpenAI's models.

    `folder` is where a killed run finds its checkpoint.
    """

    config: Config
    clip: Clip
    accelerator: Any
    watch: Callable[[int, int, float], None] | None = None
    folder: Path | None = None
    cache: FeatureCache = field(default_factory=FeatureCache)

    def __post_init__(self) -> None:
        self.templates = read_templates(self.config.templates)
        self.name = method_name(self.config.method)
        self.factor = logit_scale(self.clip.model)[0]
        if self.name not in HEADS and self.name != "clipfit":
            self.method = parse_method(CLIP_LORA if self.config.method == "clip_lora" else self.config.method)
            if self.method.trains == "head":
                raise ClipError(f"{self.config.method!r} trains a classifier, and CLIP has none: use linear_probe")
        self._steps(1)  # refuses numbers that make no sense before anything is computed

    def fit(self, train: ImageSet, val: ImageSet, classes: Sequence[str]) -> Fitted:
        """Tune on the training images; strengths and epochs from the validation images."""
        if self.name in ON_FEATURES:
            return {"gda": self._gda, "clip_adapter": self._clip_adapter, "linear_probe": self._probe}.get(
                self.name, self._tip)(train, val, classes)  # fmt: skip
        torch.manual_seed(self.config.seed)
        return {"clipfit": self._clipfit, "coop": self._coop, "ivlp": self._ivlp, "promptsrc": self._promptsrc}.get(
            self.name, self._adapter)(train, classes)  # fmt: skip

    def restore(self, tensors: dict[str, Tensor], chosen: dict[str, float], classes: Sequence[str]) -> Fitted:
        """A head, or prompts, from what `fit` gave; other classes than those are not known to it."""
        if self.name == "gda":
            return self._of_gda(GDA(tensors["v"], tensors["b"], chosen["alpha"]), self._weights(classes))
        if self.name in ("tip", "tip_f"):
            tip = TipAdapter(tensors["keys"], tensors["values"], chosen["alpha"], chosen["beta"])
            return self._of_tip(tip, self._weights(classes))
        if self.name == "linear_probe":
            return self._of_probe(LinearProbe(tensors["a"], tensors["b"]))
        module: Any = self._empty(classes, tensors)
        module.load_state_dict(tensors)
        if self.name == "clip_adapter":
            return self._of_adapter(module, self._weights(classes))
        return self._of_prompts(module)

    def _empty(self, classes: Sequence[str], tensors: dict[str, Tensor]) -> nn.Module:
        if self.name == "clip_adapter":
            return CLIPAdapter(tensors["down.weight"].shape[1])
        return CoOp(self.clip, classes) if self.name == "coop" else IVLP(self.clip, classes)

    def zero_shot(self) -> Fitted:
        return Fitted(lambda images, classes, seen: self._plain(images, classes), {})

    def _plain(self, images: ImageSet, classes: Sequence[str]) -> Tensor:
        return FACTOR * self._features(images) @ self._weights(classes)

    def _features(self, images: ImageSet) -> Tensor:
        return image_features(self.clip.model, images, self.clip.preprocessing, self.cache)

    def _unit(self, classes: Sequence[str]) -> Tensor:
        """The zero-shot classifier (d, C), columns of unit length."""
        return zero_shot_weights(self.clip.model, self.clip.tokenizer, classes, self.templates).float().cpu()

    def _weights(self, classes: Sequence[str]) -> Tensor:
        """The same for heads whose formulas have the factor 100: with it comes the model's own."""
        return self._unit(classes) * (self.factor / FACTOR)

    # ---- updates -----------------------------------------------------------------------------------------------------

    def _steps(self, default: int, batch: int = 32, **other: Any) -> Steps:
        given = {"lr": self.config.lr} if self.config.lr is not None else {}
        augment = "resized_crop" if self.config.augment else None
        batch = self.config.batch_size or batch
        return Steps(self.config.iterations or default, batch, augment=augment, **{**other, **given})

    def _sgd(self, train: ImageSet, epochs: int, batch: int = 32, lr: float = 2e-3) -> Steps:
        """The schedule of CoOp's trainer, which those of CLIPFit, IVLP and PromptSRC have too."""
        epoch = -(-len(train) // (self.config.batch_size or batch))
        return self._steps(epochs * epoch, batch, lr=lr, optimizer="sgd", weight_decay=5e-4, min_lr=0.0, warmup=epoch)

    def _descend(self, module: nn.Module, steps: Steps, train: ImageSet, objective: Callable[[Tensor], Tensor],
                 average: EpochAverage | None = None) -> list[float]:  # fmt: skip
        loop = Loop(module, steps, self.config.seed, self.accelerator, {"method": self.config.method}, self.folder,
                    self.config.checkpoint_seconds, average, self.watch)  # fmt: skip
        return descend(loop, len(train), objective)

    def _cross_entropy(self, features: Callable[[Tensor], Tensor], weights: Callable[[], Tensor],
                       labels: Tensor) -> Callable[[Tensor], Tensor]:  # fmt: skip
        return lambda rows: F.cross_entropy(self.factor * features(rows) @ weights(), labels[rows])

    def _labels(self, train: ImageSet) -> Tensor:
        return torch.from_numpy(train.labels).to(self.accelerator.device)

    # ---- adapters ----------------------------------------------------------------------------------------------------

    def _adapter(self, train: ImageSet, classes: Sequence[str]) -> Fitted:
        tuner = vp.attach(self.clip.model, self.method, train="" if self.method.trains is None else None)
        per_shot = PER_SHOT_NORMS if isinstance(self.method, LNTuning) else PER_SHOT
        return self._tune(tuner, self._steps(per_shot * self.config.shots), train, classes)

    def _clipfit(self, train: ImageSet, classes: Sequence[str]) -> Fitted:
        """CLIPFit: the image tower's norms and the text tower's last MLP biases, near the frozen class features."""
        text = "text." if hasattr(self.clip.model, "text") else ""
        with torch.no_grad():
            frozen = self._class_features(classes)()
        tuner = vp.attach(self.clip.model, LNTuning(tower="image"), train=text + CLIPFIT_BIASES)
        return self._tune(tuner, self._sgd(train, 100), train, classes, frozen)

    def _class_features(self, classes: Sequence[str]) -> Callable[[], Tensor]:
        """The unit-length features (C, d) of the first template's prompts as the text tower is now, with gradients;
        computed once where nothing moves them.
        """
        model = self.clip.model
        ids = tokenize(self.clip.tokenizer, class_prompts(classes, self.templates[:1]), model.context_length)
        ids = ids.to(self.accelerator.device)
        if not may_cache(model, "text"):
            return lambda: F.normalize(encode_tokens(model, ids), dim=-1)
        with torch.no_grad():
            kept = F.normalize(encode_tokens(model, ids), dim=-1)
        return lambda: kept

    def _tune(self, tuner: vp.Tuner, steps: Steps, train: ImageSet, classes: Sequence[str],
              frozen: Tensor | None = None) -> Fitted:  # fmt: skip
        model, labels, texts = self.clip.model, self._labels(train), self._class_features(classes)
        images = encoder(self.clip, train, steps.augment, self.accelerator.device)

        def objective(rows: Tensor) -> Tensor:
            found = texts()
            logits = self.factor * images(rows) @ found.t()
            if frozen is not None:
                return clipfit_loss(logits, labels[rows], found, frozen)
            return F.cross_entropy(logits, labels[rows])

        model.train()
        losses = self._descend(model, steps, train, objective)
        model.eval()
        return Fitted(self.zero_shot().logits, tuner.state_dict(), tuner=tuner, losses=losses)

    # ---- prompts -----------------------------------------------------------------------------------------------------

    def _coop(self, train: ImageSet, classes: Sequence[str]) -> Fitted:
        coop, labels = CoOp(self.clip, classes), self._labels(train)
        steps = self._sgd(train, 50)
        images = encoder(self.clip, train, steps.augment, self.accelerator.device)
        objective = self._cross_entropy(images, coop, labels)
        return self._of_prompts(coop, self._descend(coop, steps, train, objective))

    def _ivlp(self, train: ImageSet, classes: Sequence[str]) -> Fitted:
        ivlp, labels = IVLP(self.clip, classes), self._labels(train)
        steps = self._sgd(train, 20, 4, 2.5e-3)
        images = pixels(self.clip, train, steps.augment, self.accelerator.device)
        objective = self._cross_entropy(lambda rows: ivlp.image(images(rows)), ivlp, labels)
        return self._of_prompts(ivlp, self._descend(ivlp, steps, train, objective))

    def _promptsrc(self, train: ImageSet, classes: Sequence[str]) -> Fitted:
        ivlp, labels = IVLP(self.clip, classes), self._labels(train)
        steps = self._sgd(train, 20 if self.config.base_to_new else 50, 4, 2.5e-3)
        images = pixels(self.clip, train, steps.augment, self.accelerator.device)
        teacher = self.teacher(classes)

        def objective(rows: Tensor) -> Tensor:
            x, w = images(rows), ivlp()
            with torch.no_grad():
                frozen = F.normalize(self.clip.model.encode_image(x), dim=-1)
            found = ivlp.image(x)
            return promptsrc_loss(self.factor * found @ w, labels[rows], w.t(), teacher.t(), found, frozen,
                                  self.factor * frozen @ teacher)  # fmt: skip

        average = self.epoch_average(steps, len(train))
        return self._of_prompts(ivlp, self._descend(ivlp, steps, train, objective, average))

    def teacher(self, classes: Sequence[str]) -> Tensor:
        """The frozen class features (d, C): open_clip's 80 templates, each of unit length before the mean.

        The official code takes the mean of 60 templates' features as they are.
        """
        w = zero_shot_weights(self.clip.model, self.clip.tokenizer, classes, read_templates("openai"))
        return w.to(self.accelerator.device)

    def epoch_average(self, steps: Steps, images: int) -> EpochAverage:
        """The paper's Gaussian (base-to-new 15 and 1 of 20 epochs, else 30 and 30 of 50), stretched to these epochs."""
        per_epoch = -(-images // steps.batch)
        epochs = -(-steps.count // per_epoch)
        mean, deviation = (15 / 20, 1 / 20) if self.config.base_to_new else (30 / 50, 30 / 50)
        return EpochAverage(gaussian_weights(epochs, mean * epochs, deviation * epochs), per_epoch)

    def _of_prompts(self, prompts: Any, losses: list[float] | None = None) -> Fitted:
        own = None if isinstance(prompts, CoOp) else prompts.image

        @torch.no_grad()
        def logits(images: ImageSet, names: Sequence[str], seen: bool) -> Tensor:
            x = self._features(images) if own is None else image_features(
                self.clip.model, images, self.clip.preprocessing, encode=own)  # fmt: skip
            return self.factor * x @ prompts.name(names)().float().cpu()

        tensors = {name: p.detach().clone() for name, p in prompts.state_dict().items()}
        return Fitted(logits, tensors, losses=losses or [])

    # ---- heads on features -------------------------------------------------------------------------------------------

    def _tip(self, train: ImageSet, val: ImageSet, classes: Sequence[str]) -> Fitted:
        w, y, (f, val_y) = self._weights(classes), torch.from_numpy(train.labels), self._validation(val)
        tip = TipAdapter.build(views(self.clip, train, self.config.views, self.config.seed), y, len(classes))
        if self.name == "tip_f":
            lr = self.config.lr or 1e-3
            tip = tip.fine_tune(self._features(train), y, w, f, val_y, lr=lr, seed=self.config.seed)
        return self._of_tip(tip.search(f, val_y, w), w)

    def _of_tip(self, tip: TipAdapter, w: Tensor) -> Fitted:
        def logits(images: ImageSet, names: Sequence[str], seen: bool) -> Tensor:
            return tip.logits(self._features(images), w) if seen else self._plain(images, names)

        return Fitted(logits, {"keys": tip.keys, "values": tip.values}, {"alpha": tip.alpha, "beta": tip.beta})

    def _gda(self, train: ImageSet, val: ImageSet, classes: Sequence[str]) -> Fitted:
        w, (f, val_y) = self._weights(classes), self._validation(val)
        x = views(self.clip, train, self.config.views, self.config.seed)
        y = torch.from_numpy(train.labels).repeat(len(x))
        fit = GDA.fit_base if self.config.base_to_new else GDA.fit
        gda = fit(x.flatten(0, 1), y, len(classes)).search(f, val_y, w)
        return self._of_gda(gda, w, x.flatten(0, 1))

    def _of_gda(self, gda: GDA, w: Tensor, x: Tensor | None = None) -> Fitted:
        def logits(images: ImageSet, names: Sequence[str], seen: bool) -> Tensor:
            if seen:
                return gda.logits(self._features(images), w)
            assert x is not None
            unseen = replace(GDA.fit_new(x, self._unit(names)), alpha=gda.alpha)
            return unseen.logits(self._features(images), self._weights(names))

        return Fitted(logits, {"v": gda.v, "b": gda.b}, {"alpha": gda.alpha})

    def _clip_adapter(self, train: ImageSet, val: ImageSet, classes: Sequence[str]) -> Fitted:
        w, y, (f, val_y) = self._weights(classes), torch.from_numpy(train.labels), self._validation(val)
        torch.manual_seed(self.config.seed)
        head = CLIPAdapter(len(w))
        head.fit(self._features(train), y, w, f, val_y, lr=self.config.lr or 1e-3, seed=self.config.seed)
        return self._of_adapter(head, w)

    def _of_adapter(self, head: CLIPAdapter, w: Tensor) -> Fitted:
        @torch.no_grad()
        def logits(images: ImageSet, names: Sequence[str], seen: bool) -> Tensor:
            return FACTOR * head(self._features(images)) @ (w if seen else self._weights(names))

        return Fitted(logits, head.state_dict())

    def _probe(self, train: ImageSet, val: ImageSet, classes: Sequence[str]) -> Fitted:
        y, (f, val_y) = torch.from_numpy(train.labels), self._validation(val)
        return self._of_probe(LinearProbe.fit(self._features(train), y, len(classes), f, val_y))

    def _of_probe(self, probe: LinearProbe) -> Fitted:
        """Of other classes it knows nothing: there the zero-shot classifier stands."""

        def logits(images: ImageSet, names: Sequence[str], seen: bool) -> Tensor:
            return probe.logits(self._features(images)) if seen else self._plain(images, names)

        return Fitted(logits, {"a": probe.a, "b": probe.b})

    def _validation(self, val: ImageSet) -> tuple[Tensor, Tensor]:
        return self._features(val), torch.from_numpy(val.labels)
