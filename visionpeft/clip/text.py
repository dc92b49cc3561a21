r"""Text features and zero-shot classifiers.

    w_c = normalize(mean_t normalize(encode_text(t(c))))        W = [w_1 ... w_C], (d, C)

as `open_clip.build_zero_shot_classifier` makes them. Under a causal mask nothing behind the end-of-text token can
reach it, so the padding is cut off before encoding, which prompts of ten tokens in a context of 77 repay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionpeft.clip.errors import ClipError
from visionpeft.clip.templates import Template, fill
from visionpeft.errors import require

Tokenizer = Callable[..., Tensor]


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], context_length: int, cut: bool = False) -> Tensor:
    """Token ids (N, context_length); open_clip's tokenizers cut what is too long without a word.

    Args:
        cut: keep the beginning of long texts, as one does with captions; a prompt would lose its class name.

    Raises:
        ClipError: a text has more tokens than the context, and may not be cut.
    """
    if cut:
        return tokenizer(list(texts), context_length=context_length)
    ids = tokenizer(list(texts), context_length=context_length + 1)
    padding = tokenizer([""], context_length=context_length + 1)[0, -1]
    full = (ids[:, context_length - 1] != padding).nonzero().flatten()
    if len(full):
        # SigLIP pads with the end of text and cuts before it: only a text that fits is the same cut here and there.
        cut_here = tokenizer([texts[i] for i in full.tolist()], context_length=context_length)
        fits = (ids[full, -1] == padding) & (ids[full, :context_length] == cut_here).all(1)
        _check_lengths([texts[i] for i in full[~fits].tolist()], len(texts), context_length)
    return ids[:, :context_length]


def _check_lengths(long: Sequence[str], count: int, context_length: int) -> None:
    if long:
        shown = long[0] if len(long[0]) < 80 else f"{long[0][:77]}..."
        raise ClipError(
            f"{len(long)} of {count} texts have more tokens than the context of {context_length}: {shown!r}; "
            "shorten the class name or the template"
        )


def text_root(model: nn.Module) -> Any:
    """The module that holds the text tower's parts: the root of CLIP, `text` elsewhere."""
    return getattr(model, "text", model)


def is_causal(model: nn.Module) -> bool:
    """Whether the text tower is open_clip's own and its feature depends on no token behind the end of text."""
    root = text_root(model)
    pool = getattr(root, "text_pool_type", getattr(root, "pool_type", None))
    plain = type(root).__module__.startswith("open_clip.") and hasattr(root, "token_embedding")
    masked = getattr(root, "attn_mask", None) is not None and getattr(root, "cls_emb", None) is None
    return plain and masked and pool in ("argmax", "eos")


def encode_tokens(model: nn.Module, ids: Tensor, embeddings: Tensor | None = None,
                  through: Callable[..., Tensor] | None = None) -> Tensor:  # fmt: skip
    """Text features (N, d), not normalised, of token ids (N, L).

    Args:
        embeddings: what stands instead of the token embeddings, (N, L, width), for learnt prompts; `ids` still says
            where the text ends.
        through: what stands instead of the transformer, for prompts in its blocks.

    Raises:
        ClipError: embeddings for a text tower that takes only ids.
    """
    if not is_causal(model):
        if embeddings is not None:
            raise ClipError(f"learnt prompts need open_clip's causal text tower, not a {type(model).__name__}'s")
        return _encode(model, ids)
    root = text_root(model)
    end = _end(root, ids)
    length = int(end.max()) + 1
    dtype = root.transformer.get_cast_dtype()
    x = root.token_embedding(ids[:, :length]) if embeddings is None else embeddings[:, :length]
    x = x.to(dtype) + root.positional_embedding[:length].to(dtype)
    x = (through or root.transformer)(x, attn_mask=root.attn_mask[:length, :length])
    x = root.ln_final(x)[torch.arange(len(x), device=x.device), end]
    projection = root.text_projection
    return x if projection is None else projection(x) if isinstance(projection, nn.Linear) else x @ projection


def _encode(model: Any, ids: Tensor) -> Tensor:
    return model.encode_text(ids, normalize=False)


def _end(root: Any, ids: Tensor) -> Tensor:
    """Position of the end-of-text token: the highest id, or the one that the tower names."""
    pool = getattr(root, "text_pool_type", getattr(root, "pool_type", None))
    if pool == "argmax":
        return ids.argmax(-1)
    eos = root.text_eos_id if hasattr(root, "text_eos_id") else root.eos_id
    return ids.eq(eos).int().argmax(-1)


def class_prompts(classes: Sequence[str], templates: Sequence[Template]) -> list[str]:
    """Every template filled with every class, class by class.

    open_clip's names for ImageNet have two twice, and are taken as they are: published accuracies were made with them.

    Raises:
        ClipError: no class, an empty name, or one that occurs twice, whose images could not be told apart.
    """
    if not classes:
        raise ClipError("the list of classes is empty")
    empty = [i for i, name in enumerate(classes) if not name.strip()]
    twice = [name for name, count in Counter(classes).items() if count > 1]
    if empty or (twice and list(classes) != list(require("open_clip", extra="clip").IMAGENET_CLASSNAMES)):
        what = f"class {empty[0]} has no name" if empty else f"class {twice[0]!r} is listed more than once"
        raise ClipError(f"{what}: every class needs a name of its own")
    return [fill(template, name) for name in classes for template in templates]


def zero_shot_weights(model: nn.Module, tokenizer: Tokenizer, classes: Sequence[str], templates: Sequence[Template],
                      batch: int = 256) -> Tensor:  # fmt: skip
    """Zero-shot classifier W (d, C), columns of unit length; the model runs in eval, without gradients.

    Args:
        batch: prompts encoded at once.

    Raises:
        ClipError: bad classes, or a prompt beyond the context.
    """
    prompts = class_prompts(classes, templates)
    ids = tokenize(tokenizer, prompts, _context(model))
    return ensemble(encode_all(model, ids, batch), len(classes))


def ensemble(features: Tensor, classes: int) -> Tensor:
    """W (d, C) of the features (C T, d) of every class's T prompts, class by class."""
    return F.normalize(features.unflatten(0, (classes, -1)).mean(1), dim=-1).t()


@torch.no_grad()
def encode_all(model: nn.Module, ids: Tensor, batch: int = 256) -> Tensor:
    """Unit-length text features (N, d) of token ids (N, L), in eval; short texts are encoded together."""
    device = next(model.parameters()).device
    order = (ids != 0).sum(1).argsort(stable=True)  # by length: less padding in a batch
    with evaluating(model):
        parts = [F.normalize(encode_tokens(model, ids[rows].to(device)), dim=-1) for rows in order.split(batch)]
    return torch.cat(parts)[order.argsort()]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval; afterwards every module's mode is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _context(model: nn.Module) -> int:
    found = getattr(model, "context_length", None)
    if found is None:
        raise ClipError(f"{type(model).__name__} has no context_length: is it a CLIP model of open_clip?")
    return int(found)
