"""open_clip: residual blocks around `nn.MultiheadAttention`, in both towers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from visionpeft.backbones import Library


def _example(root: nn.Module) -> tuple[Any, ...] | None:
    visual = getattr(root, "visual", None)
    size, context = getattr(visual, "image_size", None), getattr(root, "context_length", None)
    if size is None or context is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    weight = next(root.parameters())
    image = torch.zeros(1, 3, height, width, device=weight.device, dtype=weight.dtype)
    text = torch.zeros(1, context, dtype=torch.long, device=weight.device)
    text[:, 1] = 1  # so that the end-of-text position, an argmax, is defined
    return image, text


LIBRARY = Library(
    name="open_clip",
    roles=(
        ("ResidualAttentionBlock", {"mlp.c_fc": "mlp_in", "mlp.c_proj": "mlp_out"}),
        ("AttentionPool2d", {"q_proj": "query", "k_proj": "key", "v_proj": "value", "c_proj": "attn_out"}),
        ("Attention", {"out_proj": "attn_out"}),
        ("VisionTransformer", {"conv1": "patch_embed"}),
    ),
    branches={"ResidualAttentionBlock": {"attention": ("ln_1", "ls_1"), "mlp": ("ln_2", "ls_2")}},
    # the ResNets' pooling hands the four weights to a function: they can be seen, but nothing can act there
    bypasses=lambda parent, name: type(parent).__name__ == "AttentionPool2d",
    example=_example,
)
