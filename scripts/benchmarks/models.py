"""What is measured, a model and a batch for it, and who: ways to make a model learn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import visionpeft as vp

ATTENTION = "query key value attn_out"

Batch = tuple[tuple[Any, ...], dict[str, Any]]


def timm_model(name: str, size: int, **arguments: Any) -> Callable[[int], tuple[nn.Module, Batch]]:
    def make(batch: int) -> tuple[nn.Module, Batch]:
        import timm

        model = timm.create_model(name, num_classes=100, **arguments)
        return model, ((torch.randn(batch, 3, size, size, requires_grad=True),), {})

    return make


def vit_b_32() -> nn.Module:
    import open_clip

    return open_clip.create_model("ViT-B-32")


def small_clip() -> nn.Module:
    import open_clip

    vision = {"image_size": 224, "layers": 2, "width": 384, "patch_size": 32}
    text = {"context_length": 77, "vocab_size": 1000, "width": 256, "heads": 4, "layers": 2}
    return open_clip.CLIP(64, vision, text)


def clip_model(create: Callable[[], Any]) -> Callable[[int], tuple[nn.Module, Batch]]:
    """Both towers; the gradient reaches the images and, since tokens take none, the embedded text."""

    def make(batch: int) -> tuple[nn.Module, Batch]:
        model = create()
        model.token_embedding.register_forward_hook(lambda m, i, y: y if y.requires_grad else y.requires_grad_())
        size, length = model.visual.image_size[0], model.context_length
        images = torch.randn(batch, 3, size, size, requires_grad=True)
        return model, ((images, torch.randint(1, 999, (batch, length))), {})

    return make


def unet(width: int, context: int, heads: int) -> Callable[[int], tuple[nn.Module, Batch]]:
    """The UNet of SD 1.5 where width is 320; 32 x 32 latents, 77 tokens."""

    def make(batch: int) -> tuple[nn.Module, Batch]:
        from diffusers import UNet2DConditionModel

        widths = (width, 2 * width, 4 * width, 4 * width)
        model = UNet2DConditionModel(sample_size=32, block_out_channels=widths, cross_attention_dim=context,
                                     attention_head_dim=heads, norm_num_groups=32)  # fmt: skip
        latents = torch.randn(batch, 4, 32, 32, requires_grad=True)
        text = torch.randn(batch, 77, context, requires_grad=True)
        return model, ((latents, torch.tensor(500), text), {"return_dict": False})

    return make


@dataclass(frozen=True)
class Subject:
    title: str
    make: Callable[[int], tuple[nn.Module, Batch]]
    batch: int
    goal: float
    """Most that LoRA on all Linears may keep, as a share of the frozen model."""


SUBJECTS = {
    "vit_s": Subject("ViT-S/16, 224 px", timm_model("vit_small_patch16_224", 224), 8, 1.01),
    "vit_b": Subject("ViT-B/16, 224 px", timm_model("vit_base_patch16_224", 224), 4, 1.01),
    "swin_t": Subject("Swin-T, 224 px", timm_model("swin_tiny_patch4_window7_224", 224), 4, 1.10),
    "convnext_t": Subject("ConvNeXt-T, 224 px", timm_model("convnext_tiny", 224), 4, 1.01),
    "clip": Subject("open_clip ViT-B-32, both towers", clip_model(vit_b_32), 8, 1.01),
    "unet": Subject("SD 1.5 UNet, 32 x 32 latents", unet(320, 768, 8), 1, 1.01),
}
SMALL = {
    "vit": Subject("ViT-S, 2 blocks", timm_model("vit_small_patch16_224", 224, depth=2), 4, 1.01),
    "swin": Subject("Swin-T, 4 blocks", timm_model("swin_tiny_patch4_window7_224", 224, depths=(1, 1, 1, 1)), 2, 1.10),
    "convnext": Subject("ConvNeXt-T, 4 blocks", timm_model("convnext_tiny", 224, depths=(1, 1, 1, 1)), 2, 1.01),
    "clip": Subject("CLIP, 2 + 2 blocks", clip_model(small_clip), 4, 1.01),
    "unet": Subject("UNet, a tenth as wide", unet(32, 64, 4), 2, 1.01),
}
"""For --check."""


# Who is measured: ways to make a model learn


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


def ours(method: Any, **options: Any) -> Callable[[nn.Module], nn.Module]:
    def dress(model: nn.Module) -> nn.Module:
        vp.attach(model.requires_grad_(False), method, **options)
        return model

    return dress


def peft_lora(rank: int = 8, kind: type[nn.Module] = nn.Linear) -> Callable[[nn.Module], nn.Module]:
    def dress(model: nn.Module) -> nn.Module:
        import peft

        names = [name for name, module in model.named_modules() if isinstance(module, kind)]
        keep = [n for n in names if not n.endswith(("head", "head.fc"))]
        return peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=keep), model)

    return dress


def lycoris_lora(rank: int = 8) -> Callable[[nn.Module], nn.Module]:
    def dress(model: nn.Module) -> nn.Module:
        import lycoris

        lycoris.logger.setLevel("ERROR")
        lycoris.LycorisNetwork.apply_preset({"target_module": ["Linear"], "exclude_name": [r"(.*\.)?head(\.fc)?$"]})
        model.requires_grad_(False)
        network = lycoris.create_lycoris(model, 1.0, linear_dim=rank, linear_alpha=rank, algo="lora")
        network.apply_to()
        model.add_module("lycoris", network)
        return model

    return dress


LORA, DROPOUT = "LoRA r8, all Linears", "LoRA r8, dropout 0.25, attention"
PEFT, LYCORIS = "PEFT LoRA r8, all Linears", "LyCORIS LoRA r8, all Linears"
SSF_AGAIN, DIFFFIT_AGAIN = "SSF, all computed again", "DiffFit, all computed again"
CONTENDERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "frozen": frozen,
    LORA: ours(vp.LoRA(rank=8, targets="linear")),
    PEFT: peft_lora(),
    LYCORIS: lycoris_lora(),
    DROPOUT: ours(vp.LoRA(rank=8, targets=ATTENTION, dropout=0.25)),
    "SSF": ours(vp.SSF()),
    SSF_AGAIN: ours(vp.SSF(recompute="attn_out mlp_out")),
    "BitFit": ours("bitfit"),
    "LN-tuning": ours("ln_tuning"),
    "AdaptFormer-8": ours(vp.AdaptFormer(hidden=8)),
    "Convpass-8": ours(vp.methods.Convpass(hidden=8)),
    "DiffFit": ours(vp.DiffFit()),
    DIFFFIT_AGAIN: ours(vp.DiffFit(recompute="attn_out mlp_out")),
    "LoRA, memory=keep": ours(vp.LoRA(rank=8, targets="linear"), memory="keep"),
    "LoRA, memory=checkpoint": ours(vp.LoRA(rank=8, targets="linear"), memory="checkpoint"),
    "LoRA, memory=reversible": ours(vp.LoRA(rank=8, targets="linear"), memory="reversible"),
    "full fine-tuning": lambda model: model.requires_grad_(True),
}
KEEPS = {
    LORA: "nothing: inputs are made again from what norm and activation layers keep",
    PEFT: "the input of every Linear",
    LYCORIS: "the input of every Linear",
    DROPOUT: "nothing: masks are drawn again from a seed",
    "SSF": "what the second Linear of each MLP gives, for gamma's gradient; the others are inverted or computed again",
    SSF_AGAIN: "the patch embedding's weight with gamma in it",
    "BitFit": "nothing: the gradient of a bias is a sum of what arrives",
    "LN-tuning": "nothing: a LayerNorm keeps its input and statistics in any case",
    "AdaptFormer-8": "its own tensors, 8 wide; its input is what the next norm keeps",
    "Convpass-8": "its own tensors, 8 wide; its input is made again from the norm before",
    "DiffFit": "as SSF: what the second Linear of each MLP gives",
    DIFFFIT_AGAIN: "nothing on a ViT",
    "LoRA, memory=keep": "the input of every Linear",
    "LoRA, memory=checkpoint": "the input of every block",
    "LoRA, memory=reversible": "two states, and 6 bits for each element and block",
    "full fine-tuning": "the input of every Linear",
}
"""What each must keep for backward beyond what the frozen model keeps, and why."""
