"""Tokens that are rare and whole, and prompts that fit."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import tiny_pipelines

from visionpeft.diffusion import words
from visionpeft.diffusion.errors import DiffusionError


@pytest.fixture(scope="module")
def clip() -> Any:
    """CLIP's vocabulary of 49,408, which open_clip ships."""
    open_clip = pytest.importorskip("open_clip")
    from transformers import CLIPTokenizer

    packed = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(packed.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    merges = [(a, b) for a, b in (line.split() for line in lines)]
    letters = words_of_bytes()
    table = [*letters, *(f"{c}</w>" for c in letters), *(a + b for a, b in merges)]
    table += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(table)}, merges=merges, model_max_length=77)


def words_of_bytes() -> list[str]:
    from visionpeft.models.nano_diffusion import _letters

    return _letters()


def test_rare_token_of_clip(clip: Any) -> None:
    assert clip("a photo of sks dog").input_ids == [49406, 320, 1125, 539, 48136, 1929, 49407]
    token = words.rare_token(clip)
    (i,) = clip(token, add_special_tokens=False).input_ids
    assert i > 48000 and token != "sks" and not set(token) & set("aeiouy")
    words.check_token(clip, token)
    words.check_token(clip, "sks")  # rare enough to be allowed where it is asked for


def test_bad_tokens(clip: Any) -> None:
    with pytest.raises(DiffusionError, match="'dog' is a word already"):
        words.check_token(clip, "dog")
    pieces = " ".join(clip.tokenize("qqjjzz"))
    with pytest.raises(DiffusionError, match=rf"'qqjjzz' is \d pieces for this tokenizer \({pieces}\)"):
        words.check_token(clip, "qqjjzz")


def test_lengths(clip: Any) -> None:
    words.check_lengths(clip, ["dog " * 75])
    with pytest.raises(DiffusionError, match="78 tokens and the text encoder reads 77: 'cat'"):
        words.check_lengths(clip, ["a", "dog " * 75 + "cat"])


def test_tiny() -> None:
    tokenizer = tiny_pipelines.tokenizer()
    assert words.rare_token(tokenizer) == tiny_pipelines.TOKEN
    with pytest.raises(DiffusionError, match="zqx"):
        words.check_token(tokenizer, "b")
