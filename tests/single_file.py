"""A pipeline of diffusers as one file with the names of the original Stable Diffusion code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
           "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}  # fmt: skip
_OUTER = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
          "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}  # fmt: skip


def write(pipe: Any, path: Path) -> None:
    """`pipe` is a StableDiffusionPipeline with one resnet a level, and two in the way up."""
    config = pipe.unet.config
    found = {f"model.diffusion_model.{_unet(k, config)}": v for k, v in pipe.unet.state_dict().items()}
    levels = len(pipe.vae.config.block_out_channels)
    found |= {f"first_stage_model.{_vae(k, levels)}": _conv(k, v) for k, v in pipe.vae.state_dict().items()}
    found |= {f"cond_stage_model.transformer.text_model.{k}": v for k, v in pipe.text_encoder.state_dict().items()}
    save_file({k: v.contiguous().clone() for k, v in found.items()}, path)


def _unet(key: str, config: Any) -> str:
    layers = config.layers_per_block
    for old, new in _OUTER.items():
        if key.startswith(f"{old}."):
            return key.replace(old, new, 1)
    kind, rest = key.split(".", 1)
    if kind == "mid_block":
        part, j, inner = rest.split(".", 2)
        return f"middle_block.{1 if part == 'attentions' else 2 * int(j)}.{_inner(part, inner)}"
    i, part, j, inner = rest.split(".", 3)
    attends = "CrossAttn" in config[f"{kind.removesuffix('_blocks')}_block_types"][int(i)]
    if kind == "down_blocks":
        number = (layers + 1) * int(i) + int(j) + 1
        if part == "downsamplers":
            return f"input_blocks.{(layers + 1) * (int(i) + 1)}.0.{inner.replace('conv', 'op')}"
        return f"input_blocks.{number}.{int(part == 'attentions')}.{_inner(part, inner)}"
    number = (layers + 1) * int(i) + (layers if part == "upsamplers" else int(j))
    place = 1 + attends if part == "upsamplers" else int(part == "attentions")
    return f"output_blocks.{number}.{place}.{_inner(part, inner)}"


def _inner(part: str, inner: str) -> str:
    if part != "resnets":
        return inner
    head, rest = inner.split(".", 1)
    return f"{_RESNET[head]}.{rest}"


def _vae(key: str, levels: int) -> str:
    key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    key = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", key)
    key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}", key)
    key = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", key)
    key = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    key = key.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
    for old, new in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
        key = key.replace(f"attn_1.{old}.", f"attn_1.{new}.")
    return key


def _conv(key: str, value: Tensor) -> Tensor:
    return value[..., None, None] if "attentions" in key and key.endswith("weight") and value.ndim == 2 else value
