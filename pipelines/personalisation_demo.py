"""`visionpeft personalise` without arguments: a drawn toy, the bundled nano pipeline, three methods, what they cost.

Three figures, in per cent of drawn images, before and after:

    recognised   "a photo of a <subject> toy" is taken for the subject and none of the four other bundled toys
    obeyed       "a photo of a <subject> toy in the snow" (and seven other places) is taken to be there
    others       "a photo of a cat" (and the nine other classes of CIFAR-10) is taken for that class

Each method learns together with the new word <subject> (pivotal tuning); before, it is "a photo of a toy".
The judges know nothing of the pipeline: nano_vit's own CIFAR-10 head, and logistic regressions on its features, fitted
to drawings made here (none of them the subject's training images). Their accuracy on further drawings is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import visionpeft as vp
from visionpeft.data import scenes
from visionpeft.diffusion.families import Family, family_of
from visionpeft.diffusion.loading import load_pipeline
from visionpeft.diffusion.words import rare_token
from visionpeft.errors import require
from visionpeft.models.nano import CLASSES
from visionpeft.pipelines.generation import learnt_word, subject_of
from visionpeft.pipelines.personalisation import BUNDLED, Progress, Watch, bundled, forgotten_words, run
from visionpeft.pipelines.personalisation_settings import Config, Result
from visionpeft.report import page
from visionpeft.report.personalisation import sheet
from visionpeft.training import runs

# Chosen on the subject bee, shown on robo.
METHODS = {"krona:a1=8,a2=8": 1e-3, "lora:rank=4": 1e-3, "difffit": 2e-3}
DEMO = Config(images="bundled:robo", class_name=scenes.CLASS, word_vectors=4, rates=("*token_embedding*=1e-2",),
              prior=48, batch_size=4, steps=600, ema=0.99, min_snr=5.0, inference_steps=15, guidance=3.0,
              schedule="cosine")  # fmt: skip
SUBJECT_IMAGES, PLACE_IMAGES, CLASS_IMAGES, SIDE_BY_SIDE = 40, 5, 20, 40
HEAD = ["", "parameters", "recognised %", "obeyed %", "others %", "seconds"]
Classes = Callable[[Sequence[Any]], np.ndarray]


@dataclass
class Judges:
    """Who tells what a picture shows; `accuracy` on further drawings, of toys and of places."""

    features: Callable[[Sequence[Any]], Any]
    toys: Any
    places: Any
    classes: Classes
    accuracy: tuple[float, float]


def judges(seed: int = 17) -> Judges:
    """Fit both regressions to new drawings, 40 of each toy and of each place."""
    from visionpeft.diffusion.scores import image_encoder

    regression = require("sklearn.linear_model", extra="train").LogisticRegression
    features = image_encoder("nano_vit").images
    rng = np.random.default_rng(seed)
    everywhere = scenes.BACKGROUNDS + scenes.PLAIN

    def drawings(count: int) -> tuple[list[Any], list[Any]]:
        toys = [scenes.picture(toy, str(rng.choice(everywhere)), rng)
                for toy in scenes.SUBJECTS.values() for _ in range(count)]  # fmt: skip
        places = [scenes.picture(scenes.random_toy(rng), where, rng)
                  for where in scenes.BACKGROUNDS for _ in range(count)]  # fmt: skip
        return toys, places

    def numbers(kinds: Any, count: int) -> np.ndarray:
        return np.repeat(np.arange(len(kinds)), count)

    (toys, places), (more_toys, more_places) = drawings(40), drawings(10)
    of_toys = regression(C=10, max_iter=1000).fit(features(toys), numbers(scenes.SUBJECTS, 40))
    of_places = regression(C=10, max_iter=1000).fit(features(places), numbers(scenes.BACKGROUNDS, 40))
    classes = class_head()
    accuracy = (of_toys.score(features(more_toys), numbers(scenes.SUBJECTS, 10)),
                of_places.score(features(more_places), numbers(scenes.BACKGROUNDS, 10)))  # fmt: skip
    return Judges(features, of_toys, of_places, classes, accuracy)


def class_head() -> Classes:
    """nano_vit's own head: the numbers of the CIFAR-10 classes that pictures are taken for."""
    import torch

    from visionpeft.data.preprocessing import preprocessing
    from visionpeft.models import nano

    head = nano.create().eval()
    transform = preprocessing(head).transform()

    @torch.no_grad()
    def classes(images: Sequence[Any]) -> np.ndarray:
        return head(torch.stack([transform(image) for image in images])).argmax(1).numpy()

    return classes


def draw(family: Family, config: Config, prompts: Sequence[str], seed: int) -> list[Any]:
    """An image of each prompt, the i-th with seed + i, `SIDE_BY_SIDE` at a time."""
    found = []
    for start in range(0, len(prompts), SIDE_BY_SIDE):
        part = prompts[start : start + SIDE_BY_SIDE]
        seeds = range(seed + start, seed + start + len(part))
        found += family.draw(part, seeds, config.inference_steps, config.guidance)
    return found


def draw_subject(family: Family, config: Config, name: str) -> list[Any]:
    """What is judged for `recognised`; `name` is what the subject is called."""
    return draw(family, config, [f"a photo of a {name}"] * SUBJECT_IMAGES, 10_000)


def others(family: Family, config: Config, classes: Classes) -> float:
    """Share of images of the CIFAR-10 classes that are taken for what they were to be."""
    prompts = [f"a photo of {scenes.article(c)}" for c in CLASSES for _ in range(CLASS_IMAGES)]
    hits = classes(draw(family, config, prompts, 30_000)) == np.repeat(np.arange(len(CLASSES)), CLASS_IMAGES)
    return float(hits.mean())


def measure(family: Family, judges: Judges, name: str, config: Config) -> tuple[list[float], list[Any]]:
    """The three figures as fractions, and a few of the images; `name` is what the subject is called."""
    subject = config.images.removeprefix(BUNDLED)
    own = draw_subject(family, config, name)
    prompts = [f"a photo of a {name} {where}" for where in scenes.BACKGROUNDS for _ in range(PLACE_IMAGES)]
    there = draw(family, config, prompts, 20_000)
    toys = judges.toys.predict(judges.features(own)) == list(scenes.SUBJECTS).index(subject)
    where = np.repeat(np.arange(len(scenes.BACKGROUNDS)), PLACE_IMAGES)
    places = judges.places.predict(judges.features(there)) == where
    figures = [float(toys.mean()), float(places.mean()), others(family, config, judges.classes)]
    return figures, own[:6] + there[::PLACE_IMAGES]


@contextmanager
def learnt(family: Family, config: Config, watch: Watch | None = None,
           progress: Progress | None = None) -> Iterator[tuple[Result, str]]:  # fmt: skip
    """Personalise; meanwhile the pipeline has what was learnt, afterwards it is as it was.

    Yields:
        the run's result, and what the subject is called.
    """
    result, path = run(config, watch, progress, pipe=family.pipe), str(config.folder / "adapter.safetensors")
    with forgotten_words(family.pipe):
        tuners = [vp.load(family.pipe, path, name="shown"), learnt_word(family.pipe, path)]
        try:
            yield result, subject_of(path)
        finally:
            for tuner in tuners:
                if tuner is not None:
                    tuner.detach()


def learn(family: Family, judges: Judges, config: Config, watch: Watch | None = None,
          progress: Progress | None = None) -> tuple[Result, list[float], list[Any]]:  # fmt: skip
    """Personalise a bundled subject, then `measure` with what was learnt; the pipeline is left as it was."""
    with learnt(family, config, watch, progress) as (result, name):
        return result, *measure(family, judges, name, config)


def demo(watch: Callable[[str], None], status: Callable[[str], None], config: Config = DEMO,
         methods: dict[str, float] | None = None) -> tuple[list[str], list[list[str]], Path]:  # fmt: skip
    """Personalise by each method, measure, write sheet.png, result.json and report.html.

    Returns:
        head and rows of the table, and the folder.
    """
    family = family_of(load_pipeline(config.base))
    status("fitting the judges")
    jury = judges()
    watch(f"judges: right on {100 * jury.accuracy[0]:.0f} % of further drawings of the five toys, on "
          f"{100 * jury.accuracy[1]:.0f} % of places")  # fmt: skip
    status("drawing before")
    name = scenes.CLASS if config.word_vectors else f"{rare_token(family.pipe.tokenizer)} {scenes.CLASS}"
    before, images = measure(family, jury, name, config)
    pictures = {"real": [p.open() for p in bundled(config.images.removeprefix(BUNDLED))], "before": images}
    rows, found = [_row("before", None, before)], {"before": before}
    for text, lr in (METHODS if methods is None else methods).items():
        name = text.partition(":")[0]
        one = replace(config, method=text, lr=lr, out=str(config.folder / name))

        def tell(done: int, total: int, loss: float, name: str = name) -> None:
            status(f"{name}: {done} of {total} updates")

        result, found[name], pictures[name] = learn(family, jury, one, watch, tell)
        rows.append(_row(name, result, found[name]))
    _write(config.folder, rows, found, pictures, jury, config)
    return HEAD, rows, config.folder


def _row(name: str, result: Result | None, figures: Sequence[float]) -> list[str]:
    parameters, seconds = ("", "") if result is None else (f"{result.parameters:,}", f"{result.seconds:.0f}")
    return [name, parameters, *(f"{100 * figure:.1f}" for figure in figures), seconds]


def _write(folder: Path, rows: list[list[str]], found: dict[str, list[float]], pictures: dict[str, list[Any]],
           jury: Judges, config: Config) -> None:  # fmt: skip
    from visionpeft.report import plots

    shown = sheet(pictures, 64)
    with runs.replacing(folder / "sheet.png") as temporary:
        shown.save(temporary, format="PNG")
    runs.write_json(folder / "result.json", {"figures": found, "judges": jury.accuracy, "config": asdict(config)})
    notes = ["First six columns: the token alone; then one place each: " + ", ".join(scenes.BACKGROUNDS)]
    body = [page.table(HEAD, rows), page.figure(plots.picture(shown, shown.width)), page.paragraphs(notes)]
    runs.write_text(folder / "report.html", page.page("A toy learnt by three methods", body))
