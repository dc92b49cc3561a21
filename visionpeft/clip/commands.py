"""Commands of CLIP jobs, which `visionpeft.cli` takes in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from visionpeft.clip.errors import ClipError
from visionpeft.clip.templates import PHOTO
from visionpeft.pipelines.contrastive import Config as Contrast
from visionpeft.pipelines.few_shot import Config as FewShot
from visionpeft.pipelines.zero_shot import Config as ZeroShot

_ZERO_SHOT, _FEW_SHOT, _CONTRAST = ZeroShot(), FewShot(), Contrast()

# Short enough for three minutes on two cores: 240 updates at 6e-3 where the paper has 8,000 at 2e-4. The rate was
# chosen between this and 2e-3 on 200 validation images. The template is the one that CLIP-LoRA tunes with.
DEMO = replace(_ZERO_SHOT, data=("bundled?test=1000", "digits?test=300"), templates=PHOTO, tune="clip_lora",
               iterations=240, lr=6e-3, points=5)  # fmt: skip
CIFAR = "torchvision:CIFAR10?test=1000"


def with_demo(config: ZeroShot) -> ZeroShot:
    """The demo where nothing was asked for but where data are and where results go.

    CIFAR-10, whose classes the bundled model was trained on, may not be shipped: with `--root` torchvision finds or
    fetches it there, without it scikit-learn's digits show what tuning costs.
    """
    if replace(config, out=_ZERO_SHOT.out, root=None) != _ZERO_SHOT:
        return config
    data = DEMO.data if config.root is None else (DEMO.data[0], CIFAR)
    return replace(DEMO, data=data, root=config.root, out=config.out)


def register(app: Any) -> None:
    """Enter the commands into a tyro app."""
    app.command(_zero_shot, name="zero-shot")
    app.command(_few_shot, name="few-shot")
    app.command(_contrast, name="contrast")


def _zero_shot(config: ZeroShot = _ZERO_SHOT) -> int:
    """Evaluate a CLIP model without training, alone and with an adapter.

    With an adapter: scores before and after on every set, and accuracy over the adapter's scale from 0 to 1. With no
    arguments: the bundled nano CLIP on Fashion-MNIST, whose classes it never saw, then tuned there by CLIP-LoRA on 16
    images per class; with --root alone the same and what is lost on CIFAR-10, which torchvision finds or fetches there.
    """
    from visionpeft.pipelines.zero_shot import run
    from visionpeft.report.console import _console, _table
    from visionpeft.report.zero_shot import curve_rows, rows, title

    console = _console()
    config = with_demo(config)
    result = run(config, lambda line: console.print(line, markup=False, style="dim"))
    head, body = rows(result)
    console.print(_table(head, body, title(result)))
    if result.curve:
        console.print(_table(*curve_rows(result), "over the adapter's scale"))
    for note in result.notes:
        console.print(note, markup=False)
    if config == replace(DEMO, out=config.out):
        console.print("the loss on CIFAR-10, which cannot be shipped: visionpeft zero-shot --root data", markup=False)
    console.print(f"report: {result.folder}/report.html", markup=False)
    return 0


def _few_shot(config: FewShot = _FEW_SHOT) -> int:
    """Tune a CLIP model on a few images per class, by an adapter, learnt prompts or a head on its features."""
    from visionpeft.pipelines.few_shot import run
    from visionpeft.report.clip import few_shot_notes, few_shot_rows, few_shot_title
    from visionpeft.report.console import _console, _table

    console = _console()
    result = _watched(run, config)
    console.print(_table(*few_shot_rows(result), few_shot_title(result, config.shots)))
    for line in (*few_shot_notes(result), f"report: {result.folder}/report.html"):
        console.print(line, markup=False)
    return 0


def _contrast(config: Contrast = _CONTRAST) -> int:
    """Tune a CLIP model on images with captions; retrieval on held-out images tells what was gained."""
    from visionpeft.pipelines.contrastive import run
    from visionpeft.report.clip import contrast_rows, contrast_title
    from visionpeft.report.console import _console, _table

    console = _console()
    result = _watched(run, config)
    console.print(_table(*contrast_rows(result), contrast_title(result, config.method)))
    console.print(f"report: {result.folder}/report.html", markup=False)
    return 0


def _watched(run: Callable[..., Any], config: FewShot | Contrast) -> Any:
    """The result of `run`, which says how far it is."""
    from visionpeft.report.console import _console

    with _console().status(config.method) as status:
        return run(config, lambda done, total, loss: status.update(f"{done} of {total} updates, loss {loss:.3f}"))


def predicted(run: str, images: str, classes: str | None, checkpoint: str | None) -> Any:
    """Predictions of a CLIP run, or None if this is a run of another job.

    Raises:
        VisionPEFTError: classes given for a run of another job, or whatever keeps this one from predicting.
    """
    from visionpeft.pipelines import clip_deploy

    if clip_deploy.told(run) is None:
        if classes is not None:
            raise ClipError(f"{run} is no run of few-shot, contrast or zero-shot: drop --classes")
        return None
    return clip_deploy.predict(run, images, classes, checkpoint)
