"""A CLIP model small enough to ship: the image tower is `nano_vit`, the text tower has a vocabulary of 2,014.

`scripts/build_clip_assets.py` trained it; `assets/nano_clip.md` says on what, and how well it does. The class is
open_clip's own, the configuration one of its JSON files, and its SimpleTokenizer reads the table of merges.
"""

from __future__ import annotations

import json
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from visionpeft.clip.errors import ClipError
from visionpeft.errors import require

NAME = "nano_clip"
CONFIG, MERGES, WEIGHTS = f"{NAME}.json", f"{NAME}_bpe.txt.gz", f"{NAME}.safetensors"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of nano_vit


def config() -> dict[str, Any]:
    """The configuration, as open_clip has them: embed_dim, vision_cfg, text_cfg."""
    return json.loads((files("visionpeft.assets") / CONFIG).read_text(encoding="utf-8"))


def create(checkpoint: str | None = None, pretrained: bool = True) -> Any:
    """The `Clip` of this model, in eval.

    Args:
        checkpoint: a file to take instead of the bundled weights.
        pretrained: False leaves the random start (seed torch beforehand).

    Raises:
        ClipError: a part is not in this installation, or the checkpoint does not fit.
        MissingExtra: open_clip is not installed.
    """
    from visionpeft.clip.model import Clip
    from visionpeft.data.preprocessing import preprocessing

    model: Any = require("open_clip.model", extra="clip").CLIP(**config())
    side = model.visual.image_size[0]
    model.visual.preprocess_cfg = {
        "size": (side, side), "mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest",
    }  # fmt: skip
    if pretrained:
        _load(model, checkpoint)
    return Clip(model.eval(), tokenizer(model.context_length), preprocessing(model), NAME)


def tokenizer(context_length: int, merges: str | Path | None = None) -> Any:
    """open_clip's SimpleTokenizer with the bundled merges, or with those of a file."""
    simple = require("open_clip.tokenizer", extra="clip").SimpleTokenizer
    if merges is not None:
        return simple(str(merges), context_length=context_length)
    with as_file(_asset(MERGES)) as path:
        return simple(str(path), context_length=context_length)


def _load(model: nn.Module, checkpoint: str | None) -> None:
    """The file has all that differs from `nano_vit`, whose weights come with the library already."""
    with as_file(_asset(WEIGHTS) if checkpoint is None else Path(checkpoint).expanduser()) as path:
        if not path.is_file():
            raise ClipError(f"{path}: no such file of weights")
        try:
            model.load_state_dict(image_tower() | load_file(path))
        except (RuntimeError, SafetensorError) as error:
            raise ClipError(f"{checkpoint or WEIGHTS} does not fit {NAME}: {error}") from error


def _asset(name: str) -> Any:
    found = files("visionpeft.assets") / name
    if not found.is_file():
        raise ClipError(f"{name} is not in this installation: scripts/build_clip_assets.py makes it")
    return found


def image_tower() -> dict[str, Tensor]:
    """The image tower's tensors without its projection, from `nano_vit`."""
    from visionpeft.models import nano

    return {f"visual.{key}": value for key, value in from_timm(nano.create().state_dict()).items()}


def from_timm(vit: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a timm ViT with class token, in open_clip's names; its head is left out.

    open_clip's patch embedding has no bias, so that goes into the position embedding.
    """
    position = vit["pos_embed"][0].clone()
    position[1:] += vit["patch_embed.proj.bias"]
    found = {
        "class_embedding": vit["cls_token"][0, 0],
        "positional_embedding": position,
        "conv1.weight": vit["patch_embed.proj.weight"],
        "ln_post.weight": vit["norm.weight"],
        "ln_post.bias": vit["norm.bias"],
    }
    names = {
        "norm1": "ln_1", "norm2": "ln_2", "attn.proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    }  # fmt: skip
    for key, value in vit.items():
        if key.startswith("blocks."):
            _, index, rest = key.split(".", 2)
            module, _, kind = rest.rpartition(".")
            name = f"attn.in_proj_{kind}" if module == "attn.qkv" else f"{names[module]}.{kind}"
            found[f"transformer.resblocks.{index}.{name}"] = value
    return {key: value.detach().clone() for key, value in found.items()}


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What the file of weights holds, in half precision: all tensors that are not bit for bit `nano_vit`'s."""
    known = image_tower()
    state = model.state_dict()
    return {
        key: value.detach().half().contiguous()
        for key, value in state.items()
        if key not in known or not torch.equal(known[key], value)
    }
