"""A vision transformer small enough to ship: 32x32 pixels, patch 4, width 192, six blocks of three heads.

`scripts/build_assets.py` trained it on CIFAR-10; `assets/nano_vit.md` says how, and how well it does.
The class is timm's own `VisionTransformer`, so that whatever works on timm's models works here.
"""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import TYPE_CHECKING, Any

from visionpeft.errors import VisionPEFTError, require

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "nano_vit": {"img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 6, "num_heads": 3},
}


def create(name: str = "nano_vit", pretrained: bool = True, num_classes: int = 10,
           dynamic_img_size: bool = False) -> VisionTransformer:
    """Make the model, in train mode as timm does.

    Args:
        name: a key of `ARCHITECTURES`.
        pretrained: load the bundled weights; otherwise timm's random start (seed torch beforehand).
        num_classes: 10 keeps the CIFAR-10 head (`CLASSES`); any other number gets a fresh head, 0 none.
        dynamic_img_size: take images of any multiple of the patch, the positions interpolated.

    Raises:
        VisionPEFTError: no such name.
        MissingExtra: timm is not installed.
    """
    if name not in ARCHITECTURES:
        raise VisionPEFTError(f"no nano model is called {name!r}: choose one of {', '.join(ARCHITECTURES)}")
    timm_vit = require("timm.models.vision_transformer", extra="timm")
    model = timm_vit.VisionTransformer(**ARCHITECTURES[name], num_classes=10 if pretrained else num_classes,
                                       dynamic_img_size=dynamic_img_size)
    if pretrained:
        model.load_state_dict(_weights(name))
        if num_classes != 10:
            model.reset_classifier(num_classes)
    model.pretrained_cfg = model.default_cfg = _config(name, num_classes)
    return model


def _weights(name: str) -> dict[str, Any]:
    """The bundled state dict, as float32."""
    from safetensors.torch import load_file

    with as_file(files("visionpeft.assets") / f"{name}.safetensors") as path:
        return {key: tensor.float() for key, tensor in load_file(path).items()}


def _config(name: str, num_classes: int) -> dict[str, Any]:
    """What timm's data and model tools read: pixels, statistics, where the classifier is."""
    side = ARCHITECTURES[name]["img_size"]
    return {
        "architecture": name,
        "num_classes": num_classes,
        "input_size": (3, side, side),
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
    }
