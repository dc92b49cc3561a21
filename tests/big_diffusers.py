"""The published architectures on the meta device, from their configs."""

from __future__ import annotations

import functools

import torch
from torch import nn

_DOWN = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
_UP = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
_UNETS = {
    "sd15": dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
    "sd21": dict(sample_size=96, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20),
                 use_linear_projection=True),
    "sdxl": dict(sample_size=128, cross_attention_dim=2048, attention_head_dim=(5, 10, 20),
                 use_linear_projection=True, block_out_channels=(320, 640, 1280),
                 down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
                 up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",), transformer_layers_per_block=(1, 2, 10),
                 addition_embed_type="text_time", addition_time_embed_dim=256,
                 projection_class_embeddings_input_dim=2816),
}  # fmt: skip


@functools.cache
def meta(name: str, classes: int = 1000) -> nn.Module:
    """sd15, sd21, sdxl (UNets), dit (XL/2) or clip (the text encoder of SD1.5)."""
    from diffusers import DiTTransformer2DModel, UNet2DConditionModel

    with torch.device("meta"):
        if name == "dit":
            return DiTTransformer2DModel(num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8,
                                         num_layers=28, sample_size=32, patch_size=2, attention_bias=True,
                                         num_embeds_ada_norm=classes)  # fmt: skip
        if name == "clip":
            from transformers import CLIPTextConfig, CLIPTextModel

            return CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                                                num_attention_heads=12, projection_dim=768))  # fmt: skip
        common = dict(in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(320, 640, 1280, 1280),
                      down_block_types=_DOWN, up_block_types=_UP)  # fmt: skip
        return UNet2DConditionModel(**common | _UNETS[name])
