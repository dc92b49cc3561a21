"""CLIP models of open_clip: zero-shot classifiers, few-shot heads, contrastive losses.

Nothing here is imported by `import visionpeft`; adapters themselves need none of it.
"""

from __future__ import annotations

from visionpeft.clip.errors import ClipError
from visionpeft.clip.model import Clip, build
from visionpeft.clip.templates import read_templates
from visionpeft.clip.text import class_prompts, encode_tokens, tokenize, zero_shot_weights

__all__ = [
    "Clip",
    "ClipError",
    "build",
    "class_prompts",
    "encode_tokens",
    "read_templates",
    "tokenize",
    "zero_shot_weights",
]
