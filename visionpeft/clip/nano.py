"""The bundled nano CLIP."""

from __future__ import annotations

from typing import Any

from visionpeft.clip.errors import ClipError

NAME = "nano_clip"


def create(checkpoint: str | None = None) -> Any:
    raise ClipError(f"{NAME} is not there yet")
