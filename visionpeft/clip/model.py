"""CLIP models by name, with their tokenizer and preprocessing, and the checks that open_clip only warns of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from visionpeft.clip.errors import ClipError
from visionpeft.data.preprocessing import Preprocessing, preprocessing
from visionpeft.errors import require

RANDOM = "random"  # the checkpoint of a model that is left as it was drawn
WITH_WEIGHTS = ("local-dir:", "hf-hub:")  # open_clip's names for a configuration and weights together
OPENAI_KEYS = {"input_resolution", "context_length", "vocab_size"}  # only OpenAI's files carry these


class Clip(NamedTuple):
    """A model, what makes tokens for it, and what happens to its images."""

    model: Any
    tokenizer: Callable[..., Tensor]
    preprocessing: Preprocessing
    name: str


def build(name: str, checkpoint: str | None = None) -> Clip:
    """A CLIP model in eval.

    Args:
        name: a model of open_clip ("ViT-B-32", or with its weights "local-dir:PATH" or "hf-hub:NAME"), or "nano_clip",
            which comes with this library.
        checkpoint: a local file of weights, one of open_clip's tags ("openai"), or "random" for the random start; None
            where weights come with the name, for nano_clip the bundled ones.

    Raises:
        ClipError: unknown name, no weights, a file that is not there or does not fit, QuickGELU where the weights want
            GELU.
        MissingExtra: open_clip is not installed.
    """
    from visionpeft.clip import nano

    open_clip = require("open_clip", extra="clip")
    if name == nano.NAME:
        return nano.create(checkpoint)
    if name.startswith(WITH_WEIGHTS):
        if checkpoint is not None:
            raise ClipError(f"{name} brings its own weights: leave the checkpoint {checkpoint!r} out")
    elif name not in open_clip.list_models():
        raise ClipError(f"open_clip has no model {name!r}{_nearest(name, open_clip.list_models())}")
    elif checkpoint is None:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ClipError(f"{name} needs weights, or it would be as drawn at random: give a checkpoint, a file or one of "
                        f"its tags: {tags}; 'random' if that is meant")  # fmt: skip
    elif checkpoint != RANDOM:
        check_activation(name, checkpoint)
    weights = None if checkpoint == RANDOM else checkpoint
    try:
        model = open_clip.create_model(name, pretrained=weights, require_pretrained=checkpoint != RANDOM).eval()
        tokenizer = open_clip.get_tokenizer(name)
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        raise ClipError(f"{name} with weights {checkpoint!r} cannot be made: {error}") from error
    return Clip(model, tokenizer, preprocessing(model), name)


def check_activation(name: str, checkpoint: str) -> None:
    """Refuse weights that were trained with QuickGELU in a model with GELU, and the other way round.

    Known for open_clip's tags and for OpenAI's own files; other files do not say what they were trained with.

    Raises:
        ClipError: with the name of the configuration that fits.
    """
    open_clip = require("open_clip", extra="clip")
    wanted = _wants_quick_gelu(open_clip, name, checkpoint)
    has = bool((open_clip.get_model_config(name) or {}).get("quick_gelu", False))
    if wanted is None or wanted == has:
        return
    right = f"{name}-quickgelu" if wanted else name.removesuffix("-quickgelu")
    there = right if right in open_clip.list_models() else f"a configuration with quick_gelu={wanted}"
    raise ClipError(
        f"the weights {checkpoint!r} were trained with {'QuickGELU' if wanted else 'GELU'}, and {name} has the other "
        f"activation: accuracy would suffer silently. Use {there}"
    )


def _wants_quick_gelu(open_clip: Any, name: str, checkpoint: str) -> bool | None:
    path = Path(checkpoint).expanduser()
    if path.is_file():
        return True if OPENAI_KEYS <= _keys(path) else None
    tags = open_clip.list_pretrained_tags_by_model(name)
    if checkpoint not in tags:
        raise ClipError(f"{checkpoint!r} is neither a file nor a tag of {name}; its tags: {', '.join(tags) or 'none'}")
    return bool(open_clip.get_pretrained_cfg(name, checkpoint).get("quick_gelu", False))


def _keys(path: Path) -> set[str]:
    """Names of the tensors in a file; nothing is unpickled but tensors."""
    if path.suffix in (".npz", ".npy"):
        return set()
    try:
        if path.suffix == ".safetensors":
            with safe_open(str(path), "pt") as file:
                return set(file.keys())
        state = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # torch raises almost anything on a file that is none of its own
        raise ClipError(f"{path}: no safe torch checkpoint ({error}); save its state dict as .safetensors") from error
    return set(state.get("state_dict", state))


def _nearest(name: str, names: list[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, names, n=3)
    return f", perhaps {' or '.join(close)}" if close else ": see open_clip.list_models()"


def logit_scale(model: nn.Module) -> tuple[float, float]:
    """The factor exp(logit_scale) and the bias (0 without) of a model's logits."""
    bias = getattr(model, "logit_bias", None)
    scale: Any = model.logit_scale
    return float(scale.detach().exp()), 0.0 if bias is None else float(bias.detach())
