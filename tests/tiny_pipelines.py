"""Tiny pipelines of every family that can be personalised, of real classes, with a vocabulary of one rare word."""

from __future__ import annotations

from typing import Any

import tiny_diffusers as tiny
from torch import nn

TOKEN = "zqx"


def tokenizer() -> Any:
    """Letters, and the rare word last; 24 tokens at most."""
    from transformers import CLIPTokenizer

    ends, letters = [f"{c}</w>" for c in "abcdefghijklmnopqrstuvwx"], list("abcdefghijklmnopqstz")
    words = [*ends, *letters, "zq", "zqx</w>", "<|startoftext|>", "<|endoftext|>"]
    merges = [("z", "q"), ("zq", "x</w>")]
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=merges, model_max_length=24)


def text(projection: bool = False, width: int = 16) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(vocab_size=48, hidden_size=width, intermediate_size=32, num_hidden_layers=2,
                            num_attention_heads=2, max_position_embeddings=24, bos_token_id=46, eos_token_id=47,
                            pad_token_id=47, projection_dim=12)  # fmt: skip
    return tiny.stir((CLIPTextModelWithProjection if projection else CLIPTextModel)(config))


def sd(kind: str = "epsilon") -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    return _quiet(StableDiffusionPipeline(
        vae=tiny.vae(), text_encoder=text(), tokenizer=tokenizer(), unet=tiny.unet(), feature_extractor=None,
        scheduler=_ddim(DDIMScheduler, kind), safety_checker=None, requires_safety_checker=False,
    ))  # fmt: skip


def sdxl() -> Any:
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    unet = tiny.unet(use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
                     projection_class_embeddings_input_dim=60, cross_attention_dim=40)  # fmt: skip
    return _quiet(StableDiffusionXLPipeline(
        vae=tiny.vae(), text_encoder=text(width=16), text_encoder_2=text(True, 24), tokenizer=tokenizer(),
        tokenizer_2=tokenizer(), unet=unet, scheduler=_ddim(DDIMScheduler, "epsilon"), add_watermarker=False,
    ))  # fmt: skip


def dit() -> Any:
    from diffusers import DDIMScheduler, DiTPipeline

    return _quiet(DiTPipeline(tiny.dit(), tiny.vae(), _ddim(DDIMScheduler, "epsilon"), {0: "tench", 1: "cat, feline"}))


def sd3() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    denoiser = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=48, caption_projection_dim=16, pooled_projection_dim=24, out_channels=4,
        pos_embed_max_size=8,
    )  # fmt: skip
    return _quiet(StableDiffusion3Pipeline(
        tiny.stir(denoiser), FlowMatchEulerDiscreteScheduler(), _flow_vae(), text(True), tokenizer(), text(True, 24),
        tokenizer(), None, None,
    ))  # fmt: skip


def flux() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    denoiser = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    t5 = T5EncoderModel(T5Config(vocab_size=48, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    return _quiet(FluxPipeline(FlowMatchEulerDiscreteScheduler(), _flow_vae(), text(), tokenizer(), t5, tokenizer(),
                               tiny.stir(denoiser)))  # fmt: skip


def _flow_vae() -> Any:
    vae: Any = tiny.vae()
    vae.register_to_config(shift_factor=0.1, scaling_factor=1.5)
    return vae


PIPELINES = {"sd": sd, "sdxl": sdxl, "dit": dit, "sd3": sd3, "flux": flux}


def _ddim(cls: Any, kind: str) -> Any:
    return cls(clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type=kind)


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe
