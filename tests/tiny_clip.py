"""A CLIP model small enough for every test, with open_clip's own tokenizer."""

from __future__ import annotations

import logging
from typing import Any

import open_clip
import torch
from open_clip.model import CLIP

from visionpeft.clip.model import Clip
from visionpeft.data.preprocessing import Preprocessing

PREPARE = Preprocessing((0.5,) * 3, (0.5,) * 3, (16, 16))
VISION = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
TEXT = {"context_length": 32, "width": 16, "heads": 2, "layers": 1}
_BPE = open_clip.SimpleTokenizer()


def tokenizer(texts: list[str], context_length: int = 32) -> torch.Tensor:
    return _BPE(texts, context_length)


def tiny(vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, cls: Any = CLIP, embed: int = 12,
         shake: float = 0.2, dtype: torch.dtype = torch.float32, **other: Any) -> Any:  # fmt: skip
    """In eval. Parameters are moved by `shake`, so that nothing stays at zero or one, where mistakes would not show."""
    torch.manual_seed(4)
    logging.disable(logging.WARNING)  # open_clip says that there are no weights
    try:
        model = cls(embed, {**VISION, **(vision or {})}, {**TEXT, **(text or {})}, **other).to(dtype).eval()
    finally:
        logging.disable(logging.NOTSET)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=shake)
    return model


def clip(model: Any, name: str = "tiny") -> Clip:
    """With what makes tokens and pixels for it."""
    return Clip(model, tokenizer, PREPARE, name)
