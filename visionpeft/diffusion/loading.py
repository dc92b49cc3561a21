"""Pipelines from disk: a folder of diffusers, one .safetensors file with the config of its kind, or the bundled one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from visionpeft.diffusion.errors import DiffusionError
from visionpeft.errors import require

NANO = "nano"


def load_pipeline(base: str = NANO, config: str | None = None) -> Any:
    """The pipeline in float32 and eval, without progress bars and without a safety checker. Nothing is downloaded.

    Args:
        base: "nano" for the bundled one, a folder that `save_pretrained` wrote, or a single .safetensors file.
        config: for a single file the folder of a pipeline of its kind; only its configs and tokenizers are read.

    Raises:
        DiffusionError: nothing there, no pipeline, a single file without config or of another architecture.
        MissingExtra: diffusers is not installed.
    """
    if base == NANO:
        from visionpeft.models import nano_diffusion

        return nano_diffusion.create()
    path = Path(base).expanduser()
    pipe = _from_folder(path) if path.is_dir() else _from_file(path, config)
    pipe.set_progress_bar_config(disable=True)
    for part in parts(pipe).values():
        part.eval()
        if any(p.dtype != torch.float32 for p in part.parameters()):
            part.float()
    return pipe


def parts(pipe: Any) -> dict[str, nn.Module]:
    """The modules of a pipeline by name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def digest(module: nn.Module) -> str:
    """A fingerprint of all weights, for the names of cached files."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def _index(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DiffusionError(
            f"{folder} holds no diffusers pipeline ({error}): expected a folder with model_index.json"
        ) from error


def _pipeline_class(index: dict[str, Any], folder: Path) -> Any:
    diffusers = require("diffusers", extra="diffusion")
    name = index.get("_class_name", "")
    found = getattr(diffusers, name, None)
    if found is None:
        raise DiffusionError(f"{folder}: the installed diffusers has no pipeline {name!r}")
    return found


def _unchecked(index: dict[str, Any]) -> dict[str, Any]:
    """A safety checker blanks training previews, and is not what is personalised."""
    has = "safety_checker" in index
    return dict(safety_checker=None, requires_safety_checker=False) if has else {}


def _from_folder(folder: Path) -> Any:
    index = _index(folder)
    try:
        return _pipeline_class(index, folder).from_pretrained(
            str(folder), local_files_only=True, **_unchecked(index)
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise DiffusionError(f"the pipeline in {folder} cannot be loaded: {_short(error)}") from error


def _from_file(path: Path, config: str | None) -> Any:
    if not path.is_file():
        raise DiffusionError(f"{path}: no such folder or file; give a diffusers folder, a .safetensors file, or nano")
    if path.suffix != ".safetensors":
        raise DiffusionError(f"{path}: only .safetensors are opened; other checkpoints run code when they are read")
    if config is None:
        raise DiffusionError(f"{path}: a single file needs base_config, the folder of a pipeline of its kind")
    folder = Path(config).expanduser()
    index = _index(folder)
    try:
        pipe = _pipeline_class(index, folder).from_single_file(
            str(path), config=str(folder), local_files_only=True, **_unchecked(index)
        )
    except Exception as error:  # the conversion raises almost anything on keys that it does not expect
        raise DiffusionError(f"{path} is no checkpoint of {folder.name}'s architecture: {_short(error)}") from error
    for name, part in parts(pipe).items():
        left = [key for key, p in part.named_parameters() if p.is_meta]
        if left:
            raise DiffusionError(
                f"{path} is no checkpoint of {folder.name}'s architecture: nothing for {len(left)} tensors of {name}, "
                f"such as {left[0]}"
            )
    return pipe


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) < 300 else f"{text[:297]}..."
