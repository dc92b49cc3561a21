"""Errors of CLIP jobs."""

from __future__ import annotations

from visionpeft.errors import VisionPEFTError


class ClipError(VisionPEFTError):
    """A CLIP model, its prompts or its weights do not go together."""
