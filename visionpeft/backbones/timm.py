"""timm: names are consistent across its models, so the tables go by pattern; the exceptions are named."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from visionpeft.backbones import Library, Role, width_of
from visionpeft.binding import base_class

_ATTENTION: dict[str, Role] = {
    "qkv": ("query", "key", "value"), "kv": ("key", "value"),
    "q": "query", "k": "key", "v": "value", "q_proj": "query", "k_proj": "key", "v_proj": "value",
    "proj": "attn_out", "out_proj": "attn_out",
    "qkv.linear": ("query", "key", "value"), "kv.linear": ("key", "value"),  # LeViT
    "q.ln.linear": "query", "proj.ln.linear": "attn_out",
}  # fmt: skip
_MLP: dict[str, Role] = {
    "fc1": "mlp_in", "fc1_g": "mlp_in", "fc1_x": "mlp_in", "w1": "mlp_in", "w2": "mlp_in",
    "fc2": "mlp_out", "w3": "mlp_out",
    "ln1.linear": "mlp_in", "ln2.linear": "mlp_out",
}  # fmt: skip

# x + last(... first(x)): pre-norm blocks begin a branch with the norm, post-norm blocks with the operation.
_PRE_MLP = {"mlp": ("norm2", "drop_path2")}
_PRE = {"attention": ("norm1", "drop_path1"), **_PRE_MLP}
_POST = {"attention": ("attn", "drop_path1"), "mlp": ("mlp", "drop_path2")}
_SHIFTED = {"mlp": ("mlp", "drop_path2")}  # the attention is a method that rolls its input: no module begins it
_BRANCHES: dict[str, dict[str, tuple[str, str]]] = {
    "Block": _PRE, "EvaBlock": _PRE, "XCABlock": _PRE,
    "SwinTransformerBlock": _PRE, "PartitionAttentionCl": _PRE,
    "HieraBlock": _PRE_MLP, "TransformerBlock2d": _PRE_MLP, "ChannelBlock": _PRE_MLP, "SpatialBlock": _PRE_MLP,
    "vision_transformer_sam.Block": _PRE_MLP,  # its attention works on windows between norm1 and drop_path1
    "ResPostBlock": _POST, "EvaBlockPostNorm": _POST,
    "SwinTransformerV2Block": _SHIFTED, "SwinTransformerV2CrBlock": _SHIFTED,
}  # fmt: skip


def _lookalike(module: nn.Module) -> bool:
    """MLPs of relative position biases: from two or three coordinates to one number a head."""
    first = getattr(module, "fc1", None)
    return isinstance(first, nn.Linear) and first.in_features <= 3


def _fused(attention: nn.Module) -> bool:
    """LeViT and EfficientViT interleave query, key and value by head, MaxViT does if `head_first`."""
    source = base_class(attention).__module__
    return not source.endswith((".levit", ".efficientvit_mit")) and not getattr(attention, "head_first", False)


def _bypasses(parent: nn.Module, name: str) -> bool:
    # EVA, BEiT and SwinV2 read qkv.weight and add their own biases, unless told to keep the two apart.
    return name == "qkv" and hasattr(parent, "qkv_bias_separate") and getattr(parent, "q_bias", None) is not None


def _switches(module: nn.Module, child: str) -> dict[str, Any]:
    return {"qkv_bias_separate": True} if _bypasses(module, child) else {}


def _blocks(module: nn.Module) -> bool:
    source = base_class(module).__module__
    return source.endswith(".vision_transformer") and type(module).__name__ in ("Block", "ResPostBlock")


_STAGES = {
    "ConvNeXtBlock": "map", "SwinTransformerBlock": "grid", "SwinTransformerV2Block": "grid", "HieraBlock": "grid",
    "EvaBlock": "grid", "EvaBlockPostNorm": "grid", "beit.Block": "grid", "vision_transformer_sam.Block": "grid",
}  # fmt: skip


def _stage(module: nn.Module) -> tuple[str, int] | None:
    """Blocks that care for places, by what they give: a "map" (B, D, H, W) or a "grid" (B, ..., D)."""
    name = type(module).__name__
    role = _STAGES.get(f"{base_class(module).__module__.split('.')[-1]}.{name}", _STAGES.get(name))
    width = width_of(getattr(module, "norm2", None)) or width_of(module)  # of what leaves the block
    return (role, width) if role and width else None


def _heads(root: nn.Module) -> list[str]:
    if not hasattr(root, "get_classifier"):
        return []
    found: Any = root.get_classifier()  # type: ignore[operator]
    modules = list(found) if isinstance(found, (tuple, list)) else [found]
    modules.append(getattr(root, "aux_head", None))  # VOLO classifies every token besides
    wanted = {id(m) for m in modules if isinstance(m, nn.Module) and any(True for _ in m.parameters())}
    return [path for path, module in root.named_modules() if id(module) in wanted]


def _hiera_size(root: nn.Module) -> list[int] | None:
    tokens, stride = getattr(root, "tokens_spatial_shape", None), getattr(root, "patch_stride", None)
    return [t * s for t, s in zip(tokens, stride, strict=True)] if tokens and stride else None


def _example(root: nn.Module) -> tuple[Any, ...] | None:
    cfg = getattr(root, "pretrained_cfg", None) or {}
    channels, *size = cfg.get("input_size") or (3, 224, 224)
    size = getattr(getattr(root, "patch_embed", None), "img_size", None) or _hiera_size(root) or size
    if min(size) > 256 and not cfg.get("fixed_input_size", False):
        size = (256, 256)
    weight = next((p for p in root.parameters() if p.dim() > 1), None)
    if weight is None:
        return None
    channels = getattr(root, "in_chans", channels)
    return (torch.zeros(1, channels, *size, device=weight.device, dtype=weight.dtype),)


LIBRARY = Library(
    name="timm",
    roles=(
        ("Attention|Attn|XCA|DualPath", _ATTENTION),
        ("GeGluMlp", {"w0": "mlp_in", "w1": "mlp_in", "w2": "mlp_out"}),
        ("(?i)mlp|SwiGLU|Ffn", _MLP),
        ("PatchEmbed|ConvPatch|NaFlexEmbeds", {"proj": "patch_embed"}),
    ),
    lookalike=_lookalike,
    branches=_BRANCHES,
    blocks=_blocks,
    stages=_stage,
    fused=_fused,
    bypasses=_bypasses,
    switches=_switches,
    heads=_heads,
    example=_example,
    prefix_tokens=lambda root: getattr(root, "num_prefix_tokens", None),
)
