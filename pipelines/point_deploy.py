"""A trained run on clouds back into a model, and its predictions for files of clouds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import visionpeft as vp
from visionpeft.data.cloud_files import SUFFIXES, read_cloud
from visionpeft.data.clouds import unit
from visionpeft.errors import AdapterFileError, DataError
from visionpeft.models.point_ops import farthest_points, take
from visionpeft.pipelines.deploy import Prediction, _prediction, adapter_path
from visionpeft.pipelines.points import CloudBackbone, Sampling, build


@dataclass
class DeployedClouds:
    """A model with a trained adapter, in eval mode."""

    model: nn.Module
    tuner: Any
    classes: list[str]
    sampling: Sampling
    multi_label: bool = False


def restore(run: str | Path, checkpoint: str | None = None) -> DeployedClouds:
    """Build the model that the adapter file names and load the adapter into it.

    Args:
        checkpoint: where the backbone's weights are now, if not where they were.

    Raises:
        AdapterFileError: the file is not of a run on clouds.
    """
    path = adapter_path(run)
    metadata = vp.state.read_header(path).get("metadata", {})
    if metadata.get("task") != "points":
        raise AdapterFileError(f"{path} is not of `visionpeft points`: its task is {metadata.get('task')!r}")
    named = CloudBackbone(**metadata["backbone"])
    backbone = named if checkpoint is None else CloudBackbone(named.name, checkpoint, named.groups)
    model = build(backbone, len(metadata["classes"]), pretrained=metadata["pretrained"])
    tuner = vp.load(model, path)
    return DeployedClouds(model.eval(), tuner, metadata["classes"], Sampling(**metadata["preprocessing"]))


def cloud_files(clouds: str | Path) -> list[Path]:
    """A file, or all files of clouds below a folder, sorted.

    Raises:
        DataError: there is none.
    """
    path = Path(clouds)
    if path.is_file():
        return [path]
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not found:
        raise DataError(f"{path}: no clouds ({' '.join(SUFFIXES)}) found here")
    return found


@torch.no_grad()
def predict(deployed: DeployedClouds, paths: list[Path]) -> Iterator[Prediction]:
    """Predictions in the order of `paths`, one file at a time: clouds may have any number of points."""
    for path in paths:
        cloud = read_cloud(path)[:, :3]
        points = torch.from_numpy(unit(cloud) if deployed.sampling.scaled else cloud)[None]
        own = min(deployed.sampling.points, points.shape[1])
        points = take(points, farthest_points(points, own))
        yield _prediction(path, deployed.model(points)[0].softmax(0), deployed)  # type: ignore[arg-type]
