r"""CoOp, learnt contexts of the class names (Zhou et al. 2021, arXiv 2109.01134; official code KaiyangZhou/CoOp).

    [start] v_1 ... v_M [name] . [end]        position "end", the paper's default
    [start] v_1 ... v_M/2 [name] v_M/2+1 ... v_M . [end]   "middle"
    [start] [name] v_1 ... v_M . [end]        "front"

v (M, width) is shared by the classes, or (C, M, width) with `per_class`; the model stays frozen. Merges into nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionpeft.clip.errors import ClipError
from visionpeft.clip.model import Clip
from visionpeft.clip.text import encode_tokens, text_root, tokenize

POSITIONS = ("end", "middle", "front")


class CoOp(nn.Module):
    """Learnt contexts; `CoOp(clip, classes)()` gives the classifier W (d, C), columns of unit length.

    Args:
        tokens: M, the number of context vectors.
        init: words to begin from, such as "a photo of a"; M is then their number of tokens. None draws N(0, 0.02).
        per_class: a context of its own for every class.
        position: where the name stands: "end", "middle" or "front".

    Raises:
        ClipError: unknown position, names beyond the context, or a text tower that takes only ids.
    """

    def __init__(self, clip: Clip, classes: Sequence[str], tokens: int = 16, init: str | None = None,
                 per_class: bool = False, position: str = "end") -> None:  # fmt: skip
        super().__init__()
        if position not in POSITIONS:
            raise ClipError(f"position={position!r}: one of {', '.join(POSITIONS)}")
        self.per_class, self.position = per_class, position
        self.__dict__["clip"] = clip  # not a child: its parameters are not ours
        embed = text_root(clip.model).token_embedding
        start = None if init is None else self._words(init)
        tokens = tokens if start is None else len(start)
        shape = (len(classes), tokens, embed.embedding_dim) if per_class else (tokens, embed.embedding_dim)
        self.context = nn.Parameter(torch.empty(shape, dtype=embed.weight.dtype, device=embed.weight.device))
        with torch.no_grad():
            nn.init.normal_(self.context, std=0.02) if start is None else self.context.copy_(start.expand(shape))
        self.name(classes)

    def name(self, classes: Sequence[str]) -> CoOp:
        """Take these classes from now on, with the same context.

        Raises:
            ClipError: other classes for contexts of single classes, or names beyond the text tower's context.
        """
        if self.per_class and len(classes) != len(self.context):
            raise ClipError("contexts of single classes say nothing of others: leave per_class out")
        clip: Clip = self.__dict__["clip"]
        names = [c.replace("_", " ") for c in classes]
        filler = " ".join(["x"] * self.context.shape[-2])  # one token each, whose place the context takes
        self.ids = tokenize(clip.tokenizer, [f"{filler} {n}." for n in names], clip.model.context_length)
        self.lengths = [len(self._ids(n)) for n in names]
        with torch.no_grad():
            self.fixed = text_root(clip.model).token_embedding(self.ids.to(self.context.device))
        return self

    def forward(self, through: Callable[..., Tensor] | None = None) -> Tensor:
        """W (d, C); `through` as in `encode_tokens`."""
        clip: Clip = self.__dict__["clip"]
        context = self.context if self.per_class else self.context.expand(len(self.ids), *self.context.shape)
        rows = [self._row(*row) for row in zip(self.fixed, context, self.lengths, strict=True)]
        features = encode_tokens(clip.model, self.ids.to(self.context.device), torch.stack(rows), through)
        return F.normalize(features, dim=-1).t()

    def _row(self, fixed: Tensor, context: Tensor, length: int) -> Tensor:
        """The embeddings (L, width) of one class's prompt."""
        m = len(context)
        split = {"end": m, "middle": m // 2, "front": 0}[self.position]
        name, rest = fixed[1 + m : 1 + m + length], fixed[1 + m + length :]
        return torch.cat([fixed[:1], context[:split], name, context[split:], rest])

    def _ids(self, text: str) -> list[int]:
        """Tokens of a text alone, without start, end and padding."""
        clip: Clip = self.__dict__["clip"]
        ids = tokenize(clip.tokenizer, [text, ""], clip.model.context_length)
        end = int((ids[0] != ids[1]).nonzero()[-1]) if not torch.equal(ids[0], ids[1]) else 1
        return ids[0, 1:end].tolist()

    def _words(self, text: str) -> Tensor:
        clip: Clip = self.__dict__["clip"]
        embed = text_root(clip.model).token_embedding
        return embed(torch.tensor(self._ids(text), device=embed.weight.device)).detach()
