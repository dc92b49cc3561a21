"""A trained run on clouds back into a model, and its predictions for files of clouds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import visionpeft as vp
from visionpeft.data.cloud_files import SUFFIXES, read_cloud
from visionpeft.data.clouds import unit
from visionpeft.errors import AdapterFileError, DataError
from visionpeft.models.point_ops import farthest_points, nearest_points, take
from visionpeft.pipelines.deploy import Prediction, adapter_path, files_below, outputs, prediction
from visionpeft.pipelines.point_parts import Likeliest
from visionpeft.pipelines.point_settings import CloudBackbone, Sampling
from visionpeft.pipelines.points import build
from visionpeft.training import runs


@dataclass
class DeployedClouds:
    """A model with a trained adapter, in eval mode."""

    model: nn.Module
    tuner: Any
    classes: list[str]
    sampling: Sampling
    parts: tuple[str, ...] = ()
    """Names of the parts that it tells apart; none for a classifier."""
    owned: tuple[tuple[int, ...], ...] = ()
    """Numbers of the parts of each class."""


def restore(run: str | Path, checkpoint: str | None = None) -> DeployedClouds:
    """Build the model that the adapter file names and load the adapter into it.

    Args:
        checkpoint: where the backbone's weights are now, if not where they were.

    Raises:
        AdapterFileError: the file is not of a run on clouds.
    """
    path = adapter_path(run)
    metadata = vp.state.read_header(path).get("metadata", {})
    if metadata.get("task") not in ("points", "point_parts"):
        raise AdapterFileError(f"{path} is not of `visionpeft points`: its task is {metadata.get('task')!r}")
    named = CloudBackbone(**metadata["backbone"])
    backbone = named if checkpoint is None else CloudBackbone(named.name, checkpoint, named.groups)
    classes, parts = metadata["classes"], tuple(metadata.get("parts", ()))
    sizes = (len(parts), len(classes)) if parts else (len(classes),)
    model = build(backbone, *sizes, pretrained=metadata["pretrained"])
    tuner = vp.load(model, path)
    owned = tuple(map(tuple, metadata.get("owned", ())))
    return DeployedClouds(model.eval(), tuner, classes, Sampling(**metadata["preprocessing"]), parts, owned)


def cloud_files(clouds: str | Path) -> list[Path]:
    """A file, or all files of clouds below a folder, sorted.

    Raises:
        DataError: there is none.
    """
    return files_below(clouds, SUFFIXES, "clouds")


@torch.no_grad()
def predict(deployed: DeployedClouds, paths: list[Path]) -> Iterator[Prediction]:
    """Predictions in the order of `paths`, one file at a time: clouds may have any number of points."""
    for path in paths:
        points, _ = _seen(deployed, path)
        yield prediction(path, deployed.model(points)[0].softmax(0), deployed.classes)


def _seen(deployed: DeployedClouds, path: Path) -> tuple[Tensor, Tensor]:
    """What the model sees of a file (1, n, 3), and all its points (1, N, 3), in the model's coordinates."""
    cloud = read_cloud(path)[:, :3]
    whole = torch.from_numpy(unit(cloud) if deployed.sampling.scaled else cloud)[None]
    return take(whole, farthest_points(whole, min(deployed.sampling.points, whole.shape[1]))), whole


@torch.no_grad()
def write_parts(deployed: DeployedClouds, clouds: str | Path, out: Path, category: str | None = None) -> int:
    """Tell the parts of a file, or of all files of a folder, apart; returns how many there were.

    Writes out/NAME.txt for each: x y z as in the file, then the number of the part; and what the numbers mean into
    out/parts.csv. Points beyond those that the model sees get the part of the nearest that it sees.

    Args:
        category: of all the clouds; None takes the name of the folder that a file is in.

    Raises:
        DataError: the category of a file is not known, or two files differ by their endings alone.
    """
    paths, likeliest = cloud_files(clouds), Likeliest(deployed.model, deployed.owned, len(deployed.parts))
    wanted = [_category(deployed, path, category) for path in paths]
    for path, kind, target in zip(paths, wanted, outputs(paths, clouds, out, ".txt"), strict=True):
        seen, whole = _seen(deployed, path)
        parts = likeliest(nn.functional.pad(seen, (0, 1), value=kind))
        nearest = nearest_points(whole, seen, 1)[0, :, 0]
        rows = zip(read_cloud(path)[:, :3].tolist(), parts[0, nearest].int().tolist(), strict=True)
        runs.write_text(target, "".join(f"{x:.8g} {y:.8g} {z:.8g} {part}\n" for (x, y, z), part in rows))
    lines = [f"{part},{deployed.parts[part]},{name}\n"
             for name, own in zip(deployed.classes, deployed.owned, strict=True) for part in own]
    runs.write_text(out / "parts.csv", "number,part,category\n" + "".join(lines))
    return len(paths)


def _category(deployed: DeployedClouds, path: Path, given: str | None) -> int:
    name = given if given is not None else path.parent.name
    if name in deployed.classes:
        return deployed.classes.index(name)
    if len(deployed.classes) == 1 and given is None:
        return 0
    raise DataError(f"{path}: {name!r} is no category of this model, which knows {', '.join(deployed.classes)}: give "
                    "--category, or put the clouds into a folder for each")
