"""Latents and text features, computed once and kept on disk.

A latent's file is named after the image's bytes, its resolution, its crop and mirroring, and the autoencoder's weights
and config; a text's after its words, the text encoders' weights and configs, and the vocabularies. Whatever changes any
of these gets another file, so that nothing stale is ever read. Files are written whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from visionpeft.data.subjects import Crop, Picture, Size, pixels
from visionpeft.diffusion.families import Conditions, Family
from visionpeft.diffusion.loading import digest
from visionpeft.errors import DataError
from visionpeft.training import runs

_BESIDE = ("architectures", "dtype", "torch_dtype", "transformers_version")  # these change when a model is saved


class Latents:
    """Latents of pictures as mean and deviation of what the autoencoder gives; in memory, and in `folder` if named.

    The autoencoder runs in float32 whatever trains in: SDXL's overflows in half precision.
    """

    def __init__(self, pipe: Any, folder: Path | None = None) -> None:
        self.vae = pipe.vae
        self.folder = folder
        self.digest = _fingerprint(self.vae)
        self.known: dict[str, dict[str, Tensor]] = {}
        self.made = 0

    def get(self, picture: Picture, size: Size, crop: Crop) -> dict[str, Tensor]:
        """mean (C, h, w), std (C, h, w) or zeros, corner (2,) of the crop in the scaled image.

        Raises:
            DataError: the autoencoder gives numbers that are not finite, with the image's name.
            RunError: the cache cannot be written.
        """
        key = _key(picture.digest, f"{size} {crop}", self.digest)
        if key not in self.known:
            self.known[key] = _cached(self.folder, "latents", key, lambda: self._encode(picture, size, crop))
        return self.known[key]

    @torch.no_grad()
    def _encode(self, picture: Picture, size: Size, crop: Crop) -> dict[str, Tensor]:
        self.made += 1
        x, corner = pixels(picture, size, crop)
        vae = self.vae.float()
        with torch.autocast(vae.device.type, enabled=False):
            found = vae.encode(x[None].to(vae.device))
        if hasattr(found, "latent_dist"):
            mean, std = found.latent_dist.mean, found.latent_dist.std
        else:
            mean, std = found.latents, torch.zeros_like(found.latents)
        mean, std = self._scaled(mean[0].cpu(), std[0].cpu())
        if not (mean.isfinite().all() and std.isfinite().all()):
            raise DataError(f"{picture.path}: its latents are not finite: look at the image, or at the autoencoder")
        return {"mean": mean, "std": std, "corner": torch.tensor(corner)}

    def _scaled(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        config = self.vae.config
        shift, scale = config.get("shift_factor") or 0.0, config.get("scaling_factor") or 1.0
        return (mean - shift) * scale, std * scale


class Texts:
    """Conditions of prompts (without the batch), in memory, and in `folder` if named; for frozen text encoders."""

    def __init__(self, family: Family, folder: Path | None = None) -> None:
        self.family, self.folder = family, folder
        self.digest = " ".join(_fingerprint(e) for e in family.text_encoders.values()) + _vocabularies(family)
        self.known: dict[str, Conditions] = {}
        self.made = 0

    def get(self, prompts: Sequence[str]) -> Conditions:
        """Conditions (N, ...) of prompts."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self.known:
                key = _key(prompt.encode().hex(), type(self.family).__name__, self.digest)
                self.known[prompt] = _cached(self.folder, "texts", key, partial(self._encode, prompt))
        found = [self.known[prompt] for prompt in prompts]
        return {name: torch.stack([f[name] for f in found]) for name in found[0]}

    @torch.no_grad()
    def _encode(self, prompt: str) -> Conditions:
        self.made += 1
        for encoder in self.family.text_encoders.values():
            encoder.eval()  # T5 has dropout, which training has turned on
        return {name: value[0].detach().cpu().contiguous() for name, value in self.family.text([prompt]).items()}


def _fingerprint(module: Any) -> str:
    """Weights, and what of the config decides beside them what is computed: a scaling factor, an activation."""
    config = module.config if isinstance(module.config, dict) else module.config.to_dict()
    told = {key: value for key, value in config.items() if not key.startswith("_") and key not in _BESIDE}
    return f"{digest(module)} {json.dumps(told, sort_keys=True, default=str)}"


def _vocabularies(family: Family) -> str:
    found = blake2b(digest_size=16)
    for name in family.tokenizers:
        if (tokenizer := getattr(family.pipe, name, None)) is not None:
            found.update(repr(sorted(tokenizer.get_vocab().items())).encode())
    return found.hexdigest()


def _key(*texts: str) -> str:
    return blake2b("\n".join(texts).encode(), digest_size=16).hexdigest()


def _cached(folder: Path | None, kind: str, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    if folder is None:
        return make()
    path = folder / kind / f"{key}.safetensors"
    if path.exists():
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} is no readable cache ({error}); delete it") from error
    found = make()
    with runs.replacing(path) as temporary:
        temporary.write_bytes(save(found))
    return found
