"""Tiny random CLIP models of every kind that open_clip has, in float64, and an input for each."""

from __future__ import annotations

import copy
import functools
from typing import Any, NamedTuple

import open_clip
import timm
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor, nn

EMBED = 16
CONTEXT, VOCAB = 8, 40
TEXT = dict(context_length=CONTEXT, vocab_size=VOCAB, width=24, heads=2, layers=2)
VIT = dict(image_size=32, layers=2, width=32, head_width=16, patch_size=8)
CUSTOM = dict(qk_norm=True, scale_heads=True, scale_attn_inner=True, scale_attn=True, scale_fc=True)
SMALL_VIT = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)


def _timm_tower(name: str, text: dict[str, Any] = TEXT, **kwargs: Any) -> nn.Module:
    """CustomTextCLIP around a small timm trunk whose classifier is the projection, as EVA and MobileCLIP have it."""
    model = CustomTextCLIP(EMBED, dict(image_size=32, timm_model_name="test_vit", timm_pool="avg", timm_proj=""), text)
    overlay = {"input_size": (3, 32, 32), "fixed_input_size": False}
    model.visual.trunk = timm.create_model(name, num_classes=EMBED, pretrained_cfg_overlay=overlay, **kwargs)
    return model


def _trunk(trunk: nn.Module) -> nn.Module:
    model = _timm_tower("test_vit")
    model.visual.trunk = trunk
    return model


def _mobileclip_b() -> nn.Module:
    from timm.models.vision_transformer_hybrid import ConvStem, _create_vision_transformer_hybrid

    stem = ConvStem(channels=(8, 8, 32), stride=(4, 2, 2), kernel_size=(4, 2, 2), padding=0, act_layer=nn.GELU)
    small = dict(img_size=32, embed_dim=32, depth=2, num_heads=2, num_classes=EMBED, no_embed_class=True)
    return _trunk(_create_vision_transformer_hybrid("vit_base_mci_224", stem, embed_args=dict(proj=False), **small))


def _vitamin() -> nn.Module:
    from timm.models.vitamin import GeGluMlp, VitCfg, VitConvCfg, _create_vitamin

    stages = VitCfg((8, 16, 32), (1, 1, 1), 8, VitConvCfg(norm_layer="layernorm2d"), "1d")
    return _trunk(_create_vitamin("vitamin_small_224", embed_cfg=stages, img_size=32, embed_dim=32, depth=2,
                                  num_heads=2, mlp_layer=GeGluMlp, mlp_ratio=2.0, class_token=False,
                                  global_pool="avg", num_classes=EMBED))  # fmt: skip


def _siglip() -> nn.Module:
    """Attention pooling without a classifier, a text tower without mask whose projection is a Linear with bias."""
    text = dict(**TEXT, no_causal_mask=True, proj_bias=True, pool_type="last")
    model = _timm_tower("vit_base_patch16_siglip_224", text, **{**SMALL_VIT, "embed_dim": EMBED})
    model.visual.trunk.reset_classifier(0)
    return model


def _coca() -> nn.Module:
    vision = dict(**VIT, attentional_pool=True, attn_pooler_heads=2, attn_pooler_queries=5, output_tokens=True)
    text = dict(**TEXT, embed_cls=True, output_tokens=True)
    # The pooler gives the decoder its keys at its own width, so the embedding must have it too.
    multimodal = dict(context_length=CONTEXT, vocab_size=VOCAB, width=EMBED, heads=2, layers=2)
    text = {**text, "width": EMBED}
    model = open_clip.coca_model.CoCa(EMBED, multimodal, text, vision)
    nn.init.normal_(model.text_decoder.text_projection)  # open_clip leaves it uninitialised
    return model


def _hugging_face() -> nn.Module:
    from transformers import RobertaConfig

    config = RobertaConfig(
        vocab_size=VOCAB, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=CONTEXT + 8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = CustomTextCLIP(EMBED, VIT, TEXT)
    model.text = HFTextEncoder(
        "local", EMBED, config=config, pooler_type="mean_pooler", proj_type="mlp", pretrained=False
    )
    return model


MAKERS = {
    "vit": lambda: CLIP(EMBED, VIT, TEXT),
    "vit_quickgelu": lambda: CLIP(EMBED, VIT, TEXT, quick_gelu=True),
    "custom_block": lambda: CLIP(EMBED, VIT | CUSTOM, TEXT | CUSTOM),
    "rn50": lambda: CLIP(EMBED, dict(layers=(1, 1, 1, 1), width=8, head_width=8, image_size=64), TEXT),
    "coca": _coca,
    "siglip": _siglip,
    "eva01": lambda: _timm_tower("eva_giant_patch14_224", **SMALL_VIT),
    "eva02": lambda: _timm_tower("eva02_base_patch16_clip_224", **SMALL_VIT),
    "convnext": lambda: _timm_tower("convnext_base", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
    "mobileclip_s2": lambda: _timm_tower("fastvit_mci2", layers=(1, 1, 1, 1), embed_dims=(16, 16, 32, 32)),
    "mobileclip_b": _mobileclip_b,
    "pe": lambda: _timm_tower("vit_pe_core_base_patch16_224", **SMALL_VIT),
    "vitamin": _vitamin,
    "roberta": _hugging_face,
}

# Linears that open_clip makes and never uses: adapters there are dead, and refused as such.
UNUSED = {"roberta": "text.transformer.pooler.dense"}


class Zoo(NamedTuple):
    model: Any
    image: Tensor
    text: Tensor

    def features(self) -> Tensor:
        """Both towers through the methods that everybody calls: [2 N, EMBED]."""
        return torch.cat([self.model.encode_image(self.image), self.model.encode_text(self.text)])


@functools.cache
def _original(name: str) -> nn.Module:
    torch.manual_seed(3)
    model = MAKERS[name]()
    with torch.no_grad():  # nothing stays at zero or one, where mistakes would not show
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(std=0.2)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    return model.eval()


def make(name: str, dtype: torch.dtype = torch.float64) -> Zoo:
    """A fresh copy with its input; always the same numbers."""
    generator = torch.Generator().manual_seed(5)
    model = copy.deepcopy(_original(name)).to(dtype)
    text = torch.randint(3, VOCAB - 1, (2, CONTEXT), generator=generator)
    text[:, -1] = VOCAB - 1
    side = 64 if name == "rn50" else 32  # so that its pool has more than one place
    return Zoo(model, torch.randn(2, 3, side, side, generator=generator).to(dtype), text)
