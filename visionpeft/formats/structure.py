"""Conversion of files without the model at hand: its modules are built from configs, without weights.

Adapters that say a change of the weight in terms of that weight (SVFit) need the weights too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from visionpeft import formats
from visionpeft.errors import FormatError, require
from visionpeft.methods.svfit import SVFit
from visionpeft.state import read_header

_COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


def convert(source: str | Path, out: str | Path, base: str | Path, to: str) -> str:
    """Rewrite an adapter file for another tool.

    Args:
        source: adapter file or PEFT folder; its format is found out.
        base: folder of a diffusers pipeline or model, of a transformers model, or a timm name.

    Returns:
        What was done, in a line.

    Raises:
        FormatError: either side cannot say it, with the reason; nothing is written then.
    """
    if to != "visionpeft":
        formats.module(to)
    kind = formats.format_of(source)
    weights = kind == "visionpeft" and read_header(source)["method"] == SVFit.key
    model = structure(base, weights)
    if isinstance(model, dict) and len(model) == 1:
        model = next(iter(model.values()))
    if isinstance(model, dict) and (kind in ("peft",) or to == "peft"):
        model = model.get("unet", model.get("transformer"))
    tuner = formats.load(model, source, probe=False)
    formats.save(tuner, out, to)
    return f"{out}: {kind} -> {to}, {tuner.method.summary()} at {len(tuner.sites)} sites of {Path(base).name}"


def structure(base: str | Path, weights: bool = False) -> Any:
    """The modules of a pipeline by name, or one model, with memory for weights, and nothing in it unless wanted.

    Raises:
        FormatError: no such folder, and timm has no model of that name.
    """
    if not str(base):
        raise FormatError("give --base: the folder of the model that the file is for; only its configs are read")
    folder = Path(base)
    if (folder / "model_index.json").exists():
        index = json.loads((folder / "model_index.json").read_text())
        names = [n for n in _COMPONENTS if n in index and index[n][0] in ("diffusers", "transformers")]
        return {name: _model(folder / name, weights) for name in names}
    if (folder / "config.json").exists():
        return _model(folder, weights)
    if weights:
        raise FormatError(f"{base}: this adapter needs the weights of its base: give the folder that holds them")
    timm = require("timm", "timm")
    if not timm.is_model(str(base)):
        raise FormatError(f"{base}: no folder with model_index.json or config.json, and no model of timm")
    with torch.device("meta"):
        model: nn.Module = timm.create_model(str(base))
    return model.to_empty(device="cpu")


def _model(folder: Path, weights: bool) -> nn.Module:
    config = json.loads((folder / "config.json").read_text())
    ours = "_class_name" in config
    library = require("diffusers" if ours else "transformers", "diffusion")
    cls = getattr(library, config["_class_name"] if ours else config["architectures"][0])
    if weights:
        return _filled(cls, folder)
    with torch.device("meta"):
        model: nn.Module = cls.from_config(config) if ours else cls(cls.config_class.from_pretrained(str(folder)))
    return model.to_empty(device="cpu")


def _filled(cls: Any, folder: Path) -> nn.Module:
    try:
        model: nn.Module = cls.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise FormatError(f"{folder}: this adapter needs the weights of its base, and they are not there") from error
    return model.float()
