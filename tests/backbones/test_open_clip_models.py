"""The real models of open_clip on the meta device: the sites of each tower, and that adapters act at every one."""

from __future__ import annotations

import logging
from collections import Counter

import open_clip
import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP
from open_clip_zoo import CUSTOM, UNUSED
from torch import nn

import visionpeft as vp
from visionpeft.sites import Backbone

Q, OUT, MLP = ("query", "key", "value"), ("attn_out",), ("mlp_in", "mlp_out")


def many(*pairs: tuple[tuple[str, ...], int]) -> dict[str, int]:
    return {role: count for roles, count in pairs for role in roles}


TEXT = {**many((Q + OUT + MLP, 12)), "embed": 1, "norm": 25, "projection": 1}
VIT = {**many((Q + OUT + MLP, 12)), "patch_embed": 1, "norm": 26, "projection": 1}
TRUNK = {**many((Q + OUT + MLP + ("qkv", "block"), 12)), "patch_embed": 1, "norm": 25, "projection": 1}
SIGLIP = {**many((Q + OUT + MLP, 13), (("qkv", "block"), 12)), "patch_embed": 1, "norm": 26, "": 1}

# model -> (parameters, sites of the image tower by role, of the text tower)
MODELS: dict[str, tuple[int, dict[str, int], dict[str, int]]] = {
    "ViT-B-32": (151_277_313, VIT, TEXT),
    "ViT-B-16": (149_620_737, VIT, TEXT),
    "ViT-L-14": (427_616_513, {**VIT, **many((Q + OUT + MLP, 24)), "norm": 50}, TEXT),
    "ViT-B-16-SigLIP": (203_155_970, SIGLIP, TEXT),
    "ViT-B-16-SigLIP2": (375_187_970, SIGLIP, TEXT),
    "convnext_base_w": (179_385_345, {"conv": 40, "norm": 41, **many((MLP + ("map",), 36)), "projection": 1}, TEXT),
    "RN50": (102_007_137, {"conv": 55, "norm": 55, **many((Q + OUT, 1))}, TEXT),
    "coca_ViT-B-32": (253_560_065, {**VIT, **many((Q + OUT, 13)), "norm": 28}, TEXT),
    "MobileCLIP-S2": (
        99_243_329,
        {"conv": 147, "norm": 228, **many((MLP, 44), ((*Q, *OUT, "qkv"), 4)), "projection": 1},
        TEXT,
    ),
    "MobileCLIP-B": (149_777_153, {**TRUNK, "conv": 3, "norm": 27} | {"patch_embed": 0}, TEXT),
    "EVA02-B-16": (
        149_691_137,
        {**many((Q + OUT + ("mlp_out", "grid"), 12)), "mlp_in": 24, "patch_embed": 1, "norm": 49, "projection": 1},
        TEXT,
    ),
    "EVA01-g-14": (
        1_136_435_841,
        {**many((Q + OUT + MLP + ("qkv", "grid"), 40)), "patch_embed": 1, "norm": 81, "projection": 1},
        TEXT,
    ),
    "PE-Core-B-16": (
        447_660_545,
        {**many((Q + OUT + MLP, 13), (("qkv", "grid"), 12)), "patch_embed": 1, "norm": 27, "": 1, "projection": 1},
        {**TEXT, **many((Q + OUT + MLP, 24)), "norm": 49},
    ),
    "ViTamin-S": (
        62_469_185,
        {"conv": 22, "norm": 51, **many((Q + OUT + ("mlp_out", "qkv", "block"), 14)), "mlp_in": 28, "projection": 1},
        TEXT,
    ),
    "roberta-ViT-B-32": (
        87_849_216 + 124_645_632 + 768 * 640 + 640 * 512 + 1,
        VIT,
        {**many((Q + OUT + MLP, 12)), "embed": 3, "norm": 25, "": 1, "projection": 2},
    ),
    # Norms of queries, keys, heads, the attention and the MLP, and a scale a head, in every block.
    "custom blocks": (
        151_277_313 + 12 * (256 + 12 * 768 + 12 + 256 + 12 * 512 + 8),
        {**VIT, "norm": 86},
        {**TEXT, "norm": 85},
    ),
}


def hugging_face() -> nn.Module:
    """roberta-ViT-B-32; open_clip would fetch its configuration from the hub."""
    from open_clip.hf_model import HFTextEncoder
    from transformers import RobertaConfig

    vision = dict(image_size=224, layers=12, width=768, patch_size=32)
    model = CustomTextCLIP(512, vision, dict(layers=1), quick_gelu=True)
    config = RobertaConfig(vocab_size=50_265, max_position_embeddings=514, type_vocab_size=1)
    model.text = HFTextEncoder("roberta-base", 512, config=config, pooler_type="mean_pooler", proj_type="mlp",
                               pretrained=False)  # fmt: skip
    return model


def custom_blocks() -> nn.Module:
    """ViT-B-32 of the other kind of block, which open_clip takes for any of these settings."""
    vision = dict(image_size=224, layers=12, width=768, patch_size=32, **CUSTOM)
    return CLIP(512, vision, dict(context_length=77, vocab_size=49_408, width=512, heads=8, layers=12, **CUSTOM))


OTHERS = {"roberta-ViT-B-32": hugging_face, "custom blocks": custom_blocks}


def build(name: str) -> nn.Module:
    logging.disable(logging.WARNING)  # open_clip says that there are no weights
    try:
        with torch.device("meta"):
            return OTHERS[name]() if name in OTHERS else open_clip.create_model(name, pretrained=None, device="meta")
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", MODELS)
def test_sites_by_tower_and_an_adapter_at_every_linear_acts(name):
    model = build(name)
    parameters, image, text = MODELS[name]
    assert sum(p.numel() for p in model.parameters()) == parameters
    backbone = Backbone(model)
    found = {t: Counter(s.role for s in backbone.sites(t) if s.kind != "branch") for t in ("image", "text")}
    assert found == {"image": Counter(image), "text": Counter(text)}
    unused = UNUSED["roberta"] if name.startswith("roberta") else None
    # probes: a dead adapter is an error
    tuner = vp.attach(model, vp.LoRA(rank=1, targets="linear projection", exclude=unused))
    linears = [s for s in backbone.sites() if s.kind == "linear" and (not s.part or s.host) and s.path != unused]
    assert tuner.sites == linears
    assert tuner.num_parameters == sum(sum(s.shape) for s in linears)


@pytest.mark.parametrize("name, count", [("ViT-B-16", 184_320), ("ViT-B-32", 184_320), ("ViT-L-14", 405_504)])
def test_parameters_of_clip_lora(name, count):
    model = build(name)
    recipe = dict(alpha=1, dropout=0.25, rslora=True, targets="query key value")
    tuner = vp.attach(model, vp.LoRA(rank=2, **recipe))
    assert tuner.num_parameters == count
    assert {a.scale for a in tuner.adapters.values()} == {1 / 2**0.5}
    tuner.detach()
    assert vp.attach(model, vp.LoRA(rank=1, **recipe)).num_parameters == count // 2


@pytest.mark.parametrize("name, image, both", [("ViT-B-16", 39_936, 65_536), ("ViT-L-14", None, 140_800)])
def test_parameters_of_ln_tuning(name, image, both):
    model = build(name)
    tuner = vp.attach(model, vp.methods.LNTuning())
    assert tuner.num_parameters == both
    tuner.detach()
    if image is not None:
        assert vp.attach(model, vp.methods.LNTuning(tower="image")).num_parameters == image


def test_parameters_of_bitfit():
    """Every tensor whose name ends in bias, in_proj_bias too."""
    assert vp.attach(build("ViT-B-16"), vp.methods.BitFit()).num_parameters == 171_008


def test_parameters_of_clipfit():
    """Biases of the text tower's last MLP layers and the image tower's norms: 6,144 + 39,936 = 46,080."""
    model = build("ViT-B-16")
    biases = vp.attach(model, vp.methods.BitFit(tower="text", within="*.mlp.c_proj"), name="biases")
    norms = vp.attach(model, vp.methods.LNTuning(tower="image"), name="norms")
    assert (biases.num_parameters, norms.num_parameters) == (6_144, 39_936)
