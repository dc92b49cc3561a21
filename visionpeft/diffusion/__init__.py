"""Diffusion pipelines as personalisation needs them: loading, prompts, objectives, caches, class images, scores.

    pipe = load_pipeline("~/stable-diffusion")          a diffusers folder, a single file with its config, or "nano"
    family = family_of(pipe)                            one way to ask SD, SDXL, DiT, SD3 and Flux
"""

from visionpeft.diffusion.errors import DiffusionError
from visionpeft.diffusion.families import Family, family_of
from visionpeft.diffusion.loading import load_pipeline

__all__ = ["DiffusionError", "Family", "family_of", "load_pipeline"]
