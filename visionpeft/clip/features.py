"""Features of images and texts, and a cache of them that knows what they depend on.

A key holds the data, the tower's tensors (base, adapters, what learns in place), which adapters act and how strongly,
the dtype, the preprocessing or the tokens. Nothing is cached while images are augmented at random, and training asks
`may_cache` first: an adapter that acts in a tower makes other features at every step.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import visionpeft as vp
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
    """Digest of all that decides a tower's features: names, dtypes and bytes of its tensors, and who acts how strongly.

    What is not of the image tower counts as of the text tower.
    """
    paths = Backbone(model).towers().get("image", ["visual"])
    found = hashlib.sha256(f"{type(model).__module__}.{type(model).__qualname__}".encode())
    for name, tensor in model.state_dict().items():
        if inside(name, paths) == (tower == "image"):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    for name, tuner in vp.tuners(model).items():
        if tuner.active and acts_in(tuner, tower):
            found.update(f"{name} {tuner.scale!r} {tuner.merged is not None}".encode())
    return found.hexdigest()


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
    """Digest of which images these are: paths, sizes and times of files, the bytes of what is in memory."""
    found = hashlib.sha256()
    for i in range(len(images)):
        path = images.path(i)
        found.update(path.encode())
        if os.path.isfile(path):
            status = os.stat(path)
            found.update(f"{status.st_size} {status.st_mtime_ns}".encode())
        else:
            found.update(images.with_transform(None)[i][0].tobytes())
    return found.hexdigest()
