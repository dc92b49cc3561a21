"""The point transformers of this library. Stages: grouping of points, tokens of groups, pooling before the head."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from visionpeft.backbones import Library

_BLOCKS = ("Block", "GPTBlock")
PART_HEAD = ("label_conv", "propagation_0", "convs1", "bns1", "convs2", "bns2", "convs3")
"""What tells parts apart, in the order of the official code."""


def _heads(root: nn.Module) -> list[str]:
    if type(root).__name__ == "PartTransformer":
        return list(PART_HEAD)
    get: Any = getattr(root, "get_classifier", None)
    head: Any = get() if get is not None else None
    return [path for path, module in root.named_modules() if module is head and any(True for _ in head.parameters())]


def _example(root: nn.Module) -> tuple[Any, ...] | None:
    """Two clouds (2, N, 3), or (2, N, 4) with kinds: BatchNorms of a classifier that learns need more than one."""
    architecture: Any = getattr(root, "architecture", None)
    if architecture is None:
        return None
    like = next(root.parameters())
    count = architecture.groups + architecture.group_size
    points = torch.rand(2, count, 3, generator=torch.Generator().manual_seed(0), device="cpu")
    if type(root).__name__ == "PartTransformer":
        points = nn.functional.pad(points, (0, 1))
    return (points.to(like.device, like.dtype),)


def _stage(module: Any) -> tuple[str, int] | None:
    name = type(module).__name__
    if name in ("Group", "OrderedGroup"):
        return "grouping", 3
    if name == "MiniPointNet":
        return "tokens", module.second_conv[-1].out_channels
    return ("pool", module.width) if name == "Pool" else None


LIBRARY = Library(
    name="visionpeft",
    roles=(
        ("Attention", {"qkv": ("query", "key", "value"), "proj": "attn_out"}),
        ("Mlp", {"fc1": "mlp_in", "fc2": "mlp_out"}),
        ("GPTBlock", {"mlp.0": "mlp_in", "mlp.2": "mlp_out"}),
        ("MiniPointNet", {"first_conv.0": "patch_embed"}),
    ),
    branches={
        "Block": {"attention": ("norm1", "drop_path1"), "mlp": ("norm2", "drop_path2")},
        "GPTBlock": {"mlp": ("ln_2", "mlp")},
    },
    blocks=lambda module: type(module).__name__ in _BLOCKS,
    heads=_heads,
    stages=_stage,
    example=_example,
    prefix_tokens=lambda root: {"PointTransformer": 1, "PointGPT": 2, "PartTransformer": 0}.get(type(root).__name__),
)
