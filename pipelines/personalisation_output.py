"""What a personalisation leaves in its folder: previews, the adapter, files for other tools, scores, the report."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import visionpeft as vp
from visionpeft.diffusion.families import Family
from visionpeft.diffusion.scores import compare
from visionpeft.diffusion.training import Trainer
from visionpeft.errors import FormatError
from visionpeft.formats import kohya
from visionpeft.methods.textual_inversion import save_embedding
from visionpeft.pipelines.personalisation_settings import WORD_FILE, Config, Result
from visionpeft.report.personalisation import report
from visionpeft.training import runs

Watch = Callable[[str], None]
BLACK = 4  # a picture without a brighter value than this, of 255, is black


def preview(config: Config, family: Family, trainer: Trainer, prompts: Sequence[str], step: int,
            notes: list[str]) -> None:  # fmt: skip
    """Draw the previews with what would be saved now; a black one is told in the notes."""
    if not trainer.accelerator.is_main_process:
        return
    kept = {name: t.clone() for name, t in trainer.state().items()}
    training = family.denoiser.training
    trainer.load(trainer.result())
    family.train(False)
    for i, prompt in enumerate(prompts):
        (image,) = family.draw([prompt], [config.seed + i], config.inference_steps, config.guidance, config.resolution)
        if np.asarray(image).max() <= BLACK:
            notes.append(f"the preview of {prompt!r} at step {step} is black: the rate is too high, or half precision "
                         "overflows in the autoencoder")  # fmt: skip
        with runs.replacing(config.folder / "previews" / f"{step:06d}_{i}.png") as temporary:
            image.save(temporary, format="PNG")
    trainer.load(kept)
    family.train(training)


def finish(config: Config, family: Family, trainer: Trainer, subject: Any, base: str, jury: Any, result: Result,
           watch: Watch) -> Result:  # fmt: skip
    """Write the adapter and what else tells of the run; `jury` scores it if there is one."""
    trainer.load(trainer.result())
    result.steps, result.segments = trainer.step, trainer.segments
    last = trainer.losses[-max(1, len(trainer.losses) // 10) :]
    result.loss = sum(last) / len(last)
    path = config.folder / "adapter.safetensors"
    if trainer.accelerator.is_main_process:
        trainer.tuner.save(path, base=config.base, token=subject.token, prompt=result.prompt,
                           class_name=config.class_name, denoiser=base, new_classes=config.new_classes,
                           word_vectors=config.word_vectors, seed=config.seed,
                           resolution=config.resolution)  # fmt: skip
        if config.word_vectors:
            save_embedding(trainer.tuners[1], config.folder / WORD_FILE, subject.token)
        result.file_bytes = path.stat().st_size
        if config.kohya:
            _write_kohya(trainer.tuner, config.folder / "adapter_kohya.safetensors", result.notes)
    if jury is not None:
        watch("scoring")
        compare(config, family, trainer.tuner, subject, jury, result)
    if trainer.accelerator.is_main_process:
        runs.write_text(config.folder / "report.html", report(result, trainer.rows(), config.folder))
        runs.write_json(config.folder / "result.json", asdict(result))
    for note in result.notes:
        watch(f"NOTE: {note}")
    return result


def _write_kohya(tuner: vp.Tuner, path: Path, notes: list[str]) -> None:
    """Write the file of sd-scripts, or note why it cannot be; how much a KronA grows is noted too."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            kohya.save(tuner, path)
        except FormatError as error:
            notes.append(f"no {path.name}: {error}")
    notes += [str(w.message) for w in told]
