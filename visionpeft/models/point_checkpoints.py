"""Official weights of the Point-MAE family, by key mapping and without unpickling.

The files hold a dict whose `base_model` is the state dict of the pre-training model: prefixes are taken off, and what
belongs to decoders, contrastive twins and old heads is left where it is.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

from visionpeft.errors import VisionPEFTError

PREFIXES = ("MAE_encoder.", "ACT_encoder.", "GPT_Transformer.", "transformer_q.", "base_model.")
HEADS = ("cls_token", "cls_pos", "cls_head_finetune", "cls_norm", "blocks.cls_head_finetune", "blocks.cls_norm",
         "label_conv", "propagation_0", "convs1", "bns1", "convs2", "bns2", "convs3")
"""What a pre-trained file may lack."""


class CheckpointError(VisionPEFTError):
    """A file of weights cannot be read or does not fit."""


def load(model: nn.Module, path: str | Path) -> tuple[list[str], list[str]]:
    """Fill `model` with the weights of a file; class token and classifier may stay as they are.

    Returns:
        Keys of the model that the file lacks (for a pre-trained Point-MAE 18: class token, its position, classifier),
        and keys of the file that the model has no use for.

    Raises:
        CheckpointError: the file is unreadable, lacks more than that, or has other shapes, by name.
    """
    given = strip(read(path))
    own = model.state_dict()
    given = {k: v for k, v in given.items() if not (_is_head(k) and k in own and own[k].shape != v.shape)}
    missing = [key for key in own if key not in given]
    unlike = [key for key in own if key in given and own[key].shape != given[key].shape]
    lost = [key for key in missing if not _is_head(key)]
    if lost or unlike:
        what = [f"it has no {', '.join(lost[:3])} ({len(lost)} in all)"] if lost else []
        what += [f"{k} is {tuple(given[k].shape)} there and {tuple(own[k].shape)} here" for k in unlike[:3]]
        raise CheckpointError(f"{path} does not fit this {type(model).__name__}: {'; '.join(what)}")
    model.load_state_dict(given, strict=False)
    return missing, [key for key in given if key not in own]


def _is_head(key: str) -> bool:
    return any(key == head or key.startswith(f"{head}.") for head in HEADS)


def read(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a .pth or .safetensors file.

    Raises:
        CheckpointError: no such file, damaged, or one that would have to be unpickled.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    if path.suffix == ".safetensors":
        return _safetensors(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is no checkpoint that opens without unpickling: {error}") from error
    for name in ("base_model", "model", "state_dict"):
        state = state[name] if isinstance(state, dict) and isinstance(state.get(name), dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no state dict, neither itself nor as `base_model`")
    return state


def _safetensors(path: Path) -> dict[str, Tensor]:
    import safetensors.torch

    try:
        return {key: value.float() for key, value in safetensors.torch.load_file(path).items()}
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: no readable safetensors file ({error})") from error


def strip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys without the prefixes of DDP and of the pre-training models."""
    found = {}
    for key, value in state.items():
        key = key.replace("module.", "")
        for prefix in PREFIXES:
            key = key.removeprefix(prefix)
        found[key] = value
    return found
