r"""What a denoiser learns to predict, and how much each example counts.

With latents x, noise e and a_t = alphas_cumprod[t]:

    epsilon        x_t = sqrt(a) x + sqrt(1 - a) e      target e
    v_prediction   the same                             target sqrt(a) e - sqrt(1 - a) x
    flow           x_s = (1 - s) x + s e                target e - x,       s = t / 1000

min-SNR-gamma (Hang et al. 2023, arXiv 2303.09556), snr = a / (1 - a):  epsilon min(snr, g) / snr, v min(snr, g) /
(snr + 1). Under prior preservation (DreamBooth, arXiv 2208.12242) the loss is mean(subject) + weight mean(class), and
each example keeps its own weight, before the two means are taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

from visionpeft.diffusion.errors import DiffusionError

KINDS = ("epsilon", "v_prediction", "flow")


def draw_noise(x: Tensor, offset: float, generator: torch.Generator) -> Tensor:
    """e of x's shape (N, C, h, w), on the CPU; with `offset` a constant per channel comes on top (noise offset)."""
    noise = torch.randn(x.shape, generator=generator)
    return noise + offset * torch.randn(*x.shape[:2], 1, 1, generator=generator) if offset else noise


def draw_times(n: int, kind: str, steps: int, generator: torch.Generator) -> Tensor:
    """Times (n,): whole steps, evenly likely; for flow 1000 s with s logit-normal, as SD3 does (arXiv 2403.03206)."""
    if kind == "flow":
        return 1000 * torch.randn(n, generator=generator).sigmoid()
    return torch.randint(steps, (n,), generator=generator)


def noised(kind: str, x: Tensor, noise: Tensor, t: Tensor, alphas: Tensor | None) -> tuple[Tensor, Tensor]:
    """x_t and the target, both of x's shape; t (N,), alphas (T,) or None for flow."""
    if kind == "flow":
        s = (t / 1000)[:, None, None, None]
        return (1 - s) * x + s * noise, noise - x
    a = _given(alphas).to(x.device)[t][:, None, None, None]
    noisy = a.sqrt() * x + (1 - a).sqrt() * noise
    if kind == "epsilon":
        return noisy, noise
    if kind == "v_prediction":
        return noisy, a.sqrt() * noise - (1 - a).sqrt() * x
    raise DiffusionError(f"prediction {kind!r}: expected one of {', '.join(KINDS)}")


def snr_weights(kind: str, t: Tensor, alphas: Tensor | None, gamma: float | None) -> Tensor:
    """min-SNR weights (N,); ones for None.

    Raises:
        DiffusionError: gamma for flow matching, for which it is not defined.
    """
    if gamma is None:
        return torch.ones(len(t), device=t.device)
    if kind == "flow":
        raise DiffusionError("min-SNR is defined for epsilon and v-prediction, not for flow matching: leave it out")
    a = _given(alphas).to(t.device)[t]
    snr = a / (1 - a)
    return snr.clamp(max=gamma) / (snr if kind == "epsilon" else snr + 1)


def examples_loss(predicted: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared error of each example (N,), in float32; with a mask (N, 1, h, w) the mean over what it covers."""
    error = (predicted.float() - target.float()).square()
    if mask is None:
        return error.mean((1, 2, 3))
    return (error * mask).sum((1, 2, 3)) / (mask.sum((1, 2, 3)) * error.shape[1]).clamp_min(1e-6)


def total(losses: Tensor, weights: Tensor, prior: Tensor, prior_weight: float) -> Tensor:
    """Mean of the weighted losses (N,) of the subject plus `prior_weight` times that of class images.

    Args:
        prior: bool (N,), true where an example is a class image.
    """
    weighted = weights * losses
    found = weighted[~prior].mean() if bool((~prior).any()) else weighted.new_zeros(())
    return found + prior_weight * weighted[prior].mean() if bool(prior.any()) else found


def _given(alphas: Tensor | None) -> Tensor:
    if alphas is None:
        raise DiffusionError("this scheduler has no alphas: only flow matching can be trained with it")
    return alphas
