"""A tiny StableDiffusionPipeline of local parts, and a step of it without the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny_diffusers as tiny
import torch
from torch import Tensor

IDS = torch.tensor([[48, 5, 9, 49, 49, 49, 49, 49, 49, 49, 49, 49]])


def pipeline(folder: Path) -> Any:
    """UNet, CLIP text model, autoencoder, scheduler, and a tokenizer of 50 words written to `folder`."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTokenizer

    letters = [f"{c}</w>" for c in "abcdefghijklmnopqrstuvw"] + list("abcdefghijklmnopqrstuvwxy")
    vocabulary = {word: i for i, word in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12)
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipe = StableDiffusionPipeline(
        vae=tiny.vae(), text_encoder=tiny.text(), tokenizer=tokenizer, unet=tiny.unet(), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def draw(pipe: Any) -> Tensor:
    """What the text encoder and the UNet make of fixed inputs: (1, 4, 8, 8)."""
    text = pipe.text_encoder(IDS).last_hidden_state
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return pipe.unet(latents, torch.tensor([300]), text).sample
