"""`visionpeft generate`: images from a base and adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import visionpeft as vp
from visionpeft.diffusion.classes import renew_classes
from visionpeft.diffusion.errors import DiffusionError
from visionpeft.diffusion.families import Family, family_of
from visionpeft.diffusion.loading import digest, load_pipeline
from visionpeft.formats import common
from visionpeft.methods.textual_inversion import TextualInversion, new_token
from visionpeft.pipelines.personalisation_settings import WORD_FILE
from visionpeft.state import read_header

Watch = Callable[[str], None]


def draw(base: str, adapters: dict[str, float], prompts: Sequence[str], *, base_config: str | None = None,
         count: int = 1, seed: int = 0, steps: int = 25, guidance: float = 7.5,
         side: int | None = None, watch: Watch | None = None) -> list[tuple[str, Any]]:  # fmt: skip
    """Images (prompt, PIL image) from a base and adapter files with their strengths.

    Args:
        side: pixels of a side; by default what the first adapter was trained at, else what the pipeline was made for.
        watch: told where an adapter was trained on a base of the same shapes with other weights.

    {} in a prompt becomes the token and the class of the first adapter.

    Raises:
        VisionPEFTError: a base, adapter or prompt that does not fit; an adapter of another base, with differences.
    """
    family = family_of(load_pipeline(base, base_config))
    about = _about(next(iter(adapters))) if adapters else {}
    if about.get("new_classes"):
        renew_classes(family.denoiser, about["new_classes"], about["seed"])
    _note_base(family, adapters, watch)
    tuners = {f"adapter{i}": vp.load(family.pipe, path, name=f"adapter{i}") for i, path in enumerate(adapters)}
    words = [word.name for path in adapters if (word := learnt_word(family.pipe, path)) is not None]
    if tuners:
        vp.activate(family.pipe, dict(zip(tuners, adapters.values(), strict=True)) | dict.fromkeys(words, 1.0))
    first = next(iter(adapters), None)
    name = "" if first is None else subject_of(first)
    texts = [prompt.replace("{}", name) for prompt in prompts]
    family.check(texts)
    side = side or about.get("resolution")
    return [(text, *family.draw([text], [seed + i], steps, guidance, side)) for text in texts for i in range(count)]


def learnt_word(pipe: Any, path: str) -> vp.Tuner | None:
    """Teach the pipeline the word that was learnt together with an adapter file; None if there was none.

    Raises:
        DiffusionError: the word's file is not beside the adapter.
        VisionPEFTError: the pipeline has that word already.
    """
    about = _about(path)
    if not (count := about.get("word_vectors")):
        return None
    file = Path(path).expanduser().with_name(WORD_FILE)
    if not file.is_file():
        raise DiffusionError(f"{file} is not there: it has the word {about['token']!r} of {path}")
    ((token, vectors),) = common.read(file)[0].items()
    method = TextualInversion(vectors=count, first=new_token(pipe.tokenizer, token, count))
    tuner = vp.attach(pipe, method, name=f"word{method.first}", probe=False)
    tuner.load_state_dict({name: vectors.view(count, -1) for name in tuner.state_dict()})
    return tuner


def _note_base(family: Family, adapters: Iterable[str], watch: Watch | None) -> None:
    here = digest(family.denoiser)
    for path in adapters:
        about = _about(path)
        if watch is not None and about.get("denoiser", here) != here:
            watch(f"NOTE: {path} was trained on {about.get('base')!r}, whose weights are others than these")


def subject_of(path: str) -> str:
    """Token and class that an adapter file was trained with; empty if it does not say."""
    about = _about(path)
    words = [str(about[key]) for key in ("token", "class_name") if about.get(key)]
    return " ".join(dict.fromkeys(words))  # a DiT's class is both


def _about(path: str) -> dict[str, Any]:
    return read_header(path).get("metadata", {})
