"""Prediction with what CLIP's jobs left behind: runs of few-shot, contrast and zero-shot, or their adapter files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

import visionpeft as vp
from visionpeft.clip.data import read_names
from visionpeft.clip.errors import ClipError
from visionpeft.clip.templates import PHOTO
from visionpeft.errors import AdapterFileError
from visionpeft.pipelines import few_shot, zero_shot
from visionpeft.pipelines.deploy import Prediction, image_files
from visionpeft.pipelines.fitting import Fitter
from visionpeft.training import make_accelerator, runs


def told(run: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """The file of a CLIP run and what it says of itself, or None if this is no such run."""
    path = Path(run).expanduser()
    files = [path] if path.is_file() else [path / n for n in ("adapter.safetensors", few_shot.HEAD, "config.json")]
    for file in files:
        if file.is_file() and (found := _header(file)).get("task") == "clip":
            return file, found
    return None


def _header(file: Path) -> dict[str, Any]:
    if file.suffix == ".json":
        return dict(runs.read_json(file))
    try:
        with safe_open(str(file), "pt") as opened:
            header = opened.metadata() or {}
        if few_shot.HEADER in header:
            return dict(json.loads(header[few_shot.HEADER]))
        return dict(json.loads(header.get("visionpeft", "{}")).get("metadata", {}))
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterFileError(f"{file}: no readable adapter file ({error})") from error


def predict(run: str | Path, images: str | Path, classes: str | None = None,
            checkpoint: str | None = None) -> list[Prediction]:  # fmt: skip
    """What an image, or each image of a folder, shows.

    Args:
        classes: file with the names to choose among, one a line or a JSON list; None takes those of the run.
        checkpoint: where the model's weights are now, if not where they were.

    Raises:
        VisionPEFTError: no CLIP run, no classes, classes that a head does not know, an image that cannot be read.
    """
    if (found := told(run)) is None:
        raise AdapterFileError(f"{run}: no run of `visionpeft few-shot`, `contrast` or `zero-shot`")
    file, header = found
    names = list(header.get("classes") or []) if classes is None else read_names(classes)
    if not names:
        raise ClipError(f"{file} names no classes: give a file of them, --classes names.txt")
    paths = [str(path) for path in image_files(images)]
    checkpoint = header.get("checkpoint") if checkpoint is None else checkpoint
    if header["job"] == "few-shot":
        chances = _few_shot(file, header, paths, names, checkpoint)
    else:
        adapter = header.get("adapter") if file.suffix == ".json" else str(file)
        templates = header.get("templates", PHOTO)
        config = zero_shot.Config(header["model"], checkpoint, templates=templates, adapter=adapter)
        chances = zero_shot.probabilities(config, paths, names)
    return [_prediction(path, row, names) for path, row in zip(paths, chances, strict=True)]


@torch.no_grad()
def _few_shot(file: Path, header: dict[str, Any], paths: Sequence[str], names: list[str],
              checkpoint: str | None) -> Tensor:  # fmt: skip
    """Probabilities (N, C) of what a few-shot run left behind."""
    config = few_shot.Config(header["model"], checkpoint, method=header["method"], templates=header["templates"])
    clip = zero_shot.on_device(few_shot.build(config.model, config.checkpoint))
    fitter = Fitter(config, clip, make_accelerator())
    if file.name != few_shot.HEAD:
        vp.load(clip.model, file)
        fitted = fitter.zero_shot()
    elif names != header["classes"] and config.method in ("gda", "tip", "tip_f", "linear_probe"):
        raise ClipError(f"{file}: {config.method} knows only the classes that it was made for: leave --classes out")
    else:
        fitted = fitter.restore(load_file(file), header["chosen"], header["classes"])
    seen = names == header["classes"]
    return fitted.logits(zero_shot.photos(paths), names, seen).float().softmax(1)


def _prediction(path: str, chances: Tensor, names: Sequence[str], shown: int = 3) -> Prediction:
    best = chances.topk(min(shown, len(names)))
    (label, chance), *others = [(names[int(i)], float(p)) for p, i in zip(best.values, best.indices, strict=True)]
    return Prediction(path, label, chance, others)
