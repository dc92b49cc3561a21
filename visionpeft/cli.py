"""The command line: visionpeft classify | segment | predict | merge | inspect | zero-shot | data check."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visionpeft.errors import VisionPEFTError, require

if TYPE_CHECKING:
    from visionpeft.pipelines.deploy import Prediction
    from visionpeft.pipelines.settings import ManyCells, Sweep


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        0; 1 if cells of a sweep failed or data are wrong; 2 for a named error, told in one line.
    """
    try:
        return _dispatch(sys.argv[1:] if arguments is None else arguments)
    except VisionPEFTError as error:
        print(f"visionpeft: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("visionpeft: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


def _dispatch(arguments: list[str]) -> int:
    tyro = require("tyro", extra="train")
    # Evaluated here, since importing the pipelines takes a while and needs the train extra.
    from visionpeft.clip import commands as clip
    from visionpeft.diffusion import commands as diffusion
    from visionpeft.pipelines import point_commands
    from visionpeft.pipelines import segmentation_settings as segmentation
    from visionpeft.pipelines.settings import Sweep

    for command, default in ((_classify, Sweep()), (_segment, segmentation.Sweep())):
        command.__annotations__["plan"] = type(default)
        command.__defaults__ = (default,)
    app, data = tyro.extras.SubcommandApp(), tyro.extras.SubcommandApp()
    app.command(_classify, name="classify")
    app.command(_segment, name="segment")
    app.command(_predict, name="predict")
    app.command(_merge, name="merge")
    app.command(_inspect, name="inspect")
    app.command(_convert, name="convert")
    clip.register(app)
    diffusion.register(app)
    point_commands.register(app)
    data.command(_check, name="check")
    app.command(data, name="data", help="Look after data sets.")
    arguments = point_commands.with_default(arguments)
    config = (tyro.conf.PositionalRequiredArgs, tyro.conf.OmitArgPrefixes)
    return app.cli(prog="visionpeft", args=arguments, config=config) or 0


def _classify(plan: Sweep) -> int:
    """Adapt a pre-trained model to a classification task by several methods, and compare them.

    With no arguments: a small ViT, pre-trained on CIFAR-10, learns Fashion-MNIST from 1,000 images. Finished cells are
    skipped and a killed one goes on where it was, so the same command can be given again.
    """
    return do(plan)


def _segment(plan: ManyCells) -> int:
    """Adapt a pre-trained model to give a class to every pixel by several methods, and compare them.

    With no arguments: a small ViT, pre-trained on CIFAR-10, learns to tell textured shapes from textured ground.
    Finished cells are skipped and a killed one goes on where it was, so the same command can be given again.
    """
    return do(plan)


def do(plan: ManyCells) -> int:
    """Do a sweep of any job with progress bars and print its table; returns 1 if cells failed."""
    require("accelerate", extra="train")
    from visionpeft.models.nano import ARCHITECTURES
    from visionpeft.pipelines.running import sweep
    from visionpeft.report.console import SweepDisplay

    if plan.jobs is None:
        plan = replace(plan, jobs=_cores() if plan.model in ARCHITECTURES else 1)
    with SweepDisplay(main=not int(os.environ.get("RANK", 0))) as display:
        outcome = sweep(plan, watch=display.begin, done=display.end)
    display.summary(outcome)
    require("accelerate", extra="train").PartialState().destroy_process_group()
    return 1 if outcome.failures else 0


def _cores() -> int:
    """Cores for cells side by side; one where several processes share each cell already."""
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    return min(os.cpu_count() or 1, 8) if alone else 1


def _predict(run: str, images: str, out: str | None = None, checkpoint: str | None = None,
             classes: str | None = None) -> int:  # fmt: skip
    """Classify or segment images with a trained run; class names and preprocessing come from its adapter file.

    Args:
        run: Run folder or adapter file.
        images: Image, or folder of images.
        out: CSV file to write, predictions.csv if none is named; for segmentation a folder, predictions if none is.
        checkpoint: Weights of the backbone, if they are no longer where they were.
        classes: File with class names, one a line or JSON, for runs of few-shot, contrast and zero-shot.
    """
    from visionpeft.clip.commands import predicted
    from visionpeft.pipelines import deploy

    if (found := predicted(run, images, classes, checkpoint)) is not None:
        return _show(found, out)
    deployed = deploy.restore(run, checkpoint)
    if deployed.task == "segmentation":
        folder = Path(out or "predictions")
        print(f"{deploy.write_masks(deployed, images, folder)} images; masks and overlays in {folder}")
        return 0
    return _show(list(deploy.predict(deployed, deploy.image_files(images))), out)


def _show(predictions: list[Prediction], out: str | None) -> int:
    from visionpeft.pipelines import deploy
    from visionpeft.report.console import show_predictions

    out = out or "predictions.csv"
    deploy.write_predictions(Path(out), predictions)
    show_predictions(predictions)
    print(f"{len(predictions)} images; all in {out}")
    return 0


def _merge(run: str, out: str = "model.safetensors", export: str | None = None, checkpoint: str | None = None) -> int:
    """Fold a trained adapter into plain timm weights, which load without this library.

    Args:
        run: Run folder or adapter file.
        out: File to write, .safetensors.
        export: Also write a torch.export program, such as model.pt2.
        checkpoint: Weights of the backbone, if they are no longer where they were.
    """
    from visionpeft.pipelines import deploy

    deployed = deploy.restore(run, checkpoint)
    model = deploy.merged_model(deployed)
    deploy.save_weights(model, Path(out), deployed)
    print(f"{out}: load it with\n  {deploy.loading_line(deployed, Path(out))}")
    if export is not None:
        deploy.export(model, Path(export), deployed.spec.size)
        print(f'{export}: load it with\n  torch.export.load("{export}").module()')
    return 0


def _inspect(model: str, memory: bool = False, method: str = "lora", lever: str = "rebuild", batch: int = 1) -> int:
    """Show the places of a model where methods can act, or what a method makes it keep in memory at each.

    Args:
        model: nano_vit, or any timm name; no weights are needed.
        memory: Attach the method and count the bytes alive after forward, with and without each adapter.
        method: A method with its settings, such as "lora:targets=linear".
        lever: rebuild, keep, checkpoint or reversible.
        batch: Images that are looked at.
    """
    import torch

    if memory:
        return _memory(model, method, lever, batch)

    import visionpeft as vp
    from visionpeft.pipelines.backbone import Backbone, build

    with torch.device("meta"):
        backbone = build(Backbone(model), 10, pretrained=False)
    print(vp.inspect(backbone))
    return 0


def _memory(model: str, method: str, lever: str, batch: int) -> int:
    import torch

    import visionpeft as vp
    from visionpeft.pipelines.backbone import Backbone, build
    from visionpeft.pipelines.methods import parse_method

    backbone = build(Backbone(model), 10, pretrained=False)
    tuner = vp.attach(backbone, parse_method(method), train="head", memory=lever)
    config: Any = backbone.pretrained_cfg
    print(tuner.memory_report(torch.randn(batch, *config["input_size"])))
    return 0


def _convert(source: str, out: str, base: str = "", to: str = "diffusers") -> int:
    """Rewrite an adapter file for another tool; what the other format cannot say is refused with the reason.

    Args:
        source: Adapter file or PEFT folder; its format is found out.
        out: File to write, for peft a folder.
        base: Folder of the diffusers pipeline or model that it is for (only configs are read, and for SVFit the
            weights), or a timm name.
        to: visionpeft, diffusers, kohya, peft, lycoris or cloneofsimo; KronA as LoKr also diffusers-lokr or comfyui.
    """
    from visionpeft.formats.structure import convert

    print(convert(source, out, base, to))
    return 0


def _check(root: str, kind: str = "vtab", decode: bool = True) -> int:
    """List what is missing or wrong in data on disk.

    Args:
        root: Folder that holds the data; for csv the file.
        kind: vtab, fgvc, fewshot, folder or csv.
        decode: Also open every image.
    """
    from visionpeft.data.check import check

    problems = check(root, kind, images=decode)
    for problem in problems:
        print(problem)
    print(f"{root}: {len(problems)} problems" if problems else f"{root}: all is well")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
