"""Contrastive tuning of a CLIP model on images with captions.

    result = run(Config(model="ViT-B-32", checkpoint="laion2b_s34b_b79k", captions="birds.csv", method="lora:rank=8"))

A batch is as large as the loss needs it, and computed in pieces as small as memory wants: the gradients are those of
the whole batch (`visionpeft.clip.losses.in_pieces`). Every epoch takes one caption of each image, drawn at random, so
that no batch has an image twice. Retrieval on held-out images, which are never trained on, tells what was gained.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import visionpeft as vp
from visionpeft.clip.data import Pairs, read_pairs
from visionpeft.clip.errors import ClipError
from visionpeft.clip.features import image_features, text_features
from visionpeft.clip.losses import check_pieces, in_pieces, loss_of
from visionpeft.clip.model import Clip, build
from visionpeft.clip.scores import retrieval_scores
from visionpeft.clip.stepping import Loop, Steps, Watch, alone
from visionpeft.clip.text import encode_tokens, tokenize
from visionpeft.pipelines.methods import parse_method
from visionpeft.report.clip import contrast_page
from visionpeft.training import make_accelerator, runs


@dataclass(frozen=True)
class Config:
    """What to tune, on what, and how."""

    captions: str = ""
    """Images with captions: a CSV (image,caption), a JSON list, or a folder with a .txt beside each image."""
    images: str | None = None
    """Folder of the images, if it is not that of the file."""
    model: str = "nano_clip"
    """nano_clip, or a model of open_clip, also local-dir:PATH or hf-hub:NAME with its weights."""
    checkpoint: str | None = None
    """Weights: a local file, one of open_clip's tags, or random; models without any are refused."""
    method: str = "lora:rank=8,targets=query key value attn_out mlp_in mlp_out"
    """An adapter with its settings; tower=image or tower=text narrows it."""
    train: str | None = None
    """Tensors that learn besides, such as logit_scale."""
    loss: str = "clip"
    """clip, or siglip for models with a logit_bias."""
    batch_size: int = 256
    """Pairs that the loss compares."""
    piece: int = 64
    """Pairs computed at once; another number changes memory and time, not the gradients."""
    epochs: int = 10
    lr: float = 5e-4
    weight_decay: float = 0.01
    warmup: int = 10
    """Updates at a hundredth of the learning rate."""
    augment: str | None = "resized_crop"
    """flip, crop, resized_crop or randaugment."""
    held_out: float = 0.1
    """Share of the images that only retrieval sees."""
    seed: int = 0
    precision: str = "fp32"
    """fp32 or bf16."""
    out: str = "runs/contrastive"
    checkpoint_seconds: float = 60.0
    """Least time between two checkpoints, from which a killed run goes on to the same numbers."""

    def identity(self) -> dict[str, Any]:
        """What decides the numbers: all but where to and how often."""
        return {key: value for key, value in asdict(self).items() if key not in ("out", "checkpoint_seconds")}


@dataclass
class Result:
    """Retrieval on held-out images before and after, as fractions."""

    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    """Of every update."""
    images: int = 0
    held_out: int = 0
    parameters: int = 0
    seconds: float = 0.0
    folder: str = ""


def run(config: Config, watch: Watch | None = None) -> Result:
    """Tune, evaluate, and write config.json, result.json, report.html and adapter.safetensors.

    A killed run goes on from its checkpoint, a finished one only gives its result.

    Args:
        watch: called with (updates done, all updates, loss).

    Raises:
        VisionPEFTError: pairs, method or loss that do not fit, a loss that is no number, a folder of another run.
    """
    _check(config)
    accelerator = alone(make_accelerator(config.precision))
    train, held = split(read_pairs(config.captions, config.images), config.held_out, config.seed)
    method = parse_method(config.method)
    clip = build(config.model, config.checkpoint)
    clip.model.to(accelerator.device)
    loss_of(clip.model, config.loss)  # refuses a loss that does not fit
    folder = Path(config.out)
    runs.claim(folder, config.identity())
    if (folder / "result.json").exists():
        return Result(**runs.read_json(folder / "result.json"))
    result = Result(images=len(train.images), held_out=len(held.images), folder=config.out)
    result.before = retrieve(clip, held)
    torch.manual_seed(config.seed)
    tuner = vp.attach(clip.model, method, train=config.train)
    begin = time.perf_counter()
    result.losses = tune(clip, tuner, train, config, accelerator, watch)
    result.seconds, result.parameters = time.perf_counter() - begin, tuner.num_parameters
    result.after = retrieve(clip, held)
    told = {"task": "clip", "job": "contrastive", "model": config.model, "checkpoint": config.checkpoint}
    tuner.save(folder / "adapter.safetensors", loss=config.loss, **told)
    runs.write_text(folder / "report.html", contrast_page(result, config.method))
    runs.write_json(folder / "result.json", asdict(result))  # last, since it marks the run as finished
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    return result


def _check(config: Config) -> None:
    if not config.captions:
        raise ClipError("captions= is empty: give a CSV, a JSON file, or a folder with a .txt beside each image")
    if config.precision == "fp16":
        raise ClipError("precision=fp16: pieces of a batch have no loss scale, which half precision needs; use bf16")


def split(pairs: Pairs, share: float, seed: int) -> tuple[Pairs, Pairs]:
    """Pairs to train on and pairs held out, by image.

    Raises:
        ClipError: fewer than ten images on a side, the least that recall at 10 can be told of.
    """
    order = np.random.default_rng(seed).permutation(len(pairs.images))
    count = round(share * len(order))
    if count < 10 or len(order) - count < 10:
        raise ClipError(f"{count} of {len(order)} images held out: at least 10 are needed there, and 10 to train on")
    return pairs.take(np.sort(order[count:])), pairs.take(np.sort(order[:count]))


def retrieve(clip: Clip, pairs: Pairs) -> dict[str, float]:
    """Recall at 1, 5 and 10, both ways."""
    ids = tokenize(clip.tokenizer, pairs.captions, clip.model.context_length, cut=True)
    images = image_features(clip.model, pairs.images, clip.preprocessing)
    return retrieval_scores(images, text_features(clip.model, ids), torch.from_numpy(pairs.owner))


def tune(clip: Clip, tuner: vp.Tuner, pairs: Pairs, config: Config, accelerator: Any,
         watch: Watch | None = None) -> list[float]:  # fmt: skip
    """Train the adapter; returns the loss of every update."""
    model = clip.model
    size = min(config.batch_size, len(pairs.images))
    per_epoch = len(pairs.images) // size
    steps = Steps(config.epochs * per_epoch, size, config.lr, config.weight_decay, min_lr=0.0,
                  warmup=min(config.warmup, config.epochs * per_epoch // 2), warmup_lr=config.lr / 100)  # fmt: skip
    loss = loss_of(model, config.loss)
    pictures = pairs.images.with_transform(clip.preprocessing.transform(config.augment))
    ids = tokenize(clip.tokenizer, pairs.captions, model.context_length, cut=True)

    def encode(pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        with accelerator.autocast():
            found = model.encode_image(pixels), encode_tokens(model, tokens)
        return F.normalize(found[0].float(), dim=-1), F.normalize(found[1].float(), dim=-1)

    model.train()
    check_pieces(model)
    todo = batches(pairs, size, config.epochs, config.seed)

    def update(step: int) -> Tensor:
        rows, texts = todo[step]
        images = torch.stack([pictures[int(i)][0] for i in rows]).to(accelerator.device)
        tokens = ids[torch.from_numpy(texts)].to(accelerator.device)
        return in_pieces(encode, list(zip(images.split(config.piece), tokens.split(config.piece), strict=True)), loss)

    told = {"loss": config.loss, "images": len(pairs.images)}
    loop = Loop(model, steps, config.seed, accelerator, told, Path(config.out), config.checkpoint_seconds, watch=watch)
    losses = loop.run(update)
    model.eval()
    return losses


def batches(pairs: Pairs, size: int, epochs: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(images, captions) of every update: an image once an epoch, with one of its captions; short rests are dropped."""
    rng = np.random.default_rng(seed)
    own = [np.flatnonzero(pairs.owner == i) for i in range(len(pairs.images))]
    found = []
    for _ in range(epochs):
        order = rng.permutation(len(own))
        for start in range(0, len(order) - size + 1, size):
            rows = order[start : start + size]
            found.append((rows, np.array([rng.choice(own[i]) for i in rows])))
    return found
