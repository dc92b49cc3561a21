"""Tiny diffusers models and pipelines from local configs, with random weights that hide no mistake."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def unet(**fields: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    small = dict(sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
                 down_block_types=down, up_block_types=up, cross_attention_dim=16, attention_head_dim=4,
                 norm_num_groups=8)  # fmt: skip
    return stir(UNet2DConditionModel(**small | fields))


def sdxl() -> nn.Module:
    """Linear projections around the transformers, two sizes of conditioning besides the text."""
    return unet(use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=60)  # fmt: skip


_DIT = dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
            patch_size=2)  # fmt: skip


def dit(classes: int = 10, **fields: Any) -> nn.Module:
    """As converted from the original: all blocks have the same class table and timestep embedding."""
    from diffusers import DiTTransformer2DModel

    model = stir(DiTTransformer2DModel(**_DIT | fields, norm_num_groups=8, num_embeds_ada_norm=classes))
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return model


def pixart() -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    return stir(PixArtTransformer2DModel(**_DIT, cross_attention_dim=16, caption_channels=12))


def sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return stir(SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=12, out_channels=4,
        pos_embed_max_size=8,
    ))  # fmt: skip


def flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return stir(FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=12, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    ))  # fmt: skip


def sana() -> nn.Module:
    from diffusers import SanaTransformer2DModel

    return stir(SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12,
        sample_size=8, patch_size=1,
    ))  # fmt: skip


def vae() -> nn.Module:
    from diffusers import AutoencoderKL

    return stir(AutoencoderKL(
        block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ))  # fmt: skip


def text(projection: bool = False) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                            num_attention_heads=2, max_position_embeddings=12, bos_token_id=48, eos_token_id=49,
                            pad_token_id=0, projection_dim=16)  # fmt: skip
    return stir((CLIPTextModelWithProjection if projection else CLIPTextModel)(config))


MODELS = {"unet": unet, "sdxl": sdxl, "dit": dit, "pixart": pixart, "sd3": sd3, "flux": flux, "sana": sana,
          "vae": vae, "text": text}  # fmt: skip


@torch.no_grad()
def stir(model: nn.Module) -> nn.Module:
    """Fresh weights of moderate size, the same each time; nothing is zero or one."""
    generator = torch.Generator().manual_seed(5)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.copy_(noise / max(p[0].numel(), 1) ** 0.5 if p.dim() > 1 else 1 + 0.1 * noise)
    return model.eval()


def inputs(name: str, batch: int = 2) -> tuple[Any, ...]:
    """Arguments for the model of that name."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    t = torch.tensor([3, 500])[:batch]
    pooled = {"text_embeds": draw(12), "time_ids": draw(6)}
    return {
        "unet": lambda: (draw(4, 8, 8), t, draw(3, 16)),
        "sdxl": lambda: (draw(4, 8, 8), t, draw(3, 16), None, None, None, None, pooled),
        "dit": lambda: (draw(4, 8, 8), t, torch.tensor([1, 7])[:batch]),
        "pixart": lambda: (draw(4, 8, 8), draw(3, 12), t, {"resolution": None, "aspect_ratio": None}),
        "sd3": lambda: (draw(4, 8, 8), draw(3, 12), draw(12), t),
        "flux": lambda: (draw(4, 4), draw(2, 12), draw(12), t / 1000, torch.rand(4, 3), torch.rand(2, 3), t * 1.0),
        "sana": lambda: (draw(4, 8, 8), draw(3, 12), t),
        "vae": lambda: (draw(3, 16, 16),),
        "text": lambda: (torch.tensor([[48, 5, 9, 49], [48, 7, 49, 49]])[:batch],),
    }[name]()


def run(model: Any, args: tuple[Any, ...]) -> Tensor:
    out = model(*args)
    return next(t for t in (getattr(out, "sample", None), getattr(out, "last_hidden_state", None)) if t is not None)


@torch.no_grad()
def see(model: Any, args: tuple[Any, ...]) -> Tensor:
    return run(model, args)
