"""Small timm models with random weights, one of each family, and the sites that each must have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import timm
import torch
from timm.models.davit import DaVit
from timm.models.levit import LevitDistilled
from timm.models.maxxvit import MaxxVit, model_cfgs
from timm.models.mlp_mixer import MlpMixer
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from timm.models.resnetv2 import ResNetV2
from timm.models.volo import VOLO
from torch import Tensor, nn

CLASSES = 7


@dataclass(frozen=True)
class Member:
    """A model, its input size, and how many sites of each role it has.

    `roles` leaves out the norms and convs without a better role. `exact` is False where binding adds the bias of q, k
    and v in another order, so that step 0 is the same to 1e-6 only.
    """

    make: Callable[[], nn.Module]
    size: int
    roles: str
    default: int
    linear: int
    ssf: int
    heads: str = "head"
    exact: bool = True
    bypassed: int = 0

    def build(self, seed: int = 0) -> nn.Module:
        """Weights that hide nothing: no zero-initialised scale, gain or projection."""
        torch.manual_seed(seed)
        model = self.make()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn_like(p) * 0.1 + (1.0 if p.dim() == 1 and p.mean() > 0.5 else 0.0))
        return model.eval()

    def input(self, batch: int = 2) -> Tensor:
        return torch.randn(batch, 3, self.size, self.size, generator=torch.Generator().manual_seed(1))

    def counts(self) -> dict[str, int]:
        return {role: int(n) for role, n in (word.split("=") for word in self.roles.split())}


def _vit(name: str, size: int = 32, **more: object) -> Callable[[], nn.Module]:
    small = dict(img_size=size, embed_dim=48, depth=2, num_heads=3, num_classes=CLASSES)
    return partial(timm.create_model, name, **{**small, **more})


def _create(name: str, **small: object) -> Callable[[], nn.Module]:
    return partial(timm.create_model, name, num_classes=CLASSES, **small)


def _maxvit(cfg: str) -> nn.Module:
    c = model_cfgs[cfg]
    small = dict(embed_dim=(16, 32), depths=(1, 1), block_type=("M", "M"), stem_width=16, head_hidden_size=None)
    return MaxxVit(replace(c, **small, transformer_cfg=replace(c.transformer_cfg, dim_head=8)), img_size=64,
                   num_classes=CLASSES)  # fmt: skip


def _mvitv2() -> nn.Module:
    cfg = MultiScaleVitCfg(depths=(1, 1), embed_dim=24, num_heads=1, stride_q=((1, 1), (2, 2)))
    return MultiScaleVit(cfg, img_size=(64, 64), num_classes=CLASSES)


def _volo() -> nn.Module:
    return VOLO([1, 1, 1, 1], img_size=64, embed_dims=[24, 48, 48, 48], num_heads=[2, 3, 3, 3], num_classes=CLASSES)


def _davit() -> nn.Module:
    return DaVit(depths=(1, 1), embed_dims=(24, 48), num_heads=(3, 3), window_size=4, num_classes=CLASSES)


def _levit() -> nn.Module:
    return LevitDistilled(img_size=64, embed_dim=(32, 48), key_dim=16, depth=(1, 1), num_heads=(2, 3),
                          num_classes=CLASSES)  # fmt: skip


def _bit() -> nn.Module:
    return ResNetV2(layers=(1, 1), channels=(128, 256), stem_chs=32, stem_type="fixed",
                    conv_layer=timm.layers.StdConv2d, num_classes=CLASSES)  # fmt: skip


def _swin(name: str) -> Callable[[], nn.Module]:
    small = dict(img_size=32, window_size=4, embed_dim=24, depths=(1, 2), num_heads=(2, 4), num_classes=CLASSES)
    return partial(timm.create_model, name, **small)


_PLAIN = "patch_embed=1 qkv=2 query=2 key=2 value=2 attn_out=2 mlp_in=2 mlp_out=2 attention=2 mlp=2"
_VIT, _EVA = f"{_PLAIN} block=2 head=1", f"{_PLAIN} grid=2 head=1"

ZOO = {
    "vit": Member(_vit("vit_tiny_patch16_224"), 32, _VIT, 4, 8, 14),
    "deit3": Member(_vit("deit3_small_patch16_224"), 32, _VIT, 4, 8, 14),
    "dinov2": Member(_vit("vit_small_patch14_reg4_dinov2", 28), 28, _VIT, 4, 8, 14),
    "siglip": Member(
        _vit("vit_base_patch16_siglip_224"), 32,
        "patch_embed=1 qkv=2 query=3 key=3 value=3 attn_out=3 mlp_in=3 mlp_out=3 attention=2 mlp=2 block=2 head=1",
        6, 13, 20,
    ),
    "naflexvit": Member(
        _create("naflexvit_base_patch16_gap", embed_dim=48, depth=2, num_heads=3),
        32, _VIT, 4, 9, 14,
    ),
    "samvit": Member(
        _vit("samvit_base_patch16", 64, window_size=2, global_attn_indexes=(1,)), 64,
        "patch_embed=1 qkv=2 query=2 key=2 value=2 attn_out=2 mlp_in=2 mlp_out=2 mlp=2 grid=2 head=1", 4, 8, 17,
    ),
    "dinov3": Member(_vit("vit_small_patch16_dinov3"), 32, _EVA, 4, 8, 14),
    "eva02": Member(_vit("eva02_tiny_patch14_224", 28), 28, _EVA, 4, 8, 14, exact=False, bypassed=8),
    "beitv2": Member(_vit("beitv2_base_patch16_224"), 32, _EVA, 4, 8, 14, exact=False, bypassed=8),
    "swin": Member(
        _swin("swin_tiny_patch4_window7_224"), 32,
        "patch_embed=1 qkv=3 query=3 key=3 value=3 attn_out=3 mlp_in=3 mlp_out=3 attention=3 mlp=3 grid=3 head=1",
        6, 13, 23, heads="head.fc",
    ),
    "swinv2": Member(
        _swin("swinv2_tiny_window8_256"), 32,
        "patch_embed=1 qkv=3 query=3 key=3 value=3 attn_out=3 mlp_in=3 mlp_out=3 mlp=3 grid=3 head=1", 6, 19, 29,
        heads="head.fc", exact=False, bypassed=12,
    ),
    "mixer": Member(
        partial(MlpMixer, img_size=32, patch_size=8, embed_dim=48, num_blocks=2, num_classes=CLASSES), 32,
        "patch_embed=1 mlp_in=4 mlp_out=4 head=1", 8, 8, 14,
    ),
    "maxvit": Member(
        partial(_maxvit, "maxvit_tiny_tf"), 64,
        "qkv=4 query=4 key=4 value=4 attn_out=4 mlp_in=4 mlp_out=4 attention=4 mlp=4 head=1", 8, 16, 45,
        heads="head.fc",
    ),
    "maxvit_head_first": Member(
        partial(_maxvit, "maxvit_rmlp_pico_rw"), 64, "qkv=4 attn_out=4 mlp_in=4 mlp_out=4 attention=4 mlp=4 head=1",
        4, 24, 53, heads="head.fc",
    ),
    "cait": Member(
        _vit("cait_xxs24_224"), 32,
        "patch_embed=1 qkv=2 query=4 key=4 value=4 attn_out=4 mlp_in=4 mlp_out=4 head=1", 8, 24, 34,
    ),
    "xcit": Member(
        _vit("xcit_nano_12_p16_224"), 32,
        "qkv=2 query=4 key=4 value=4 attn_out=4 mlp_in=4 mlp_out=4 attention=2 mlp=2 head=1", 8, 20, 46,
    ),
    "volo": Member(
        _volo, 64, "patch_embed=1 qkv=3 query=5 key=5 value=6 attn_out=6 mlp_in=6 mlp_out=6 head=2", 11, 27, 48,
        heads="aux_head head",
    ),
    "hiera": Member(
        _create("hiera_tiny_224", img_size=64, embed_dim=24, stages=(1, 1, 1, 1)),
        64, "patch_embed=1 qkv=4 query=4 key=4 value=4 attn_out=4 mlp_in=4 mlp_out=4 mlp=4 grid=4 head=1", 8, 19, 29,
        heads="head.fc",
    ),
    "mvitv2": Member(
        _mvitv2, 64, "patch_embed=1 qkv=2 query=2 key=2 value=2 attn_out=2 mlp_in=2 mlp_out=2 head=1", 4, 9, 27,
        heads="head.fc",
    ),
    "davit": Member(
        _davit, 64, "qkv=4 query=4 key=4 value=4 attn_out=4 mlp_in=4 mlp_out=4 mlp=4 head=1", 8, 16, 37,
        heads="head.fc",
    ),
    "levit": Member(
        _levit, 64, "qkv=3 query=1 attn_out=3 mlp_in=3 mlp_out=3 head=4", 3, 13, 34, heads="head head_dist",
    ),
    "convnext": Member(
        _create("convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)), 64,
        "mlp_in=4 mlp_out=4 map=4 head=1", 8, 8, 25, heads="head.fc",
    ),
    "convnext_of_convs": Member(
        _create("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)), 64,
        "mlp_in=4 mlp_out=4 map=4 head=1", 8, 0, 25, heads="head.fc",
    ),
    "resnet": Member(_create("test_resnet"), 64, "head=1", 15, 0, 30, heads="fc"),
    "bit": Member(_bit, 64, "head=1", 9, 0, 16, heads="head.fc"),
    "nfnet": Member(_create("test_nfnet"), 64, "head=1", 33, 0, 33, heads="head.fc"),
    "efficientnet": Member(
        _create("test_efficientnet"), 64, "head=1", 17, 0, 30, heads="classifier"
    ),
    "regnet": Member(
        _create("regnety_002"), 64, "head=1", 70, 0, 114, heads="head.fc"
    ),
}  # fmt: skip

ATTENTION = [n for n, m in ZOO.items() if {"query", "qkv"} <= set(m.counts()) and n != "levit"]
CONVS = [n for n, m in ZOO.items() if not m.linear]
