r"""Losses of image-text pairs, and gradients of a large batch computed in pieces.

    clip     (CE(s I T^T) + CE(s T I^T)) / 2, pair i being the right one of row i       (Radford et al., 2103.00020)
    siglip   -1/N sum_ij log sigmoid(z_ij (s I_i T_j + b)), z = 1 on pairs, -1 off them (Zhai et al., 2303.15343)
    clipfit  CE + lambda (1 - cos(t, t_frozen))                                          (Li et al., 2410.06140)
    promptsrc  CE + 25 |t - t_frozen| + 10 |i - i_frozen| + KL(p_frozen || p)       (Khattak et al., 2307.06948)

A contrastive loss is no mean over samples, so that summing the losses of small batches is another loss. `in_pieces`
keeps the large one (Gao et al., arXiv 2101.06983): features of all pieces without gradients, the loss and its
gradients on those, then each piece again with them. Dropout draws the same masks both times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionpeft.clip.errors import ClipError

Loss = Callable[[Tensor, Tensor], Tensor]


def clip_loss(images: Tensor, texts: Tensor, scale: Tensor | float) -> Tensor:
    """Unit-length features (N, d) each -> scalar."""
    logits = scale * images @ texts.t()
    pairs = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.t(), pairs)) / 2


def siglip_loss(images: Tensor, texts: Tensor, scale: Tensor | float, bias: Tensor | float) -> Tensor:
    """Unit-length features (N, d) each -> scalar, the mean over images of the sum over texts."""
    logits = scale * images @ texts.t() + bias
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)


def clipfit_loss(logits: Tensor, labels: Tensor, texts: Tensor, frozen: Tensor, weight: float = 8.0) -> Tensor:
    """Cross-entropy of logits (N, C), and how far the class features (C, d) went from the frozen ones.

    Args:
        weight: lambda; the paper has 8 for base-to-new, 2 or 8 for few-shot.
    """
    return F.cross_entropy(logits, labels) + weight * (1 - F.cosine_similarity(texts, frozen, dim=-1)).mean()


def promptsrc_loss(logits: Tensor, labels: Tensor, texts: Tensor, frozen_texts: Tensor, images: Tensor,
                   frozen_images: Tensor, frozen_logits: Tensor, weights: tuple[float, float] = (25.0, 10.0)) -> Tensor:
    """Cross-entropy, and how far features and predictions went from the frozen model's.

    All means are over all elements, that of the divergence too: its sum over N x C divided by N C, as in the official
    code. Logits (N, C), features of unit length: texts (C, d), images (N, d).

    Args:
        weights: of the distances of texts and of images.
    """
    text, image = (F.l1_loss(*pair) for pair in ((texts, frozen_texts), (images, frozen_images)))
    away = F.kl_div(logits.log_softmax(1), frozen_logits.log_softmax(1), reduction="sum", log_target=True)
    return F.cross_entropy(logits, labels) + weights[0] * text + weights[1] * image + away / logits.numel()


def loss_of(model: Any, kind: str) -> Loss:
    """The loss with the model's own scale and bias, which get gradients if they learn.

    Raises:
        ClipError: unknown kind, or SigLIP's for a model without a bias.
    """
    if kind not in ("clip", "siglip"):
        raise ClipError(f"loss {kind!r}: use clip or siglip")
    if kind == "clip":
        return lambda images, texts: clip_loss(images, texts, model.logit_scale.exp())
    if getattr(model, "logit_bias", None) is None:
        raise ClipError("the SigLIP loss needs a logit_bias, and this model has none: use loss clip")
    return lambda images, texts: siglip_loss(images, texts, model.logit_scale.exp(), model.logit_bias)


def in_pieces(encode: Callable[..., Sequence[Tensor]], pieces: Sequence[tuple[Tensor, ...]], loss: Loss) -> Tensor:
    """Backward of `loss` over all pieces together; returns its value. One piece's activations are alive at a time.

    Args:
        encode: the tensors of a piece -> image and text features (n, d).
        pieces: the batch, cut up.
    """
    kept, states = [], []
    for piece in pieces:
        states.append(_random_state())
        with torch.no_grad():
            kept.append(encode(*piece))
    whole = [torch.cat(parts).detach().requires_grad_() for parts in zip(*kept, strict=True)]
    with torch.enable_grad():
        value = loss(*whole)
        value.backward()
    grads = []
    for leaf, parts in zip(whole, zip(*kept, strict=True), strict=True):
        assert leaf.grad is not None
        grads.append(leaf.grad.split([len(part) for part in parts]))
    for i, piece in enumerate(pieces):
        _set_random_state(states[i])
        learnt = [(f, g[i]) for f, g in zip(encode(*piece), grads, strict=True) if f.requires_grad]
        torch.autograd.backward([f for f, _ in learnt], [g for _, g in learnt])
    return value.detach()


def check_pieces(model: nn.Module) -> None:
    """Refuse pieces where a piece's statistics would stand for the batch's.

    Raises:
        ClipError: a BatchNorm in train.
    """
    norms = (nn.modules.batchnorm._BatchNorm,)
    moving = next((path for path, m in model.named_modules() if isinstance(m, norms) and m.training), None)
    if moving is not None:
        raise ClipError(f"{moving} takes the statistics of its batch: pieces would change the loss; freeze it (eval)")


def _random_state() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
