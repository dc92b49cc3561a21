"""Vision models of Hugging Face transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from visionpeft.backbones import Library

_ATTENTION = {
    "query": "query", "key": "key", "value": "value",
    "q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "attn_out", "out_proj": "attn_out",
}  # fmt: skip
_MLP = {
    "fc1": "mlp_in", "fc2": "mlp_out", "weights_in": "mlp_in", "weights_out": "mlp_out",
    "gate_proj": "mlp_in", "up_proj": "mlp_in", "down_proj": "mlp_out",
}  # fmt: skip


def _example(root: nn.Module) -> tuple[Any, ...] | None:
    config = getattr(root, "config", None)
    size = getattr(config, "image_size", None)
    if size is None or getattr(root, "main_input_name", "pixel_values") != "pixel_values":
        return None
    height, width = (size, size) if isinstance(size, int) else size
    weight = next(root.parameters())
    channels = getattr(config, "num_channels", 3)
    return (torch.zeros(1, channels, height, width, device=weight.device, dtype=weight.dtype),)


_SCALED = {"attention": ("norm1", "layer_scale1"), "mlp": ("norm2", "layer_scale2")}

LIBRARY = Library(
    name="transformers",
    roles=(
        ("Attention", _ATTENTION),
        ("(?i)mlp|ffn|feedforward", _MLP),
        ("SelfOutput|AttentionOutput", {"dense": "attn_out"}),
        ("Intermediate", {"dense": "mlp_in"}),
        ("Output", {"dense": "mlp_out"}),
        ("PatchEmbeddings", {"projection": "patch_embed"}),
        ("Embeddings", {"patch_embeddings": "patch_embed", "patch_embedding": "patch_embed"}),
    ),
    branches={
        "ViTLayer": {"mlp": ("layernorm_after", "mlp")},
        "Dinov2Layer": _SCALED,
        "Dinov2WithRegistersLayer": _SCALED,
        "DINOv3ViTLayer": _SCALED,
    },
    blocks=lambda m: type(m).__name__ in ("ViTLayer", "Dinov2Layer", "Dinov2WithRegistersLayer"),
    heads=lambda root: ["classifier"] if isinstance(getattr(root, "classifier", None), nn.Linear) else [],
    example=_example,
    prefix_tokens=lambda root: 1 + getattr(getattr(root, "config", None), "num_register_tokens", 0),
)
