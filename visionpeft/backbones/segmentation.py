"""Models with a decoder of this library: what is asked of the whole is told by the encoder."""

from __future__ import annotations

from typing import Any

from torch import nn

from visionpeft import backbones
from visionpeft.backbones import Library


def _example(root: Any) -> tuple[Any, ...] | None:
    return backbones.example(root.encoder) if _whole(root) else None


def _prefix_tokens(root: Any) -> int | None:
    return backbones.prefix_tokens(root.encoder) if _whole(root) else None


def _whole(root: nn.Module) -> bool:
    return type(root).__name__ == "Segmenter"


LIBRARY = Library(
    name="visionpeft.models.segmentation",
    heads=lambda root: ["decoder"] if _whole(root) else [],
    example=_example,
    prefix_tokens=_prefix_tokens,
)
