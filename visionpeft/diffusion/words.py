"""The word for a subject, and prompts that fit the text encoder.

A subject needs a word that the tokenizer has in one piece and that means nothing yet. Merges are learnt from frequent
to rare, so that the last words of a vocabulary are the rarest; of these, words without a vowel are no words of a
language.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from visionpeft.diffusion.errors import DiffusionError

END = "</w>"
SHARE = 0.9  # ids behind this share of the vocabulary are rare
AVOIDED = ("sks",)  # the usual choice means a rifle to CLIP


def rare_token(tokenizer: Any) -> str:
    """The rarest word of three or four consonants that is one piece, but not `sks`.

    Raises:
        DiffusionError: the vocabulary has none.
    """
    if (found := _rarest(tokenizer)) is None:
        raise DiffusionError("this tokenizer has no rare word in one piece: give token=")
    return found


def _rarest(tokenizer: Any) -> str | None:
    words = {}
    for piece, i in tokenizer.get_vocab().items():
        word = piece.removesuffix(END)
        if piece.endswith(END) and 3 <= len(word) <= 4 and word.isascii() and word.isalpha() and word.islower():
            if not set(word) & set("aeiouy") and word not in AVOIDED:
                words[i] = word
    for i in sorted(words, reverse=True):
        if pieces(tokenizer, words[i]) == 1:
            return words[i]
    return None


def pieces(tokenizer: Any, word: str) -> int:
    """Into how many tokens the tokenizer cuts a word."""
    return len(tokenizer(word, add_special_tokens=False).input_ids)


def check_token(tokenizer: Any, token: str) -> None:
    """Refuse a token that is several pieces, or a word that the model knows.

    Raises:
        DiffusionError: with the pieces, and with a word to take instead.
    """
    ids = tokenizer(token, add_special_tokens=False).input_ids
    better = f"take a rare word in one piece, such as {_rarest(tokenizer) or 'a new one'!r}"
    if len(ids) != 1:
        cut = " ".join(tokenizer.convert_ids_to_tokens(ids))
        raise DiffusionError(f"the token {token!r} is {len(ids)} pieces for this tokenizer ({cut}): {better}")
    if ids[0] < SHARE * len(tokenizer):
        raise DiffusionError(
            f"the token {token!r} is a word already (number {ids[0]} of {len(tokenizer)}, the first are the most "
            f"frequent), whose meaning would mix with the subject's: {better}"
        )


def check_lengths(tokenizer: Any, prompts: Sequence[str]) -> None:
    """Refuse prompts that the text encoder would cut.

    Raises:
        DiffusionError: names the first one and what would be lost.
    """
    limit = tokenizer.model_max_length
    for prompt in dict.fromkeys(prompts):
        ids = tokenizer(prompt, truncation=False, verbose=False).input_ids
        if len(ids) > limit:
            lost = tokenizer.decode(ids[limit - 1 : -1])
            shown = prompt if len(prompt) < 60 else f"{prompt[:57]}..."
            raise DiffusionError(
                f"the prompt {shown!r} has {len(ids)} tokens and the text encoder reads {limit}: "
                f"{lost!r} would be cut off; shorten it"
            )
