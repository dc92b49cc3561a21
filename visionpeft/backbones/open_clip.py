"""open_clip: an image and a text tower, most often of residual blocks around `nn.MultiheadAttention`.

Towers of timm and of transformers are known by those libraries' own tables.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from visionpeft.backbones import Library, prefix_tokens

_FLAT = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection")


def _towers(root: nn.Module) -> dict[str, list[str]]:
    """CLIP keeps the parts of its text tower at the root, the others below `text`. CoCa's decoder is of neither."""
    if not hasattr(root, "visual"):
        return {}
    return {"image": ["visual"], "text": ["text"] if hasattr(root, "text") else list(_FLAT)}


def _example(root: nn.Module) -> tuple[Any, ...] | None:
    """For a whole model, or one tower of it alone."""
    parts = (_image(getattr(root, "visual", root)), _text(root))
    return None if hasattr(root, "visual") and None in parts else tuple(p for p in parts if p is not None) or None


def _image(visual: nn.Module) -> torch.Tensor | None:
    size = getattr(visual, "image_size", None)
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    weight = next(visual.parameters())
    return torch.zeros(1, 3, height, width, device=weight.device, dtype=weight.dtype)


def _text(root: nn.Module) -> torch.Tensor | None:
    context = getattr(root, "context_length", None)
    if context is None or not (hasattr(root, "text") or hasattr(root, "token_embedding")):
        return None  # CoCa's decoder has a context too, and takes features
    if hasattr(getattr(root, "text", None), "config"):  # transformers count some positions for padding
        context = min(context, 8)
    text = torch.full((1, context), 2, device=next(root.parameters()).device)  # no padding, which some towers mask
    text[:, -1] = 3  # the end-of-text position, an argmax
    return text


def _prefix_tokens(root: nn.Module) -> int | None:
    """Those of the image tower, whose blocks are the only ones here that take more tokens."""
    trunk = getattr(getattr(root, "visual", None), "trunk", None)
    return None if trunk is None else prefix_tokens(trunk)


_MLP = {"mlp.c_fc": "mlp_in", "mlp.c_proj": "mlp_out"}
_QKV = ("query", "key", "value")

LIBRARY = Library(
    name="open_clip",
    roles=(
        ("ResidualAttentionBlock", _MLP),
        ("AttentionPool2d", {"q_proj": "query", "k_proj": "key", "v_proj": "value", "c_proj": "attn_out"}),
        ("Attention", {"out_proj": "attn_out"}),
        ("VisionTransformer", {"conv1": "patch_embed"}),
        ("CLIP|TextTransformer", {"text_projection": "projection"}),
        ("TimmModel", dict.fromkeys(("head.proj", "trunk.head", "trunk.head.fc"), "projection")),
        ("HFTextEncoder", dict.fromkeys(("proj", "proj.0", "proj.2"), "projection")),
    ),
    branches={
        "ResidualAttentionBlock": {"attention": ("ln_1", "ls_1"), "mlp": ("ln_2", "ls_2")},
        "CustomResidualAttentionBlock": {"attention": ("ln_1", "ls_1"), "mlp": ("ln_2", "ls_2")},
    },
    hosts=lambda parent, name: type(parent).__name__ == "AttentionPool2d" and name.endswith("_proj"),
    raw={
        "VisionTransformer": {"proj": "projection"},
        "CLIP": {"text_projection": "projection"},
        "TextTransformer": {"text_projection": "projection"},
        "Attention": {"in_proj_weight": _QKV},
    },
    towers=_towers,
    example=_example,
    prefix_tokens=_prefix_tokens,
)
