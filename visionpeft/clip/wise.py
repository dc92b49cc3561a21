r"""WiSE-FT, the straight line between two sets of weights (Wortsman et al. 2021, arXiv 2109.01903).

    theta = (1 - alpha) theta_zero-shot + alpha theta_tuned

For adapters that change weights linearly (LoRA and its kin, LN-tuning, BitFit, full fine-tuning) `tuner.scale = alpha`
is the same without a copy of the model. Learnt prompts and bottlenecks have a scale too, but not this meaning.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from visionpeft.clip.errors import ClipError


def interpolate(zero_shot: Mapping[str, Tensor], tuned: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """The state dict between two of the same keys; integers (BatchNorm's counters) are the tuned model's.

    Raises:
        ClipError: other keys or shapes, with the first.
    """
    unlike = [k for k in {**zero_shot, **tuned} if k not in zero_shot or k not in tuned
              or zero_shot[k].shape != tuned[k].shape]  # fmt: skip
    if unlike:
        raise ClipError(f"{len(unlike)} tensors differ in name or shape, such as {unlike[0]}: merge adapters first")
    return {
        key: torch.lerp(start, tuned[key].to(start.dtype), alpha) if start.is_floating_point() else tuned[key].clone()
        for key, start in zero_shot.items()
    }
