"""From a few images of a subject to an adapter with which a diffusion pipeline draws it.

    result = run(Config(base="~/stable-diffusion", images="~/cat", class_name="cat", method="krona", out="runs/cat"))

The run folder holds config.json, adapter.safetensors, metrics.jsonl, previews, result.json, report.html and
checkpoint.pt: a killed run goes on to the same numbers, a finished one can be extended with more `steps`. A word that
was learnt besides is in learned_embeds.safetensors.
"""

from __future__ import annotations

import copy
import io
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch

import visionpeft as vp
from visionpeft.data.subjects import Picture, make_buckets, nearest_bucket, read_subject
from visionpeft.diffusion.classes import renew_classes
from visionpeft.diffusion.errors import DiffusionError
from visionpeft.diffusion.families import DiT, Family, family_of
from visionpeft.diffusion.loading import digest, load_pipeline, parts
from visionpeft.diffusion.prior import class_images
from visionpeft.diffusion.scores import judges
from visionpeft.diffusion.training import WORD_RATE, Example, Trainer
from visionpeft.diffusion.words import check_token, rare_token
from visionpeft.methods.textual_inversion import TextualInversion, new_token
from visionpeft.pipelines.methods import parse_method
from visionpeft.pipelines.personalisation_output import finish, preview
from visionpeft.pipelines.personalisation_settings import Config, Result
from visionpeft.training import make_accelerator, runs
from visionpeft.training.order import seed_all

__all__ = ["Config", "Result", "bundled", "run"]

Watch = Callable[[str], None]
Progress = Callable[[int, int, float], None]
BUNDLED = "bundled:"
NEW_WORD = "<subject>"


@dataclass
class Subject:
    """Pictures, the words for them, and the prompt of each."""

    pictures: list[Picture]
    token: str
    name: str
    """Token and class, which stand for {} in prompts."""

    def fill(self, prompt: str) -> str:
        return prompt.replace("{}", self.name)


def run(config: Config, watch: Watch | None = None, progress: Progress | None = None, pipe: Any = None) -> Result:
    """Personalise, go on with a killed run, extend a finished one, or return its result.

    Args:
        watch: called with each line of the account of what was found, before the first update, and with news.
        progress: called with (updates done, all updates, loss).
        pipe: the live pipeline of `config.base`, if it is loaded already; it is left without an adapter (a DiT keeps
            its fresh table of classes if it got one).

    Raises:
        VisionPEFTError: bad settings or data, a diverged run, or a folder that holds another run.
    """
    watch = watch or (lambda line: None)
    check(config)
    if (config.folder / "config.json").exists():
        runs.claim(config.folder, config.identity())
    done = config.folder / "result.json"
    if done.exists() and (found := Result(**runs.read_json(done))).steps == config.steps:
        return found
    family = family_of(load_pipeline(config.base, config.base_config) if pipe is None else pipe)
    if config.new_classes:
        renew_classes(family.denoiser, config.new_classes, config.seed)
    subject = read(config, family, watch)
    accelerator = make_accelerator(config.precision, (), config.folder)
    for part in parts(family.pipe).values():
        part.to(accelerator.device)
    prior = _prior(config, family, watch)
    examples, more = _examples(config, family, subject, prior)
    base = digest(family.denoiser)
    with adapters(config, family, subject.token) as tuners:
        return _train(config, family, tuners, subject, (examples, more), base, accelerator, watch, progress)


@contextmanager
def adapters(config: Config, family: Family, token: str) -> Iterator[list[vp.Tuner]]:
    """The method's adapter, behind it that of the new word if one learns; afterwards both are gone, and the word is."""
    seed_all(config.seed)  # the adapters' own draws
    found: list[vp.Tuner] = []
    with forgotten_words(family.pipe):
        try:
            if config.word_vectors:
                found.append(_new_word(config, family, token))
            found.insert(0, vp.attach(family.pipe, method_of(config, family), name="subject"))
            _check_learns(config, family, found[0])
            yield found
        finally:
            for tuner in found:
                tuner.detach()


@contextmanager
def forgotten_words(pipe: Any) -> Iterator[None]:
    """Words that the tokenizer is taught meanwhile are gone afterwards."""
    if (tokenizer := getattr(pipe, "tokenizer", None)) is None:
        yield
        return
    pipe.tokenizer = copy.deepcopy(tokenizer)
    try:
        yield
    finally:
        pipe.tokenizer = tokenizer


def _new_word(config: Config, family: Family, token: str) -> vp.Tuner:
    """Textual Inversion that starts at the last pieces of the class's name, or at a draw without one."""
    tokenizer, n = family.pipe.tokenizer, config.word_vectors
    start = tokenizer(config.class_name or "", add_special_tokens=False).input_ids[-n:]
    method = TextualInversion(vectors=n, first=new_token(tokenizer, token, n), initial=tuple(start))
    return vp.attach(family.pipe, method, name="word", probe=False)  # no input of a probe has the word


def check(config: Config) -> None:
    """Refuse settings that contradict each other before any work.

    Raises:
        DiffusionError: with what to change.
    """
    parse_method(config.method)
    if config.prior and not config.class_name:
        raise DiffusionError("prior preservation draws images of the subject's class: give class_name, such as dog")
    if isinstance(parse_method(config.method), TextualInversion):
        raise DiffusionError("a word is learnt together with a method: give word_vectors=1, and a method such as lora")
    if config.word_vectors < 0:
        raise DiffusionError(f"word_vectors={config.word_vectors}: expected 0 for none, or a number of vectors")
    for name in ("steps", "batch_size", "accumulation", "crops"):
        if getattr(config, name) < 1:
            raise DiffusionError(f"{name}={getattr(config, name)}: expected at least 1")
    if config.ema is not None and not 0 < config.ema < 1:
        raise DiffusionError(f"ema={config.ema}: expected a decay between 0 and 1")


def method_of(config: Config, family: Family) -> Any:
    """The method; where it does not say its places itself, at the denoiser, and at the text encoders if they learn."""
    method = parse_method(config.method)
    if method.within is not None:
        if config.train_text and method.targets is None:
            raise DiffusionError("train_text adapts all but the autoencoder: leave out it or the method's within")
        return method
    if config.train_text:
        return replace(method, within="[tu]*")  # transformer, unet, text encoders
    return method if method.targets is None else replace(method, within=f"{family.denoiser_name}.*")


def _check_learns(config: Config, family: Family, tuner: vp.Tuner) -> None:
    """Refuse adapters that would never learn: latents, and features of frozen text encoders, are made beforehand."""
    learns = {family.denoiser_name, *(family.text_encoders if config.train_text else ())}
    if idle := [site for site in tuner.sites if tuner.backbone.split(site.path)[0] not in learns]:
        raise DiffusionError(
            f"{config.method} is at {idle[0]} too ({len(idle)} such sites), and {', '.join(sorted(learns))} learns: "
            "give train_text for text encoders, or a narrower within"
        )


def read(config: Config, family: Family, watch: Watch) -> Subject:
    """The subject's pictures and words.

    Raises:
        VisionPEFTError: no images, a bad one, a token that is several pieces or a known word, a new word for several
            text encoders or for none.
    """
    if config.word_vectors and len(family.text_encoders) != 1:
        raise DiffusionError(f"word_vectors: a new word can be learnt in pipelines of one text encoder, and "
                             f"{type(family.pipe).__name__} has {len(family.text_encoders)}")  # fmt: skip
    if config.images.startswith(BUNDLED):
        pictures = bundled(config.images.removeprefix(BUNDLED))
    else:
        pictures = read_subject(config.images, config.masks, config.skip_corrupt, config.allow_missing_captions, watch)
    if isinstance(family, DiT):
        if config.class_name is None:
            raise DiffusionError("a DiT learns a class, not a word: give its number as class_name")
        if config.score_images:
            raise DiffusionError("score_images draws the prompts of DreamBench, and a DiT takes classes: leave it out")
        return Subject(pictures, config.class_name, config.class_name)
    tokenizers = [getattr(family.pipe, name, None) for name in family.tokenizers]
    token = config.token or (NEW_WORD if config.word_vectors else rare_token(tokenizers[0]))
    for tokenizer in tokenizers:
        if tokenizer is not None and not config.word_vectors:
            check_token(tokenizer, token)
    return Subject(pictures, token, f"{token} {config.class_name}" if config.class_name else token)


def bundled(name: str, part: str = "train") -> list[Picture]:
    """Pictures of a drawn subject of `visionpeft.data.scenes` with captions that say where it is; `part` is train, or
    test for other poses.

    Raises:
        DiffusionError: there is none of that name.
    """
    with np.load(io.BytesIO((files("visionpeft.assets") / "nano_subjects.npz").read_bytes())) as file:
        found = {key: file[key].tobytes() for key in file.files if key.startswith(f"{part}/{name}/")}
        names = sorted({key.split("/")[1] for key in file.files})
    if not found:
        raise DiffusionError(f"no bundled subject is called {name!r}: choose one of {', '.join(names)}")
    return [Picture(Path(key), data, (32, 32), f"a photo of a {{}} {Path(key).stem.partition(' ')[2]}")
            for key, data in sorted(found.items())]  # fmt: skip


def _prior(config: Config, family: Family, watch: Watch) -> list[Picture]:
    if not config.prior:
        return []
    prompt = config.prompt.replace("{}", str(config.class_name))
    watch(f"{config.prior} class images of {prompt!r}, drawn once")
    return class_images(
        family, prompt, config.prior, Path(config.cache).expanduser(), steps=config.inference_steps,
        guidance=config.guidance, seed=config.seed, side=config.resolution or family.resolution,
    )  # fmt: skip


def _examples(config: Config, family: Family, subject: Subject,
              prior: Sequence[Picture]) -> tuple[list[Example], list[Example]]:  # fmt: skip
    side = config.resolution or family.resolution
    buckets = make_buckets(side, family.multiple)
    if not config.buckets:
        buckets = [(side, side)]
    prompts = [subject.fill(config.prompt if p.caption is None else p.caption) for p in subject.pictures]
    if isinstance(family, DiT):
        prompts = [p.caption or subject.name for p in subject.pictures]
    own = [Example(p, nearest_bucket(p.size, buckets), prompt)
           for p, prompt in zip(subject.pictures, prompts, strict=True)]  # fmt: skip
    return own, [Example(p, (side, side), str(p.caption)) for p in prior]


def account(config: Config, family: Family, tuners: Sequence[vp.Tuner], subject: Subject, examples: Sequence[Example],
            prior: Sequence[Example]) -> list[str]:  # fmt: skip
    """What was found, in lines, as it is printed before the first update."""
    tuner = tuners[0]
    captions = [p.caption for p in subject.pictures if p.caption is not None]
    sizes: dict[tuple[int, int], int] = {}
    for example in examples:
        sizes[example.size] = sizes.get(example.size, 0) + 1
    lines = [
        f"images: {len(examples)}, captions matched: {len(captions)}, class images: {len(prior)}",
        "buckets: " + ", ".join(f"{h}x{w} ({n})" for (h, w), n in sorted(sizes.items())),
        f"prompt: {examples[0].prompt!r}",
        f"steps: {config.steps}, each of {config.batch_size * config.accumulation} images"
        + (" and as many class images" if prior else ""),
        f"{tuner.method.summary()}: {tuner.num_parameters:,} parameters, {len(tuner.sites)} sites, lr {config.rate:g}",
        f"memory expected: {memory(config, family, tuners) / 2**20:,.0f} MiB for weights, gradients, optimiser and "
        "average; activations come on top",
    ]
    if config.word_vectors:
        lines.insert(5, f"new word: {subject.token!r}, {config.word_vectors} vectors, starting at "
                        f"{config.class_name or 'a draw'!r}, lr {WORD_RATE:g} unless rates say otherwise")  # fmt: skip
    silent = 0 if isinstance(family, DiT) else sum(subject.token not in e.prompt for e in examples)
    if silent:
        lines.append(f"NOTE: {silent} captions do not have the token {subject.token!r}: write {{}} where it belongs")
    return lines


def memory(config: Config, family: Family, tuners: Sequence[vp.Tuner]) -> int:
    """Bytes of all weights and of what training adds to what learns: gradient, two moments, an average if there is one.
    """
    weights = sum(t.numel() * t.element_size() for p in parts(family.pipe).values() for t in p.state_dict().values())
    learns = sum(p.numel() for tuner in tuners for p in tuner.parameters())
    return weights + 4 * learns * (3 if config.ema is None else 4)


def _train(config: Config, family: Family, tuners: Sequence[vp.Tuner], subject: Subject, examples: Any, base: str,
           accelerator: Any, watch: Watch, progress: Progress | None) -> Result:  # fmt: skip
    prompt = examples[0][0].prompt
    result = Result(config.base, config.method, subject.token, prompt, folder=str(config.folder), versions=_versions(),
                    parameters=sum(tuner.num_parameters for tuner in tuners))  # fmt: skip
    result.account = account(config, family, tuners, subject, *examples)
    for line in result.account:
        watch(line)
    own, prior = examples
    prompts = [subject.fill(p) for p in config.previews] if not isinstance(family, DiT) else [subject.name]
    family.check([*(e.prompt for e in (*own, *prior)), *prompts])
    jury = judges(config) if config.score_images else None  # now, since a missing file is no news for the end
    trainer = Trainer(config, family, tuners, own, prior, accelerator, config.folder, base)
    runs.claim(config.folder, config.identity())  # only now, so that settings that were refused leave no folder
    family.train()
    if config.gradient_checkpointing:
        family.denoiser.enable_gradient_checkpointing()
    begin = time.perf_counter()

    def after(step: int) -> None:
        if config.preview_every and step % config.preview_every == 0 and step < config.steps:
            preview(config, family, trainer, prompts, step, result.notes)

    try:
        trainer.run(progress, after)
    finally:
        family.denoiser.disable_gradient_checkpointing()
        family.train(False)
    result.seconds = time.perf_counter() - begin
    preview(config, family, trainer, prompts, config.steps, result.notes)
    return finish(config, family, trainer, subject, base, jury, result, watch)


def _versions() -> dict[str, str]:
    import diffusers
    import transformers

    return {"visionpeft": vp.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__,
            "transformers": transformers.__version__, "threads": str(torch.get_num_threads())}  # fmt: skip
