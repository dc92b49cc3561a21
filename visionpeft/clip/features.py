"""Features of images and texts, and a cache of them that knows what they depend on.

A key holds the data, the tower's modules, their settings and tensors, the adapters that act in it with their method,
tensors and strength, the dtype, the preprocessing or the tokens. Nothing is cached while images are augmented at
random, and training asks `may_cache` first: an adapter that acts in a tower makes other features at every step.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import visionpeft as vp
from visionpeft.binding import base_class
from visionpeft.clip.errors import ClipError
from visionpeft.clip.text import encode_all, evaluating
from visionpeft.data.preprocessing import Preprocessing
from visionpeft.data.sets import ImageSet
from visionpeft.sites import Backbone, inside


class FeatureCache:
    """Tensors by key, in memory and, with a folder, in files there."""

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.kept: dict[str, Tensor] = {}
        self.hits = 0

    def get(self, key: str) -> Tensor | None:
        """What is known under a key; a damaged file counts as not known."""
        found = self.kept.get(key)
        if found is None and self.folder is not None and (path := self.folder / f"{key}.safetensors").is_file():
            from safetensors import SafetensorError
            from safetensors.torch import load_file

            try:
                found = self.kept[key] = load_file(path)["features"]
            except (SafetensorError, KeyError, OSError):
                return None
        self.hits += found is not None
        return found

    def put(self, key: str, features: Tensor) -> None:
        self.kept[key] = features
        if self.folder is not None:
            from safetensors.torch import save

            from visionpeft.training import runs

            with runs.replacing(self.folder / f"{key}.safetensors") as temporary:
                temporary.write_bytes(save({"features": features.contiguous()}))


def image_features(model: Any, images: ImageSet, preprocessing: Preprocessing, cache: FeatureCache | None = None,
                   batch: int = 64, encode: Callable[[Tensor], Tensor] | None = None) -> Tensor:  # fmt: skip
    """Unit-length features (N, d), float32 on the CPU, of images as they are prepared for evaluation.

    Args:
        encode: what encodes the images instead of the model, as learnt prompts do.

    Raises:
        DataError: an image is gone or cannot be read; it is named.
        ClipError: no image, or a cache for an encoder whose tensors it does not know.
    """
    key = ""
    if cache is not None:
        if encode is not None:
            raise ClipError("features of another encoder than the model's own cannot be cached")
        key = _key(tower_digest(model, "image"), preprocessing.to_dict(), data_digest(images))
        if (found := cache.get(key)) is not None:
            return found
    pictures = images.with_transform(preprocessing.transform())
    features = encode_images(model, pictures, batch, encode or model.encode_image)
    if cache is not None:
        cache.put(key, features)
    return features


@torch.no_grad()
def encode_images(model: Any, images: ImageSet, batch: int, encode: Callable[[Tensor], Tensor]) -> Tensor:
    """Unit-length features (N, d), float32 on the CPU, of what `images` give."""
    if not len(images):
        raise ClipError("no image to encode")
    weight = next(p for p in model.visual.parameters() if p.is_floating_point())
    parts = []
    with evaluating(model):
        for start in range(0, len(images), batch):
            pixels = torch.stack([images[i][0] for i in range(start, min(start + batch, len(images)))])
            found = encode(pixels.to(weight.device, weight.dtype))
            parts.append(F.normalize(found.float(), dim=-1).cpu())
    return torch.cat(parts)


def text_features(model: nn.Module, ids: Tensor, cache: FeatureCache | None = None) -> Tensor:
    """Unit-length features (N, d), float32 on the CPU, of token ids (N, L)."""
    key = ""
    if cache is not None:
        key = _key(tower_digest(model, "text"), hashlib.sha256(ids.numpy().tobytes()).hexdigest(), list(ids.shape))
        if (found := cache.get(key)) is not None:
            return found
    features = encode_all(model, ids).float().cpu()
    if cache is not None:
        cache.put(key, features)
    return features


# ---- what features depend on ----------------------------------------------------------------------------------------


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def tower_digest(model: nn.Module, tower: str) -> str:
    """Digest of all that decides a tower's features.

    That is every module's class and settings (weights alone do not tell GELU from QuickGELU, nor how many heads there
    are), names, dtypes and bytes of tensors, autocast, and of each adapter that acts there its method, its scale and
    all its tensors, wherever they are kept. What is not of the image tower counts as of the text tower.
    """
    backbone = Backbone(model)
    paths, mine = backbone.towers().get("image", ["visual"]), tower == "image"
    found = hashlib.sha256(_autocast(next(model.parameters()).device.type).encode())
    for path, module in backbone.named_modules():
        if inside(path, paths) == mine:
            found.update(f"{path} {base_class(module).__qualname__} {_settings(module)}".encode())
    for path, module, name in backbone.named_tensors(buffers=True):
        if inside(full := f"{path}.{name}".lstrip("."), paths) == mine:
            _take(found, full, module._parameters.get(name, module._buffers.get(name)))
    for tuner in vp.tuners(model).values():
        if tuner.active and acts_in(tuner, tower):
            found.update(f"{tuner.method!r} {tuner.scale!r} {tuner.merged is not None}".encode())
            for key, tensor in tuner.state_dict().items():
                _take(found, key, tensor)
    return found.hexdigest()


def _settings(module: nn.Module) -> list[tuple[str, str]]:
    """Plain attributes of a module, and functions by name."""
    known = {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training"}
    plain = {k: repr(v) for k, v in known.items() if isinstance(v, bool | int | float | str | tuple | None)}
    called = {k: v.__name__ for k, v in known.items() if isinstance(v, FunctionType | BuiltinFunctionType)}
    return sorted({**plain, **called}.items())


def _autocast(device: str) -> str:
    return str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else ""


def _take(digest: Any, name: str, tensor: Tensor | None) -> None:
    assert tensor is not None
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def acts_in(tuner: vp.Tuner, tower: str) -> bool:
    """Whether an adapter, or a tensor that learns with it, is in a tower."""
    own = [(site.path, site.full) for site in tuner.sites] + [(p, f"{p}.{n}".lstrip(".")) for p, n in tuner.in_place]
    paths = tuner.backbone.towers().get("image", ["visual"])
    return any((inside(path, paths) or inside(full, paths)) == (tower == "image") for path, full in own)


def may_cache(model: nn.Module, tower: str, augmented: bool = False) -> bool:
    """Whether a tower gives the same features at every step: no augmentation, and nothing that acts or learns in it."""
    paths = Backbone(model).towers().get("image", ["visual"])
    learns = any(
        p.requires_grad and inside(name, paths) == (tower == "image") and name not in ("logit_scale", "logit_bias")
        for name, p in model.named_parameters()
    )
    acting = any(tuner.active and acts_in(tuner, tower) for tuner in vp.tuners(model).values())
    return not (augmented or learns or acting)


def data_digest(images: ImageSet) -> str:
    """Digest of which images these are: paths, sizes and times of files, the bytes of what is in memory.

    Whether files are turned the way the camera was held counts too.
    """
    found = hashlib.sha256(repr(getattr(images.source, "exif", None)).encode())
    for i in range(len(images)):
        path = images.path(i)
        found.update(path.encode())
        if os.path.isfile(path):
            status = os.stat(path)
            found.update(f"{status.st_size} {status.st_mtime_ns}".encode())
        else:
            found.update(images.with_transform(None)[i][0].tobytes())
    return found.hexdigest()
