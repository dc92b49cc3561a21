"""Backbones by name: the nano stand-ins of this library, and whatever timm knows."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from visionpeft.errors import VisionPEFTError, require
from visionpeft.models import nano
from visionpeft.training.order import seed_all


class ModelError(VisionPEFTError):
    """A model cannot be built as asked."""


@dataclass(frozen=True)
class Backbone:
    """How to make a backbone; travels in the adapter file, so that `predict` can make it again."""

    name: str
    """A nano model of visionpeft.models.nano, or a timm name (with a tag, or "hf-hub:...")."""
    checkpoint: str | None = None
    """A local file of weights: .safetensors, .pth (opened with weights_only), .npz; None takes timm's own."""
    img_size: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def build(backbone: Backbone, num_classes: int, *, pretrained: bool = True, drop_path: float = 0.0,
          seed: int = 0, any_size: bool = False) -> nn.Module:
    """Make the model with a fresh classifier of `num_classes`, all random draws from `seed`.

    Args:
        any_size: let it take images of any size, if it can (timm's dynamic_img_size).

    Raises:
        ModelError: the name is unknown, the checkpoint is missing or unfit, or a setting is not the model's.
        MissingExtra: timm is not installed.
    """
    if backbone.name in nano.ARCHITECTURES:
        seed_all(seed)
        return _nano(backbone, num_classes, pretrained, drop_path, any_size)
    return _timm(backbone, num_classes, pretrained, drop_path, seed, any_size)


def takes_size(backbone: Backbone) -> bool:
    """Whether a timm model of this name is made for a size of images, as convolutional ones are not."""
    try:
        with torch.device("meta"):
            require("timm", extra="timm").create_model(backbone.name, img_size=backbone.img_size)
    except TypeError as error:
        return "'img_size'" not in str(error)
    return True


def _nano(backbone: Backbone, num_classes: int, pretrained: bool, drop_path: float, any_size: bool) -> nn.Module:
    size = nano.ARCHITECTURES[backbone.name]["img_size"]
    if backbone.checkpoint is not None or drop_path or not (any_size or backbone.img_size in (None, size)):
        raise ModelError(f"{backbone.name} is bundled: no --checkpoint, no --drop-path, images of {size} pixels")
    model = nano.create(backbone.name, pretrained=pretrained, num_classes=num_classes, dynamic_img_size=any_size)
    # Its own ten classes are CIFAR-10's: a data set of ten others must not start from their head.
    model.reset_classifier(num_classes)
    return model


def _timm(backbone: Backbone, num_classes: int, pretrained: bool, drop_path: float, seed: int,
          any_size: bool) -> nn.Module:
    timm = require("timm", extra="timm")
    name = backbone.name
    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(name):
        raise ModelError(f"timm has no model {name!r}{_nearest(timm, name)}; "
                         f"bundled: {', '.join(nano.ARCHITECTURES)}")
    options: dict[str, Any] = {"num_classes": num_classes}
    if backbone.img_size is not None:
        options["img_size"] = backbone.img_size
    if any_size:
        options["dynamic_img_size"] = True
    if drop_path:
        options["drop_path_rate"] = drop_path
    if pretrained and backbone.checkpoint is not None:
        options["pretrained_cfg_overlay"] = _overlay(backbone.checkpoint)
    seed_all(seed)
    model = _create(timm, name, pretrained, options)
    if pretrained and backbone.checkpoint is not None:
        seed_all(seed)
        _check_loaded(model, _create(timm, name, False, options), backbone.checkpoint)
    return model


def _check_loaded(model: nn.Module, untrained: nn.Module, checkpoint: str) -> None:
    """timm loads loosely where the classifier is new: refuse a file that left parts of the backbone at random."""
    get: Any = getattr(model, "get_classifier", None)
    head = get() if get is not None else None
    mine = {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
    start = dict(untrained.named_parameters())
    left = [name for name, p in model.named_parameters()
            if id(p) not in mine and p.ndim > 1 and p.std() > 0 and p.equal(start[name])]
    if left:
        raise ModelError(f"{checkpoint} does not fit {type(model).__name__}: it has nothing for {len(left)} tensors, "
                         f"such as {', '.join(left[:3])}")


def _create(timm: Any, name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except TypeError as error:
        for option in ("dynamic_img_size", "img_size"):
            if option in options and f"'{option}'" in str(error):
                # Convolutional models take any size and know no such argument.
                return _create(timm, name, pretrained, {k: v for k, v in options.items() if k != option})
        raise ModelError(f"{name} cannot be made with {options}: {error}") from error
    except (RuntimeError, OSError, KeyError) as error:
        raise ModelError(f"the weights of {name} cannot be loaded: {error}. Offline, give --checkpoint") from error


def _overlay(checkpoint: str) -> dict[str, Any]:
    """timm's description of a local weights file."""
    path = Path(checkpoint).expanduser()
    if not path.is_file():
        raise ModelError(f"{path}: no such checkpoint file")
    return {"file": str(path), "custom_load": path.suffix == ".npz"}


def _nearest(timm: Any, name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, timm.list_models(), n=3)
    return f", perhaps {' or '.join(close)}" if close else ""
