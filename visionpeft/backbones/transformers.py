"""Vision models and text encoders of Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from visionpeft.backbones import Library
from visionpeft.binding import base_class

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
    if getattr(root, "main_input_name", "pixel_values") == "input_ids":
        length = min(getattr(config, "max_position_embeddings", 8), 8)
        return (torch.ones(1, length, dtype=torch.long, device=next(root.parameters()).device),)
    if size is None or getattr(root, "main_input_name", "pixel_values") != "pixel_values":
        return None
    height, width = (size, size) if isinstance(size, int) else size
    weight = next(root.parameters())
    channels = getattr(config, "num_channels", 3)
    return (torch.zeros(1, channels, height, width, device=weight.device, dtype=weight.dtype),)


_SCALED = {"attention": ("norm1", "layer_scale1"), "mlp": ("norm2", "layer_scale2")}

def _in_text_preset(names: frozenset[str]) -> Callable[[str, Mapping[str, nn.Module]], bool]:
    """Whether a module is one of these in a CLIP text encoder, as `visionpeft.backbones.diffusers` has its presets."""

    def means(path: str, modules: Mapping[str, nn.Module]) -> bool:
        above, _, name = path.rpartition(".")
        owner = base_class(modules[above]).__name__ if above in modules else ""
        return name in names and owner.startswith("CLIP") and owner.endswith(("Attention", "MLP"))

    return means


_PROJECTIONS = frozenset({"q_proj", "k_proj", "v_proj", "out_proj"})

LIBRARY = Library(
    name="transformers",
    roles=(
        ("^T5Attention", {"q": "query", "k": "key", "v": "value", "o": "attn_out"}),
        ("^T5Dense", {"wi": "mlp_in", "wi_0": "mlp_in", "wi_1": "mlp_in", "wo": "mlp_out"}),
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
    presets={"diffusers": _in_text_preset(_PROJECTIONS), "kohya": _in_text_preset(_PROJECTIONS | {"fc1", "fc2"})},
    heads=lambda root: ["classifier"] if isinstance(getattr(root, "classifier", None), nn.Linear) else [],
    example=_example,
    prefix_tokens=lambda root: 1 + getattr(getattr(root, "config", None), "num_register_tokens", 0),
)
