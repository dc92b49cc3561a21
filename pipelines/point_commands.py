"""Commands for point clouds, which `visionpeft.cli` takes in: points train | predict | convert | pretrain."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from visionpeft.errors import DataError, require
from visionpeft.pipelines.point_pretraining import Config as Pretraining
from visionpeft.pipelines.point_settings import NANO, Sweep

_SWEEP = Sweep()


def register(app: Any) -> None:
    """Enter the commands into a tyro app."""
    points = require("tyro", extra="train").extras.SubcommandApp()
    points.command(_train, name="train")
    points.command(_predict, name="predict")
    points.command(_convert, name="convert")
    points.command(_pretrain, name="pretrain")
    app.command(points, name="points", help="Point clouds: train (also without saying so), predict, convert, pretrain.")


def with_default(arguments: list[str]) -> list[str]:
    """`visionpeft points --method ...` means `visionpeft points train --method ...`; only help asks for all four."""
    if arguments[:1] == ["points"] and not arguments[1:2] or (
        arguments[:1] == ["points"] and arguments[1].startswith("-") and arguments[1] not in ("-h", "--help")
    ):
        return ["points", "train", *arguments[1:]]
    return arguments


def _train(plan: Sweep = _SWEEP) -> int:
    """Adapt a pre-trained point transformer to classification or to parts by several methods, and compare them.

    With no arguments: a small Point-MAE learns eight kinds of made-up furniture from 320 clouds. Finished cells are
    skipped and a killed one goes on where it was, so the same command can be given again.
    """
    from visionpeft.pipelines.points import sweep
    from visionpeft.report.console import SweepDisplay

    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    if plan.jobs is None:
        plan = replace(plan, jobs=min(os.cpu_count() or 1, 8) if alone and plan.model == NANO else 1)
    with SweepDisplay(main=not int(os.environ.get("RANK", 0))) as display:
        outcome = sweep(plan, watch=display.begin, done=display.end)
    display.summary(outcome)
    require("accelerate", extra="train").PartialState().destroy_process_group()
    return 1 if outcome.failures else 0


def _predict(run: str, clouds: str, out: str | None = None, checkpoint: str | None = None,
             category: str | None = None) -> int:
    """Classify clouds with a trained run, or tell their parts apart; names and sampling come from its adapter file.

    Args:
        run: Run folder or adapter file.
        clouds: A file of one cloud (xyz, txt, pts, npy, npz, off, ply, obj, stl), or a folder of them.
        out: CSV file to write (predictions.csv); for parts a folder (parts), with a file for each cloud.
        checkpoint: Weights of the backbone, if they are no longer where they were.
        category: For parts, what the clouds are of; if not given, the name of the folder that each is in.
    """
    from visionpeft.pipelines import deploy, point_deploy
    from visionpeft.report.console import show_predictions

    deployed = point_deploy.restore(run, checkpoint)
    if deployed.parts:
        out = out or "parts"
        print(f"{point_deploy.write_parts(deployed, clouds, Path(out), category)} clouds; all in {out}")
        return 0
    if category is not None:
        raise DataError(f"--category is for runs that tell parts apart, and {run} tells classes apart")
    out = out or "predictions.csv"
    predictions = list(point_deploy.predict(deployed, point_deploy.cloud_files(clouds)))
    deploy.write_predictions(Path(out), predictions)
    show_predictions(predictions)
    print(f"{len(predictions)} clouds; all in {out}")
    return 0


def _convert(source: str, out: str | None = None) -> int:
    """Make an npz of clouds that are shipped as a pickle, without running what the pickle might ask for.

    Args:
        source: The pickle: a draw of ModelNet few-shot, or ModelNet40's cache of 8,192 points.
        out: File to write; by default beside the pickle.
    """
    from visionpeft.data.unpickle import convert

    print(convert(source, out))
    return 0


def _pretrain(config: Pretraining) -> int:
    """Pre-train a point transformer on clouds without labels, by masked auto-encoding.

    The weights that it writes are for --checkpoint of `visionpeft points`.
    """
    from visionpeft.pipelines.point_pretraining import run

    def progress(done: int, steps: int, loss: float) -> None:
        if done % 50 == 0 or done == steps:
            print(f"update {done}/{steps}, loss {loss:.5f}", flush=True)

    path, _ = run(config, progress)
    print(f"{path}: give it as --checkpoint")
    return 0
