"""Commands for diffusion, which `visionpeft.cli` takes in: personalise, generate."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from visionpeft.errors import require
from visionpeft.pipelines.personalisation_settings import Config

_DEFAULT = Config()


def register(app: Any) -> None:
    """Enter the commands into a tyro app."""
    app.command(_personalise, name="personalise")
    app.command(_generate, name="generate")


def _personalise(config: Config = _DEFAULT) -> int:
    """Teach a diffusion pipeline a subject from a few images.

    With no arguments, or with --out and --seed alone: the bundled nano pipeline learns a drawn toy by KronA, LoRA and
    DiffFit; the table tells how well it is recognised among five toys, whether prompts are still obeyed, and what other
    classes lost. A killed run goes on where it was; more --steps extend a finished one.
    """
    from visionpeft.report.console import _console, _table
    from visionpeft.report.personalisation import score_rows

    console = _console(quiet=bool(int(os.environ.get("RANK", 0))))

    def watch(line: str) -> None:
        console.print(line, markup=False)

    if replace(config, out=_DEFAULT.out, seed=_DEFAULT.seed) == _DEFAULT:
        from visionpeft.pipelines.personalisation_demo import DEMO, demo

        own = replace(DEMO, out=config.out, seed=config.seed)
        with console.status("") as status:
            head, body, folder = demo(watch, lambda text: status.update(text), own)
        console.print(_table(head, body, "before and after"))
        console.print(f"sheet and report: {folder}", markup=False)
        return 0
    from visionpeft.pipelines.personalisation import run

    with console.status(config.method) as status:
        result = run(config, watch, lambda done, all, loss: status.update(f"{done} of {all} updates, loss {loss:.4f}"))
    require("accelerate", extra="train").PartialState().destroy_process_group()
    if result.after:
        console.print(_table(["score", "real", "before", "after"], score_rows(result)))
    console.print(f"{result.folder}/adapter.safetensors: {result.parameters:,} parameters, {result.file_bytes:,} "
                  f"bytes; loss {result.loss:.4f}; report.html beside it", markup=False)  # fmt: skip
    return 0


def _generate(
    prompts: tuple[str, ...],
    base: str = "nano",
    base_config: str | None = None,
    adapters: tuple[str, ...] = (),
    count: int = 1,
    seed: int = 0,
    inference_steps: int = 25,
    guidance: float = 7.5,
    side: int | None = None,
    out: str = "generated",
) -> int:
    """Draw from a base and adapters.

    Args:
        prompts: What to draw; {} becomes the token and the class of the first adapter.
        base: nano, a diffusers folder, or a single .safetensors file.
        base_config: For a single file: folder of a pipeline of its kind.
        adapters: Adapter files, each with its strength if not 1: cat.safetensors=0.7.
        count: Images of each prompt; image i has seed + i.
        seed: Seed of the first image.
        inference_steps: Denoising steps.
        guidance: Strength of classifier-free guidance.
        side: Pixels; by default what the first adapter was trained at, else what the pipeline was made for.
        out: Folder for the images and sheet.png.
    """
    from visionpeft.pipelines.generation import draw
    from visionpeft.report.personalisation import sheet

    drawn = draw(base, dict(_strength(text) for text in adapters), prompts, base_config=base_config, count=count,
                 seed=seed, steps=inference_steps, guidance=guidance, side=side, watch=print)  # fmt: skip
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[Any]] = {}
    for i, (prompt, image) in enumerate(drawn):
        image.save(folder / f"{i:03d}.png")
        rows.setdefault(prompt, []).append(image)
    sheet(rows).save(folder / "sheet.png")
    print(f"{len(drawn)} images and sheet.png in {folder}")
    return 0


def _strength(text: str) -> tuple[str, float]:
    """cat.safetensors=0.7 -> its path and 0.7; a path alone has 1."""
    path, equals, number = text.rpartition("=")
    try:
        return (path, float(number)) if equals else (text, 1.0)
    except ValueError:
        return text, 1.0
