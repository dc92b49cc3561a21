"""The error of diffusion jobs."""

from visionpeft.errors import VisionPEFTError


class DiffusionError(VisionPEFTError):
    """A pipeline, prompt, token or setting of a diffusion job that does not fit."""
