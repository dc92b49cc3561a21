"""diffusers: UNets, diffusion transformers, autoencoders.

Roles are the same for self-attention (`attn1`), cross-attention (`attn2`) and the added projections of joint attention
(`add_q_proj`, `to_add_out`): `within="*.attn2.*"` tells them apart. Attention processors call the projections, so that
adapters act under every one of them. `fuse_projections` copies the weights of query, key and value into one Linear,
past their adapters: `Joined` has it ask the three as long as something acts, is merged or learns there. So adapters
and their files are the same before and after fusing.

Presets for `targets=` (both for the text encoders too; narrow with `within=`):

    diffusers   what its DreamBooth LoRA scripts adapt: all projections of attention outside the autoencoder, with
                those of joint attention; on Flux the feed-forward layers of the double blocks too
    kohya       sd-scripts' default: every Linear and 1x1 conv inside a Transformer2DModel, CLIP's attention and MLP
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from visionpeft.backbones import Library
from visionpeft.binding import Mixin, base_class, holder
from visionpeft.errors import VisionPEFTError

_ATTENTION = {
    "to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "attn_out",
    "add_q_proj": "query", "add_k_proj": "key", "add_v_proj": "value", "to_add_out": "attn_out",
}  # fmt: skip
_TRANSFORMER = ("norm1", "attn1"), ("norm3", "ff")
_JOINED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
_SPLIT = frozenset(part for parts in _JOINED.values() for part in parts)


class Joined(Mixin):
    """An attention whose fused projection is query, key and value side by side while any of them is ours."""

    layer = 6
    stays = True  # merged weights, too, are not in the fused copy

    def fuse_projections(self, *args: Any, **kwargs: Any) -> Any:
        """As the library does, on the base weights.

        Raises:
            VisionPEFTError: weights are merged or learn in place: the fused copy would keep them after detaching.
        """
        modules: dict[str, Any] = self._modules  # type: ignore[attr-defined]
        for name in (n for n in modules if n in _SPLIT):
            held = holder(modules[name])
            if held is not None and held.written:
                raise VisionPEFTError(f"shira.switch has written to {name}: take that out to fuse")
            if held is not None and held.aside:
                raise VisionPEFTError(
                    f"{name} is merged or learns in place: unmerge, or activate(model, {{}}), to fuse"
                )
        active, self.peft.active = self.peft.active, ()
        try:
            return super().fuse_projections(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.peft.active = active

    def _joined(self, name: str) -> Any:
        if name not in self._modules:  # type: ignore[attr-defined]
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        if not (self.peft.active or self.peft.hidden):
            return self._modules[name]  # type: ignore[attr-defined]
        parts = [getattr(self, part) for part in _JOINED[name]]
        return lambda x: torch.cat([part(x) for part in parts], -1)

    to_qkv = property(lambda self: self._joined("to_qkv"))
    to_kv = property(lambda self: self._joined("to_kv"))
    to_added_qkv = property(lambda self: self._joined("to_added_qkv"))


def reads_copy(owner: Any) -> bool:
    """Whether an attention computes with the fused copy of its projections: UNets keep it, unread, when they unfuse."""
    if not getattr(owner, "fused_projections", False):
        return False
    return hasattr(owner, "unfuse_projections") or type(owner.processor).__name__.startswith("Fused")


def _fused(parent: nn.Module, name: str) -> bool:
    """Whether a module is a fused copy of projections that are there besides."""
    return name in _JOINED and all(part in parent._modules for part in _JOINED[name])


# ---- presets --------------------------------------------------------------------------------------------------------


def _ancestors(path: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """Class names of the modules above a path, the nearest first."""
    found = []
    while path:
        path = path.rpartition(".")[0]
        if path in modules:
            found.append(base_class(modules[path]).__name__)
    return found


def in_diffusers_preset(path: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the DreamBooth LoRA scripts of diffusers adapt the module."""
    above = _ancestors(path, modules)
    if any(name.startswith("Autoencoder") for name in above):
        return False
    if "FluxTransformerBlock" in above and "FeedForward" in above:
        return isinstance(modules[path], nn.Linear)
    return any(path.endswith(f".{name}") and "Attention" in _owner(path, name, modules) for name in _ATTENTION)


def in_kohya_preset(path: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether sd-scripts adapts the module by default."""
    module = modules[path]
    pointwise = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)
    return (isinstance(module, nn.Linear) or pointwise) and "Transformer2DModel" in _ancestors(path, modules)


def _owner(path: str, name: str, modules: Mapping[str, nn.Module]) -> str:
    owner = modules.get(path.removesuffix(f".{name}"))
    return "" if owner is None else base_class(owner).__name__


# ---- an input -------------------------------------------------------------------------------------------------------


def _example(root: nn.Module) -> tuple[Any, ...] | None:
    build = _EXAMPLES.get(base_class(root).__name__)
    weight = next((p for p in root.parameters() if p.dim() > 1), None)
    if build is None or weight is None:
        return None

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, device=weight.device, dtype=weight.dtype)

    return build(root.config, zeros, torch.ones(1, device=weight.device, dtype=torch.long))


def _unet(c: Any, zeros: Any, t: Tensor) -> tuple[Any, ...]:
    side = 2 ** len(c.block_out_channels)
    widths = c.encoder_hid_dim or c.cross_attention_dim
    text = zeros(1, 2, widths if isinstance(widths, int) else widths[0])
    labels = t if c.num_class_embeds else None
    added = None
    if c.addition_embed_type == "text_time":
        pooled = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
        added = {"text_embeds": zeros(1, pooled), "time_ids": zeros(1, 6)}
    return zeros(1, c.in_channels, side, side), t, text, labels, None, None, None, added


def _pixart(c: Any, zeros: Any, t: Tensor) -> tuple[Any, ...]:
    added = {"resolution": zeros(1, 2) + 1, "aspect_ratio": zeros(1, 1) + 1}
    return _latent(c, zeros), zeros(1, 2, c.caption_channels), t, added


def _flux(c: Any, zeros: Any, t: Tensor) -> tuple[Any, ...]:
    ids, guidance = len(c.axes_dims_rope), zeros(1) + 1 if c.guidance_embeds else None
    text, pooled = zeros(1, 2, c.joint_attention_dim), zeros(1, c.pooled_projection_dim)
    return zeros(1, 4, c.in_channels), text, pooled, t, zeros(4, ids), zeros(2, ids), guidance


def _latent(c: Any, zeros: Any) -> Tensor:
    return zeros(1, c.in_channels, 2 * c.patch_size, 2 * c.patch_size)


_EXAMPLES: dict[str, Any] = {
    "UNet2DConditionModel": _unet,
    "DiTTransformer2DModel": lambda c, zeros, t: (_latent(c, zeros), t, t),
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": lambda c, zeros, t: (
        _latent(c, zeros), zeros(1, 2, c.joint_attention_dim), zeros(1, c.pooled_projection_dim), t
    ),
    "FluxTransformer2DModel": _flux,
    "SanaTransformer2DModel": lambda c, zeros, t: (_latent(c, zeros), zeros(1, 2, c.caption_channels), t),
    "AutoencoderKL": lambda c, zeros, t: (zeros(1, c.in_channels, *[2 ** len(c.block_out_channels)] * 2),),
}  # fmt: skip


def _twin(name: str) -> str | None:
    """A DiT has one timestep embedding and one class table; the conversion gives each block a copy of them."""
    found = re.match(r"^(.*transformer_blocks\.)\d+(\.norm1\.emb\..*)$", name)
    return "*".join(found.groups()) if found else None


def _denoises(root: nn.Module) -> bool:
    name = base_class(root).__name__
    return name.startswith("UNet") or "Transformer" in name


LIBRARY = Library(
    name="diffusers",
    roles=(
        ("Attention", _ATTENTION),
        ("FeedForward", {"net.0.proj": "mlp_in", "net.2": "mlp_out"}),
        ("GLUMBConv", {"conv_inverted": "mlp_in", "conv_point": "mlp_out"}),
        ("FluxSingleTransformerBlock", {"proj_mlp": "mlp_in", "proj_out": "mlp_out"}),
        ("TimestepEmbedding|TextProjection", {"linear_1": "embed", "linear_2": "embed"}),
        ("ResnetBlock2D", {"time_emb_proj": "embed"}),
        ("PatchEmbed", {"proj": "patch_embed"}),
        ("Transformer2DModel", {"x_embedder": "patch_embed", "context_embedder": "embed"}),
    ),
    branches={"BasicTransformerBlock": dict(zip(("attention", "mlp"), _TRANSFORMER, strict=True))},
    guard=lambda module, child: Joined if child in _SPLIT and hasattr(module, "fuse_projections") else None,
    hidden=_fused,
    twin=_twin,
    presets={"diffusers": in_diffusers_preset, "kohya": in_kohya_preset},
    denoises=_denoises,
    example=_example,
)
