"""What happens to an image before the model sees it.

A `Preprocessing` is a few numbers, so that it travels in an adapter file; `transform` makes torchvision's v2 pipeline
of it. The protocols of the literature differ and give different accuracies: tables must not mix them.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from torch import nn

from visionpeft.errors import DataError, require

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
RAW = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
AUGMENTATIONS = ("flip", "crop", "resized_crop", "randaugment")


@dataclass(frozen=True)
class Preprocessing:
    """Resize, centre crop, normalise.

    `size` is (height, width) of the model's input. The image is first resized to `size / crop_pct`: both sides
    ("squash", which changes the aspect ratio), or the shorter side to the longer of `size` ("short_side_crop"). Then
    the centre is cropped, values are scaled to 0..1, and `(x - mean) / std` is taken per channel.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]
    interpolation: str = "bicubic"
    resize: Literal["squash", "short_side_crop"] = "squash"
    crop_pct: float = 1.0

    def __post_init__(self) -> None:
        if self.resize not in ("squash", "short_side_crop"):
            raise DataError(f"resize={self.resize!r}: use 'squash' or 'short_side_crop'")
        if not 0 < self.crop_pct <= 1:
            raise DataError(f"crop_pct={self.crop_pct} is outside (0, 1]")

    def transform(self, augment: str | None = None) -> Any:
        """PIL RGB image -> float32 tensor [3, height, width]; `augment` is one of AUGMENTATIONS, for training."""
        from visionpeft.data.transforms import build

        return build(self, augment)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: lists, numbers and strings."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Preprocessing:
        """Inverse of `to_dict`.

        Raises:
            DataError: a field is missing or unknown.
        """
        names = {f.name for f in fields(cls)}
        if set(data) != names:
            raise DataError(f"preprocessing has the fields {sorted(data)}, expected {sorted(names)}")
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items()}
        return cls(**values)


PROTOCOLS = {
    "vtab-imagenet": Preprocessing(*IMAGENET, (224, 224)),
    "vtab-half": Preprocessing(*HALF, (224, 224)),
    "vtab-raw": Preprocessing(*RAW, (224, 224)),
    # VPT on FGVC: short side 256, crop 224. NOAH few-shot: squash to 256, crop 224.
    "fgvc": Preprocessing(*IMAGENET, (224, 224), "bilinear", "short_side_crop", 0.875),
    "fewshot": Preprocessing(*IMAGENET, (224, 224), "bicubic", "squash", 0.875),
}


def preprocessing(
    model: nn.Module, protocol: str = "checkpoint", size: int | tuple[int, int] | None = None
) -> Preprocessing:
    """The preprocessing of `protocol` for `model`.

    "checkpoint" is what the model was pre-trained with: timm's data config, open_clip's `preprocess_cfg`, or the
    `preprocessor_config.json` next to a local Hugging Face model. `size` overrides its input size.

    Raises:
        DataError: unknown protocol, a model that does not say, or a size that the model cannot take.
    """
    if protocol == "checkpoint":
        result = _of_checkpoint(model)
    elif protocol in PROTOCOLS:
        result = PROTOCOLS[protocol]
    else:
        raise DataError(f"unknown preprocessing protocol {protocol!r}: use 'checkpoint', {', '.join(PROTOCOLS)}")
    if size is not None:
        result = replace(result, size=(size, size) if isinstance(size, int) else (size[0], size[1]))
    _check_size(model, result.size)
    return result


def _of_checkpoint(model: nn.Module) -> Preprocessing:
    for read in (_of_timm, _of_open_clip, _of_hugging_face):
        if (found := read(model)) is not None:
            return found
    raise DataError(f"{type(model).__name__} does not say how its images were prepared: name a protocol "
                    f"({', '.join(PROTOCOLS)}) or build visionpeft.data.Preprocessing(mean, std, size) yourself")


def _of_timm(model: nn.Module) -> Preprocessing | None:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if not config:
        return None
    config = require("timm.data", extra="timm").resolve_data_config(pretrained_cfg=config)
    if config["crop_mode"] not in ("center", "squash"):
        raise DataError(f"timm's crop_mode {config['crop_mode']!r} is not supported: build Preprocessing yourself")
    fixed = fixed_size(model)
    return Preprocessing(
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        size=fixed or tuple(config["input_size"][1:]),
        interpolation=config["interpolation"],
        resize="squash" if config["crop_mode"] == "squash" else "short_side_crop",
        crop_pct=config["crop_pct"],
    )


def _of_open_clip(model: nn.Module) -> Preprocessing | None:
    config = getattr(getattr(model, "visual", model), "preprocess_cfg", None)
    if not config:
        return None
    resize = {"shortest": "short_side_crop", "squash": "squash"}.get(config["resize_mode"])
    if resize is None:
        raise DataError(f"open_clip's resize_mode {config['resize_mode']!r} is not supported: "
                        "build Preprocessing yourself")
    size = config["size"]
    return Preprocessing(
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        size=(size, size) if isinstance(size, int) else tuple(size),
        interpolation=config["interpolation"],
        resize=resize,  # type: ignore[arg-type]
    )


def _of_hugging_face(model: nn.Module) -> Preprocessing | None:
    import json
    from pathlib import Path

    folder = getattr(getattr(model, "config", None), "_name_or_path", "")
    file = Path(folder or ".") / "preprocessor_config.json"
    if not folder or not file.is_file():
        return None
    config = json.loads(file.read_text())
    crop = config.get("crop_size") if config.get("do_center_crop") else None
    sizes = config["size"]
    short = sizes.get("shortest_edge") if isinstance(sizes, dict) else None
    size = _height_width(crop or ({"height": short, "width": short} if short else sizes))
    return Preprocessing(
        mean=tuple(config["image_mean"]) if config.get("do_normalize", True) else RAW[0],
        std=tuple(config["image_std"]) if config.get("do_normalize", True) else RAW[1],
        size=size,
        interpolation={0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}[config.get("resample", 2)],
        resize="short_side_crop" if short else "squash",
        crop_pct=max(size) / (short or max(_height_width(sizes))),
    )


def _height_width(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value["height"], value["width"])


def fixed_size(model: nn.Module) -> tuple[int, int] | None:
    """The only size that the model accepts, if there is only one."""
    embed = getattr(model, "patch_embed", None)
    if getattr(embed, "strict_img_size", False) and getattr(embed, "img_size", None):
        return tuple(embed.img_size)  # type: ignore[union-attr]
    return None


def _check_size(model: nn.Module, size: tuple[int, int]) -> None:
    fixed = fixed_size(model)
    if fixed and fixed != size:
        raise DataError(f"{type(model).__name__} takes images of {fixed[0]}x{fixed[1]} only, not {size[0]}x{size[1]}: "
                        f"create it with img_size={size[0]} or dynamic_img_size=True, or give size={fixed[0]}")
    patch = _patch_size(model)
    if patch and any(s % p for s, p in zip(size, patch, strict=True)):
        down = [s // p * p for s, p in zip(size, patch, strict=True)]
        raise DataError(f"size {size[0]}x{size[1]} is not a multiple of the patch size {patch[0]}x{patch[1]}: "
                        f"use {down[0]} or {down[0] + patch[0]}")


def _patch_size(model: nn.Module) -> tuple[int, int] | None:
    visual = getattr(model, "visual", model)
    candidates = (
        getattr(getattr(visual, "patch_embed", None), "patch_size", None),  # timm
        getattr(visual, "patch_size", None),  # open_clip
        getattr(getattr(model, "config", None), "patch_size", None),  # Hugging Face
    )
    for patch in candidates:
        if isinstance(patch, int):
            return patch, patch
        if isinstance(patch, (tuple, list)) and len(patch) == 2:
            return int(patch[0]), int(patch[1])
    return None


def before_crop(size: tuple[int, int], crop_pct: float) -> tuple[int, int]:
    """Sides before the centre crop, in pixels; rounded down as timm does."""
    return math.floor(size[0] / crop_pct), math.floor(size[1] / crop_pct)
