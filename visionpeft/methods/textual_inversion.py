r"""Textual Inversion (Gal et al. 2022, arXiv 2208.01618): new words learn, and nothing else.

    table' = table with rows first .. first + vectors set to v,   v (vectors, D)

`first` is the id that the tokenizer gives to the new word (`new_token` makes it); rows beyond the table are there while
the adapter acts, so that no table has to be resized and all other rows stay as they are. v starts at the rows of a
class word. Acts wholly or not at all. Attach LoRA, KronA or DiffFit beside it under another name to learn both (pivotal
tuning). Merged, the table has the new rows; set `config.vocab_size` to its length before you save the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visionpeft import binding
from visionpeft.adapter import Adapter, Method, factory
from visionpeft.errors import FormatError, MethodError, SiteError, VisionPEFTError
from visionpeft.sites import Backbone, Site
from visionpeft.targets import choose_among
from visionpeft.tuner import Tuner


@dataclass(frozen=True)
class TextualInversion(Method):
    """
    Attributes:
        vectors: number of vectors of the word.
        first: id of the first one; None means the first id behind the table.
        initial: ids of the rows that the vectors start at, the last one repeated; none means a draw of the table's
            deviation.
    """

    key: ClassVar[str] = "textual_inversion"
    kinds: ClassVar[frozenset[str]] = frozenset({"embed"})

    vectors: int = 1
    first: int | None = None
    initial: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "initial", tuple(self.initial))  # a list from a file
        if self.vectors < 1 or (self.first is not None and self.first < 0):
            raise MethodError(f"vectors={self.vectors}, first={self.first}: expected at least 1 and 0")

    def choose(self, backbone: Backbone) -> list[Site]:
        """The token embeddings of the text encoders, of all there are in a pipeline."""
        sites = backbone.sites(self.tower)
        return choose_among(sites, self.targets or "*token_embedding", self.within, self.exclude)

    def refuses(self, site: Site, module: nn.Module) -> str | None:
        if (reason := super().refuses(site, module)) is not None:
            return reason
        wrong = [i for i in self.initial if not 0 <= i < site.shape[0]]
        return f"initial={wrong[0]} is no id of its {site.shape[0]} words" if wrong else None

    def build(self, site: Site, module: nn.Module) -> Adapter:
        table = binding.original(module, "weight")
        if table is None:
            raise SiteError(f"TextualInversion at {site}: the module has no table")
        first = site.shape[0] if self.first is None else self.first
        return NewRows(table.detach(), first, self.vectors, self.initial, **factory(module))


class NewRows(Adapter):
    """v (vectors, D), rows `first` and on of the table."""

    whole = True

    def __init__(self, table: Tensor, first: int, vectors: int, initial: tuple[int, ...], **kw: Any) -> None:
        super().__init__()
        self.first = first
        if initial:
            ids = [initial[min(i, len(initial) - 1)] for i in range(vectors)]
            start = table[ids].to(**kw).clone()
        else:
            start = torch.randn(vectors, table.shape[1], **kw) * table.to(**kw).std()
        self.v = nn.Parameter(start)

    @property
    def on_weight(self) -> bool:
        return True

    def weight(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        end = self.first + len(self.v)
        gap = w.new_zeros(max(0, self.first - len(w)), w.shape[1])  # words of adapters that rest
        return torch.cat([w[: self.first], gap, self.v.to(w.dtype), w[end:]]), b


def new_token(tokenizer: Any, token: str, vectors: int = 1) -> int:
    """Teach a transformers tokenizer a word of several vectors (`<cat>`, `<cat>_1`, ... as diffusers names them).

    Returns:
        The id of the first.

    Raises:
        VisionPEFTError: the tokenizer has the word already.
    """
    words = [token, *(f"{token}_{i}" for i in range(1, vectors))]
    known = tokenizer.get_vocab()
    if taken := [w for w in words if w in known or f"{w}</w>" in known]:
        raise VisionPEFTError(f"{taken[0]!r} is a word of this tokenizer already: take one that is not, as <my-cat>")
    tokenizer.add_tokens(words)
    first: int = tokenizer.convert_tokens_to_ids(token)
    return first


def save_embedding(tuner: Tuner, path: str | Path, token: str) -> None:
    """Write {token: vectors} as `pipe.load_textual_inversion` reads it; for one text encoder.

    Raises:
        FormatError: the adapter is none of new words, or is on several text encoders.
    """
    from visionpeft.formats import common

    rows = [a for a in tuner.adapters.values() if isinstance(a, NewRows)]
    if len(rows) != 1 or len(tuner.adapters) != 1:
        raise FormatError(f"{tuner.name!r}: expected new words at one text encoder, found {len(rows)} of them")
    vectors = rows[0].v.detach().to("cpu", torch.float32)
    common.write(path, {token: vectors if len(vectors) > 1 else vectors[0]}, {})
