"""Zero-shot evaluation of CLIP models, without and with an adapter.

    result = run(Config(model="ViT-B-32", checkpoint="openai", data=("folder-all:~/birds",), templates="openai"))
    result = run(Config(model="ViT-B-32", checkpoint="openai", data=("eurosat",), adapter="run/adapter.safetensors"))

With an adapter: scores before, after and their difference on every set, and accuracy over `tuner.scale` from 0 to 1,
the straight line of WiSE-FT (arXiv 2109.01903) wherever the adapter is a change of weights. Tensors that learnt by
`train=` have no scale: they are as tuned all along the curve, which then does not begin at the scores before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import visionpeft as vp
from visionpeft.clip.data import Labelled, Pairs, load_images, read_pairs
from visionpeft.clip.errors import ClipError
from visionpeft.clip.features import FeatureCache, image_features, text_features
from visionpeft.clip.model import Clip, build, logit_scale
from visionpeft.clip.scores import classification_scores, retrieval_scores
from visionpeft.clip.stepping import alone
from visionpeft.clip.templates import Template, read_templates
from visionpeft.clip.text import class_prompts, ensemble, tokenize
from visionpeft.data.sets import FileSource, ImageSet
from visionpeft.report.zero_shot import report
from visionpeft.training import make_accelerator, runs

Watch = Callable[[str], None]


@dataclass(frozen=True)
class Config:
    """What to evaluate."""

    model: str = "nano_clip"
    """nano_clip, or a model of open_clip, also local-dir:PATH or hf-hub:NAME with its weights."""
    checkpoint: str | None = None
    """Weights: a local file, one of open_clip's tags, or random; models without any are refused."""
    data: tuple[str, ...] = ("bundled",)
    """Sets to classify: folder-all:PATH for a folder of class folders, or as in `visionpeft classify`. The first is the
    one that the adapter was tuned on; the others show what it forgot."""
    captions: tuple[str, ...] = ()
    """Captioned images for retrieval: a CSV, a JSON file, or a folder with a .txt beside each image. Captions beyond
    the context are cut, as is usual."""
    root: str | None = None
    """Folder that holds the data sets."""
    classes: str | None = None
    """Names to prompt with for the first set: a file, one a line or JSON, in the order of the data's classes, or
    imagenet for open_clip's names; else the data's own."""
    templates: str = "openai"
    """openai, simple, coop:SET, a JSON file, or one template such as "a photo of a {}."."""
    adapter: str | None = None
    """Adapter file to compare with the model alone."""
    tune: str | None = None
    """Tune an adapter on the first set's training images instead, by a method as in `visionpeft few-shot`."""
    shots: int = 16
    """Images per class to tune on."""
    iterations: int | None = None
    """Updates to tune for; 500 a shot."""
    lr: float | None = None
    """Learning rate to tune with."""
    points: int = 11
    """Points of the curve over the adapter's scale from 0 to 1; 0 leaves it out."""
    batch_size: int = 64
    cache: str | None = None
    """Folder that keeps features between runs."""
    out: str = "runs/zero_shot"
    """Folder for result.json and report.html."""


@dataclass
class Result:
    """Scores by set, as fractions: `before` of the model alone, `after` with the adapter."""

    model: str
    templates: int
    images: dict[str, int] = field(default_factory=dict)
    before: dict[str, dict[str, float]] = field(default_factory=dict)
    after: dict[str, dict[str, float]] = field(default_factory=dict)
    curve: list[dict[str, Any]] = field(default_factory=list)
    """{"scale": s, "scores": {set: top-1}} for s from 0 to 1."""
    notes: list[str] = field(default_factory=list)
    """What is to be known of the curve: why there is none, or what has no scale in it."""
    adapter: str = ""
    parameters: int = 0
    folder: str = ""

    def difference(self) -> dict[str, dict[str, float]]:
        """after - before."""
        return {name: {k: scores[k] - self.before[name][k] for k in scores} for name, scores in self.after.items()}


def run(config: Config, watch: Watch | None = None) -> Result:
    """Evaluate, and write result.json and report.html.

    Args:
        watch: called with a line on what is done now.

    Raises:
        VisionPEFTError: a model, set, class list, template or adapter that does not fit, by name.
    """
    watch = watch or (lambda line: None)
    templates = read_templates(config.templates)
    sets = [load_images(spec, config.root, config.classes if i == 0 else None) for i, spec in enumerate(config.data)]
    pairs = {source: read_pairs(source) for source in config.captions}
    if not (sets or pairs):
        raise ClipError("nothing to evaluate: give data or captions")
    if config.tune is not None:
        config = replace(config, tune=None, adapter=_tuned(config, watch))
    if config.adapter is not None:
        _check_adapter(config.adapter)
    clip = on_device(build(config.model, config.checkpoint))
    evaluator = Evaluator(clip, sets, pairs, templates, FeatureCache(config.cache), config.batch_size)
    result = Result(config.model, len(templates), evaluator.sizes(), folder=config.out)
    watch(f"{config.model} alone")
    result.before = evaluator.scores()
    if config.adapter is not None:
        _with_adapter(config.adapter, config.points, evaluator, result, watch)
    folder = Path(config.out)
    told = {"task": "clip", "job": "zero-shot", "classes": sets[0].classes if sets else []}
    runs.write_json(folder / "config.json", asdict(config) | told)
    runs.write_json(folder / "result.json", asdict(result))
    runs.write_text(folder / "report.html", report(result))
    return result


def _check_adapter(file: str) -> None:
    """Refuse what is no adapter before anything is computed."""
    from visionpeft.pipelines.few_shot import HEAD

    if Path(file).name == HEAD:
        raise ClipError(f"{file} holds a head or prompts, no adapter: the scores before and after are in result.json "
                        "beside it, and `visionpeft predict` uses it")  # fmt: skip
    vp.state.read_header(file)


def on_device(clip: Clip) -> Clip:
    """With its model where accelerate would have it."""
    clip.model.to(alone(make_accelerator()).device)
    return clip


@torch.no_grad()
def probabilities(config: Config, paths: Sequence[str], classes: Sequence[str]) -> torch.Tensor:
    """What each image file shows, (N, C) over the classes named.

    `config` gives the model, its adapter and the templates; its data are not read.

    Raises:
        VisionPEFTError: an image that cannot be read, bad classes or templates, an adapter of another model.
    """
    clip = on_device(build(config.model, config.checkpoint))
    if config.adapter is not None:
        vp.load(clip.model, config.adapter, name="adapter")
    evaluator = Evaluator(clip, (), {}, read_templates(config.templates), FeatureCache(config.cache), config.batch_size)
    return evaluator.logits(photos(paths), classes).softmax(1)


def photos(paths: Sequence[str]) -> ImageSet:
    """Image files without labels, turned the way the camera was held."""
    return ImageSet(FileSource(paths, exif=True), np.zeros(len(paths), dtype=np.int64))


def _tuned(config: Config, watch: Watch) -> str:
    """Tune an adapter on the first set, and give its file."""
    from visionpeft.pipelines import few_shot

    first = config.data[0] if config.data else ""
    if config.adapter is not None or config.tune in few_shot.HEADS or not first or first.startswith("folder-all:"):
        raise ClipError(
            f"tune={config.tune!r} needs data with training images (not {first!r}; write folder:PATH), a method that "
            "gives an adapter, and no adapter= besides"
        )
    watch(f"tuning on {first}")
    out = str(Path(config.out) / "tuning" / runs.slug(f"{config.model}-{first}-{config.tune}-{config.shots}shots"))

    def told(done: int, total: int, loss: float) -> None:
        if done % max(total // 6, 1) == 0:
            watch(f"{done} of {total} updates, loss {loss:.3f}")

    few_shot.run(few_shot.Config(
        config.model, config.checkpoint, first, config.root, str(config.tune), config.shots,
        iterations=config.iterations, lr=config.lr, out=out, classes=config.classes), told)  # fmt: skip
    return str(Path(out) / "adapter.safetensors")


def _with_adapter(file: str, points: int, evaluator: Evaluator, result: Result, watch: Watch) -> None:
    tuner = vp.load(evaluator.clip.model, file, name="adapter")
    result.adapter, result.parameters = tuner.method.summary(), tuner.num_parameters
    watch(f"with {result.adapter}")
    result.after = evaluator.scores()
    known = {1.0: result.after}
    if tuner.trained:
        result.notes.append(f"at every scale as tuned: {len(tuner.trained)} tensors of the model, learnt by train=")
    else:
        known[0.0] = result.before
    try:
        tuner.check_strength(0.5)
    except vp.VisionPEFTError as error:
        result.notes.append(f"no curve: {error}")
    else:
        result.curve = curve(tuner, evaluator, points, known, watch)
    tuner.detach()


@torch.no_grad()
def curve(tuner: vp.Tuner, evaluator: Evaluator, points: int, known: dict[float, dict[str, dict[str, float]]],
          watch: Watch | None = None) -> list[dict[str, Any]]:  # fmt: skip
    """Accuracy of every set at `points` scales from 0 to 1; the adapter's scale is as before afterwards.

    Args:
        known: scores at scales where they are known: at 0 the model is as without the adapter.

    Raises:
        ClipError: one point, which is no curve.
    """
    if points == 0:
        return []
    if points < 2:
        raise ClipError(f"points={points}: a curve needs 2 at least, 0 leaves it out")
    before, found = tuner.scale, []
    try:
        for scale in torch.linspace(0, 1, points, dtype=torch.float64).tolist():
            if (scores := known.get(scale)) is None:
                if watch is not None:
                    watch(f"scale {scale:.2f}")
                tuner.scale = scale
                scores = evaluator.scores()
            found.append({"scale": scale, "scores": {name: main(values) for name, values in scores.items()}})
    finally:
        tuner.scale = before
    return found


def main(scores: dict[str, float]) -> float:
    """The score of a set that a curve shows: top-1, or recall at 1 from image to text."""
    return scores["top1"] if "top1" in scores else scores["image_to_text_r@1"]


@dataclass
class Evaluator:
    """A model and what it is evaluated on."""

    clip: Clip
    sets: Sequence[Labelled]
    pairs: dict[str, Pairs]
    templates: Sequence[Template]
    cache: FeatureCache
    batch: int = 64

    def sizes(self) -> dict[str, int]:
        """Number of images by set."""
        return {s.name: len(s.images) for s in self.sets} | {k: len(p.images) for k, p in self.pairs.items()}

    def scores(self) -> dict[str, dict[str, float]]:
        """Scores of every set with the adapters that act now; NaN (top-5 below five classes) is left out."""
        found = {labelled.name: self._classify(labelled) for labelled in self.sets}
        found |= {name: self._retrieve(pairs) for name, pairs in self.pairs.items()}
        return {name: {k: v for k, v in scores.items() if not math.isnan(v)} for name, scores in found.items()}

    def _images(self, images: ImageSet) -> torch.Tensor:
        return image_features(self.clip.model, images, self.clip.preprocessing, self.cache, self.batch)

    def _texts(self, texts: Sequence[str], cut: bool = False) -> torch.Tensor:
        ids = tokenize(self.clip.tokenizer, texts, self.clip.model.context_length, cut)
        return text_features(self.clip.model, ids, self.cache)

    def weights(self, classes: Sequence[str]) -> torch.Tensor:
        """The zero-shot classifier W (d, C) of `visionpeft.clip.zero_shot_weights`, its prompts from the cache."""
        return ensemble(self._texts(class_prompts(classes, self.templates)), len(classes))

    def logits(self, images: ImageSet, classes: Sequence[str]) -> torch.Tensor:
        """Logits (N, C) with the model's own scale and bias."""
        factor, bias = logit_scale(self.clip.model)
        return factor * self._images(images) @ self.weights(classes) + bias

    def _classify(self, labelled: Labelled) -> dict[str, float]:
        logits = self.logits(labelled.images, labelled.classes)
        return classification_scores(logits, torch.from_numpy(labelled.images.labels))

    def _retrieve(self, pairs: Pairs) -> dict[str, float]:
        texts = self._texts(pairs.captions, cut=True)
        return retrieval_scores(self._images(pairs.images), texts, torch.from_numpy(pairs.owner))
