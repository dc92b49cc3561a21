"""A text-to-image pipeline small enough to ship: 32x32 pixels, latents of 12 x 8 x 8, a vocabulary of 2,024.

`scripts/build_diffusion_assets.py` trained it; `assets/nano_diffusion.md` says on what, and how well it does. The
classes are diffusers' and transformers' own: StableDiffusionPipeline, UNet2DConditionModel, AutoencoderTiny,
CLIPTextModel (the text tower of `nano_clip`, whose table of merges it reads too) and DDIMScheduler (v-prediction).

A vocabulary of the usual size has rare words by accident; this one has five on purpose (`RARE`), in no caption.
"""

from __future__ import annotations

import gzip
from contextlib import nullcontext
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visionpeft.errors import VisionPEFTError, require

NAME = "nano_diffusion"
MERGES = "nano_clip_bpe.txt.gz"
RARE = ("qxj", "vkz", "xqf", "jzk", "zqx")
LENGTH = 32

UNET: dict[str, Any] = dict(
    sample_size=8, in_channels=12, out_channels=12, layers_per_block=1, block_out_channels=(48, 96),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=128, attention_head_dim=4, norm_num_groups=16,
)  # fmt: skip
VAE: dict[str, Any] = dict(
    encoder_block_out_channels=(32,) * 3, decoder_block_out_channels=(32,) * 3, latent_channels=12,
    num_encoder_blocks=(0, 1, 2), num_decoder_blocks=(2, 1, 1),
)  # fmt: skip
SCHEDULER: dict[str, Any] = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
    clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="trailing",
)  # fmt: skip


def create(checkpoint: str | Path | None = None, pretrained: bool = True) -> Any:
    """The `StableDiffusionPipeline`, its parts in eval; without a safety checker.

    Args:
        checkpoint: a file to take instead of the bundled weights.
        pretrained: False leaves the random start (seed torch beforehand).

    Raises:
        VisionPEFTError: the weights are not in this installation, or do not fit.
        MissingExtra: diffusers or transformers is not installed.
    """
    diffusers, transformers = require("diffusers", extra="diffusion"), require("transformers", extra="diffusion")
    words = tokenizer()
    vae = diffusers.AutoencoderTiny(**VAE)
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**_text(len(words))))
    unet = diffusers.UNet2DConditionModel(**UNET)
    if pretrained:
        scale = _load({"vae": vae, "text_encoder": text, "unet": unet}, checkpoint)
        vae.register_to_config(scaling_factor=scale)
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=text.eval(), tokenizer=words, unet=unet.eval(), feature_extractor=None,
        scheduler=diffusers.DDIMScheduler(**SCHEDULER), safety_checker=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tokenizer() -> Any:
    """A CLIPTokenizer with the bundled merges and those of the rare words."""
    clip_tokenizer = require("transformers", extra="diffusion").CLIPTokenizer
    packed = (files("visionpeft.assets") / MERGES).read_bytes()
    merges = [(a, b) for a, b in (line.split() for line in gzip.decompress(packed).decode().split("\n")[1:])]
    for word in RARE:
        merges += [(word[0], word[1]), (word[:2], f"{word[2]}</w>")]
    letters = _letters()
    symbols = [*letters, *(f"{c}</w>" for c in letters), *(a + b for a, b in merges)]
    vocabulary = {s: i for i, s in enumerate([*symbols, "<|startoftext|>", "<|endoftext|>"])}
    return clip_tokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def _letters() -> list[str]:
    """CLIP's spelling of the 256 bytes, in the order of its vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]


def _text(words: int) -> dict[str, Any]:
    return dict(
        vocab_size=words, hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=LENGTH, hidden_act="gelu", bos_token_id=words - 2, eos_token_id=words - 1,
        pad_token_id=words - 1, projection_dim=128,
    )  # fmt: skip


def from_open_clip(tower: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    """The state dict of open_clip's text tower in the names of CLIPTextModel.

    Args:
        rows: length of the table; new rows, behind the merges and before the two special tokens, are drawn as
            open_clip draws them (deviation 0.02, from torch's generator).
    """
    table = tower["token_embedding.weight"]
    new = 0.02 * torch.randn(rows - len(table), table.shape[1])
    found = {
        "embeddings.token_embedding.weight": torch.cat([table[:-2], new, table[-2:]]),
        "embeddings.position_embedding.weight": tower["positional_embedding"],
        "final_layer_norm.weight": tower["ln_final.weight"],
        "final_layer_norm.bias": tower["ln_final.bias"],
    }
    names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
             "attn.out_proj": "self_attn.out_proj"}  # fmt: skip
    for key, value in tower.items():
        if not key.startswith("transformer.resblocks."):
            continue
        index, rest = key.removeprefix("transformer.resblocks.").split(".", 1)
        if rest.startswith("attn.in_proj_"):
            for name, part in zip(("q_proj", "k_proj", "v_proj"), value.chunk(3), strict=True):
                found[f"encoder.layers.{index}.self_attn.{name}.{rest.removeprefix('attn.in_proj_')}"] = part
        else:
            module, _, kind = rest.rpartition(".")
            found[f"encoder.layers.{index}.{names[module]}.{kind}"] = value
    return found


def pack(pipe: Any) -> dict[str, Tensor]:
    """What the file of weights holds: all parts in half precision, and the autoencoder's scale."""
    parts = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "unet")}
    found = {f"{name}.{key}": value.detach().half().contiguous()
             for name, part in parts.items() for key, value in part.state_dict().items()}
    return found | {"scaling_factor": torch.tensor(pipe.vae.config.scaling_factor)}


def _load(parts: dict[str, nn.Module], checkpoint: str | Path | None) -> float:
    from safetensors.torch import load_file

    asset = files("visionpeft.assets") / f"{NAME}.safetensors"
    with as_file(asset) if checkpoint is None else nullcontext(Path(checkpoint).expanduser()) as path:
        if not path.is_file():
            raise VisionPEFTError(f"{path} is not there: scripts/build_diffusion_assets.py makes the nano weights")
        tensors = load_file(path)
    try:
        for name, part in parts.items():
            own = {key.removeprefix(f"{name}."): t.float() for key, t in tensors.items() if key.startswith(f"{name}.")}
            part.load_state_dict(own)
    except RuntimeError as error:
        raise VisionPEFTError(f"{checkpoint or asset} does not fit {NAME}: {error}") from error
    return float(tensors["scaling_factor"])
