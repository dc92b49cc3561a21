"""Real photos of five subjects, learnt by the bundled text-to-image pipeline at 32 x 32 pixels, method by method.

    python scripts/personalisation_photos.py --photos ../shared/data/subjects --into docs/diffusion.md

As the demo of `visionpeft personalise`, and with its settings, none of which was chosen on photos; DIR/classes.json has
the subjects' nouns ({"cat2": "cat", ...}), DIR/cat2 the photos, which have no captions. Two figures, before and after:

    recognised   "a photo of a <subject> cat" (before: "a photo of a cat") is taken for it among the subjects
    others       "a photo of a truck" (and the nine other classes of CIFAR-10) is taken for that class

The judge of `recognised` is a logistic regression on an encoder's features of these very photos: it has seen what the
methods learn from, as the DINO score of DreamBooth has, so that memorising counts as success. Its accuracy on photos
left out of its fit is told. Finished cells are skipped, so that the same command goes on after a kill. The section
"Real photos" of the page given by --into is written anew; a sheet for each method lies in --out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from personalisation_table import kept, spread
from point_table import put

from visionpeft.data.subjects import Crop, Picture, fit, read_subject
from visionpeft.diffusion.families import Family, family_of
from visionpeft.diffusion.loading import load_pipeline
from visionpeft.diffusion.scores import image_encoder
from visionpeft.errors import DataError, require
from visionpeft.pipelines import personalisation_demo as demo
from visionpeft.report.personalisation import sheet
from visionpeft.training import runs

SUBJECTS = ("cat2", "dog2", "dog5", "duck_toy", "monster_toy")
SIDE, MORE, SHOWN = 32, 4, 8
CORNERS = ((0, 0), (0, MORE), (MORE, 0), (MORE, MORE), (MORE // 2, MORE // 2))
Features = Callable[[Sequence[Any]], Any]


def small(photo: Any, side: int = SIDE, flip: bool = False) -> Any:
    """A PIL image scaled and cropped to a square as training does."""
    return fit(photo, (side, side), Crop(flip=flip))[0]


def copies(photo: Any) -> list[Any]:
    """A PIL image at 32 x 32, five crops of that size from 36 x 36, and the mirror images of all six."""
    larger = small(photo, SIDE + MORE)
    found = [small(photo), *(larger.crop((x, y, x + SIDE, y + SIDE)) for x, y in CORNERS)]
    return [*found, *(small(image, flip=True) for image in found)]


def judge(features: Features, photos: Mapping[str, Sequence[Any]]) -> tuple[Any, float]:
    """A regression on the copies of all photos, and the share of photos that it knows after a fit without them, each
    asked about as it is, without its copies; it answers with a subject's number."""
    regression = require("sklearn.linear_model", extra="train").LogisticRegression
    x = np.stack([np.asarray(features(copies(photo))) for images in photos.values() for photo in images])
    y = np.repeat(np.arange(len(photos)), [len(images) for images in photos.values()])

    def fitted(to: np.ndarray) -> Any:
        return regression(C=10, max_iter=1000).fit(np.concatenate(x[to]), np.repeat(y[to], x.shape[1]))

    every = np.arange(len(y))
    hits = [fitted(every[every != i]).predict(x[i, :1])[0] == y[i] for i in every]
    return fitted(every), float(np.mean(hits))


@dataclass
class Study:
    """What all cells share; a cell without a method is the pipeline before."""

    family: Family
    base: demo.Config
    nouns: dict[str, str]
    """Noun of each subject, in the order of the judge's numbers."""
    features: Features
    subjects: Any
    classes: demo.Classes

    def config(self, subject: str, method: str | None, seed: int) -> demo.Config:
        cell = f"before-{subject}" if method is None else f"{runs.slug(method)}-{subject}-{seed}"
        return replace(self.base, images=f"{self.base.images}/{subject}", class_name=self.nouns[subject], seed=seed,
                       method=method or "", lr=demo.METHODS.get(method or ""), out=f"{self.base.out}/{cell}")

    def cell(self, subject: str, method: str | None = None, seed: int = 0) -> dict[str, float]:
        config = self.config(subject, method, seed)

        def learn() -> dict[str, float]:
            if method is None:
                return self.measure(config, subject, self.nouns[subject])
            with demo.learnt(self.family, config) as (result, name):
                sizes = {"parameters": result.parameters, "bytes": result.file_bytes}
                return self.measure(config, subject, name) | sizes

        return kept(config.folder, learn)

    def measure(self, config: demo.Config, subject: str, name: str) -> dict[str, float]:
        """Both figures as fractions; `name` is what the subject is called. Some images are put into the folder."""
        own = demo.draw_subject(self.family, config, name)
        config.folder.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(own[:SHOWN]):
            image.save(config.folder / f"drawn_{i}.png")
        hits = self.subjects.predict(self.features(own)) == list(self.nouns).index(subject)
        return {"recognised": float(hits.mean()), "others": demo.others(self.family, config, self.classes)}

    def drawn(self, subject: str, method: str | None, seed: int) -> list[Any]:
        found = sorted(self.config(subject, method, seed).folder.glob("drawn_*.png"))
        return [require("PIL.Image", extra="train").open(path) for path in found]


def table(study: Study, seeds: Sequence[int]) -> str:
    """Markdown: a line before, and one for each method; means over the subjects."""
    cells = {None: [[study.cell(subject) for subject in study.nouns]]} | {
        method: [[study.cell(subject, method, seed) for subject in study.nouns] for seed in seeds]
        for method in demo.METHODS}  # fmt: skip
    lines = ["| method | rate | parameters | file, bytes | recognised % | others % |", "|---|---:|---:|---:|---:|---:|"]
    for method, found in cells.items():
        one, shown = found[0][0], " | ".join(spread(found, key) for key in ("recognised", "others"))
        about = "before | | |" if method is None else (
            f"{method} | {demo.METHODS[method]:g} | {one['parameters']:,} | {one['bytes']:,}")  # fmt: skip
        lines.append(f"| {about} | {shown} |")
    return "\n".join(lines)


def write_sheet(study: Study, photos: Mapping[str, Sequence[Any]], method: str, seed: int) -> None:
    """sheet-METHOD.png: three lines for each subject, its photos as they were learnt, drawn before, drawn after."""
    rows: dict[str, list[Any]] = {}
    for subject, images in photos.items():
        rows |= {f"{subject}, photos": [small(image) for image in images],
                 f"{subject}, before": study.drawn(subject, None, 0),
                 f"{subject}, after": study.drawn(subject, method, seed)}  # fmt: skip
    with runs.replacing(study.base.folder / f"sheet-{runs.slug(method)}.png") as temporary:
        sheet(rows, 64).save(temporary, format="PNG")


def read(folder: str, subjects: Sequence[str]) -> tuple[dict[str, str], dict[str, list[Picture]]]:
    """Noun and photos of each subject; a DataError if there is none, or a photo cannot be read."""
    file = Path(folder).expanduser() / "classes.json"
    nouns = runs.read_json(file) if file.exists() else {}
    if foreign := [subject for subject in subjects if subject not in nouns]:
        raise DataError(f'{file} has no noun for {foreign[0]!r}: write {{"{foreign[0]}": "cat", ...}} there, or choose '
                        f"other subjects (it has {', '.join(nouns) or 'none'})")  # fmt: skip
    return {s: nouns[s] for s in subjects}, {s: read_subject(file.parent / s) for s in subjects}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", required=True, help="folder with classes.json and a folder for each subject")
    parser.add_argument("--subjects", nargs="+", default=SUBJECTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--encoder", default="nano_vit", help="nano_vit or a model of timm: the judge has its features")
    parser.add_argument("--encoder-checkpoint", help="file of its weights, if it is a model of timm")
    parser.add_argument("--out", default="runs/photos", help="folder of the runs")
    parser.add_argument("--cache", default="runs/cache")
    parser.add_argument("--into", type=Path, help="page whose section Real photos is written")
    given = parser.parse_args()
    nouns, pictures = read(given.photos, given.subjects)
    base = replace(demo.DEMO, images=given.photos, out=given.out, cache=given.cache, kohya=False)
    kept_for = {"photos": {subject: [p.digest for p in found] for subject, found in pictures.items()},
                "encoder": [given.encoder, given.encoder_checkpoint], "rates": demo.METHODS, "steps": base.steps}
    runs.claim(base.folder, kept_for | base.identity())
    photos = {subject: [picture.open() for picture in found] for subject, found in pictures.items()}
    features = image_encoder(given.encoder, given.encoder_checkpoint).images
    subjects, accuracy = judge(features, photos)
    head = (f"{sum(map(len, photos.values()))} photos of {', '.join(photos)}; {base.steps} updates; seeds "
            f"{', '.join(map(str, given.seeds))}; means over the subjects, deviation over seeds; chance is "
            f"{100 / len(photos):.0f} % recognised. The judge of recognised, on features of `{given.encoder}`, has "
            f"seen the photos that were learnt from; of photos left out of its fit, one at a time, it knows "
            f"{100 * accuracy:.0f} %.")  # fmt: skip
    print(head, flush=True)
    study = Study(family_of(load_pipeline()), base, nouns, features, subjects, demo.class_head())
    text = table(study, given.seeds)
    print(text)
    for method in demo.METHODS:
        write_sheet(study, photos, method, given.seeds[0])
    if given.into is not None:
        put(given.into, f"{head}\n\n{text}", "Real photos")


if __name__ == "__main__":
    main()
