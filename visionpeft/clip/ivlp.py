r"""Prompts in both towers: IVLP, and PromptSRC, which holds them near the frozen model (Khattak et al. 2023,
arXiv 2307.06948; official code muzairkhattak/PromptSRC).

    text     [start] P_0 [name] . [end] into block 0; in blocks 1 ... depth - 1 the places of P_0 are given P_i
    image    [class, patches, LN_pre(Q_0)] into block 0; in blocks 1 ... depth - 1 the last places are given Q_i

P (depth, M, width) and Q (depth, M, width) learn, the model stays frozen; P_0 begins as "a photo of a", the others are
drawn from N(0, 0.02). With 4 + 4 prompts and depth 9 there are 46,080 scalars on ViT-B/16. The losses of PromptSRC are
in `visionpeft.clip.losses`; its last weights are an average over the epochs' ends with weights of a Gaussian.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionpeft.clip.errors import ClipError
from visionpeft.clip.model import Clip
from visionpeft.clip.prompts import CoOp
from visionpeft.clip.text import text_root


class IVLP(nn.Module):
    """`ivlp()` gives the classifier W (d, C), `ivlp.image(pixels)` features (N, d), both of unit length.

    Args:
        tokens: M, the number of prompts of the image tower; those of the text tower are the tokens of `init`.
        depth: blocks with prompts of their own; all blocks of a tower that has fewer.
        init: words to begin from; None draws M prompts.

    Raises:
        ClipError: towers other than open_clip's own transformers, or names beyond the context.
    """

    def __init__(self, clip: Clip, classes: Sequence[str], tokens: int = 4, depth: int = 9,
                 init: str | None = "a photo of a") -> None:  # fmt: skip
        super().__init__()
        for name, tower in _transformers(clip.model).items():
            if not getattr(tower, "batch_first", False) or not hasattr(tower, "resblocks"):
                raise ClipError(f"prompts in the {name} tower need open_clip's transformer, not {type(tower).__name__}")
        if tokens < 1 or depth < 1:
            raise ClipError(f"tokens={tokens}, depth={depth}: expected at least 1 of each")
        self.__dict__["clip"] = clip  # not a child: its parameters are not ours
        self.first = CoOp(clip, classes, tokens, init)
        m, width = self.first.context.shape
        visual, text = (len(_transformers(clip.model)[t].resblocks) for t in ("image", "text"))
        kw: dict[str, Any] = {"dtype": self.first.context.dtype, "device": self.first.context.device}
        self.text = nn.Parameter(torch.empty(min(depth, text) - 1, m, width, **kw))
        self.visual = nn.Parameter(torch.empty(min(depth, visual), tokens, clip.model.visual.conv1.out_channels, **kw))
        for prompts in (self.text, self.visual):
            nn.init.normal_(prompts, std=0.02)

    def name(self, classes: Sequence[str]) -> IVLP:
        """Take these classes from now on, with the same prompts."""
        self.first.name(classes)
        return self

    def forward(self) -> Tensor:
        """W (d, C)."""
        return self.first(self._through_text)

    def _through_text(self, x: Tensor, attn_mask: Tensor) -> Tensor:
        m = self.text.shape[1]

        def put(i: int, x: Tensor) -> Tensor:
            if not 1 <= i <= len(self.text):
                return x
            return torch.cat([x[:, :1], _rows(self.text[i - 1], x), x[:, 1 + m :]], 1)

        return _through(_transformers(self.__dict__["clip"].model)["text"], x, put, attn_mask)

    def image(self, pixels: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> unit-length features (N, d)."""
        tower = self.__dict__["clip"].model.visual
        depth, m = self.visual.shape[:2]

        def put(i: int, x: Tensor) -> Tensor:
            if i >= depth:
                return x
            prompts = _rows(self.visual[i], x)
            return torch.cat([x[:, :-m], prompts] if i else [x, tower.ln_pre(prompts)], 1)

        x = _through(tower.transformer, tower._embeds(pixels), put)
        pooled = tower._pool(x[:, :-m])[0]
        return F.normalize(pooled if tower.proj is None else pooled @ tower.proj, dim=-1)


def _transformers(model: Any) -> dict[str, Any]:
    return {"image": getattr(model.visual, "transformer", None),
            "text": getattr(text_root(model), "transformer", None)}  # fmt: skip


def _rows(prompts: Tensor, x: Tensor) -> Tensor:
    """Prompts (M, D) for every sample of x (N, L, D)."""
    return prompts.to(x.dtype).expand(len(x), -1, -1)


def _through(transformer: Any, x: Tensor, put: Callable[[int, Tensor], Tensor], mask: Tensor | None = None) -> Tensor:
    """x (N, L, D) through all blocks; put(i, x) is what block i is given."""
    for i, block in enumerate(transformer.resblocks):
        x = block(put(i, x), attn_mask=mask)
    return x


def gaussian_weights(epochs: int, mean: float, deviation: float) -> list[float]:
    """w_e, proportional to exp(-(e - mean)^2 / (2 deviation^2)) for e = 1 ... epochs, summing to 1.

    The paper has 20 epochs, mean 15, deviation 1 for base-to-new; 50, 30, 30 or 50, 45, 5 for few shots, by data set.
    """
    logs = [-0.5 * ((e - mean) / deviation) ** 2 for e in range(1, epochs + 1)]
    found = [math.exp(log - max(logs)) for log in logs]
    return [weight / sum(found) for weight in found]
