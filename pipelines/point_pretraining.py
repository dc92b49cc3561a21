"""Pre-training of a point transformer on clouds without labels: masked auto-encoding (Point-MAE).

    path = run(Config(data="clouds.npz", epochs=300))     # weights for --checkpoint

Recipe of the paper: AdamW 1e-3, weight decay 0.05, cosine, 10 warm-up epochs, batches of 128, mask 0.6, clouds scaled
and shifted. A killed run goes on to the same numbers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visionpeft.data.cloud_files import SUFFIXES, read_npz
from visionpeft.data.clouds import CloudArray, CloudFiles
from visionpeft.data.sets import ImageSet, existing
from visionpeft.errors import DataError
from visionpeft.models import point_mae
from visionpeft.training import History, Recipe, fit, make_accelerator, runs
from visionpeft.training.clouds import CloudFeed, drawn_from, ordered
from visionpeft.training.order import seed_all


@dataclass(frozen=True)
class Config:
    """What pre-training is asked for."""

    data: str
    """An npz with points [clouds, points, 3] (or xyz), or a folder of files."""
    model: str = "nano_point_mae"
    """nano_point_mae or point_mae."""
    points: int = 1024
    groups: int | None = None
    """Tokens of a cloud; None is what the model was made for, and 64 for point_mae."""
    epochs: int = 300
    lr: float = 1e-3
    batch_size: int = 128
    warmup_epochs: int = 10
    precision: str = "fp32"
    """fp32, bf16 or fp16."""
    seed: int = 0
    out: str = "runs/point_pretraining"
    checkpoint_seconds: float = 60.0

    @property
    def recipe(self) -> Recipe:
        return Recipe(lr=self.lr, weight_decay=0.05, epochs=self.epochs, batch_size=self.batch_size, min_lr=1e-6,
                      warmup_epochs=min(self.warmup_epochs, self.epochs - 1), clip=10.0, schedule="epoch",
                      decay_1d=False, augment="scale_translate", drop_last=True)


def unlabelled(data: str) -> ImageSet:
    """All clouds of an npz or a folder, centred and within the unit sphere; labels are zeros.

    Raises:
        DataError: there are none, or the file is no such npz.
    """
    path = existing(data, "clouds")
    if path.is_dir():
        files = sorted(str(p) for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not files:
            raise DataError(f"{path}: no clouds here ({' '.join(SUFFIXES)})")
        return ImageSet(CloudFiles(files), np.zeros(len(files), dtype=np.int64))
    arrays = read_npz(path)
    points = next((arrays[key] for key in ("points", "xyz") if key in arrays), None)
    if points is None:
        raise DataError(f"{path}: no array points or xyz; there are {', '.join(arrays)}")
    return ImageSet(CloudArray(points, path.name), np.zeros(len(points), dtype=np.int64))


def _losses(losses: Tensor, _: Tensor) -> Tensor:
    return losses.float()


def run(config: Config, progress: Any = None) -> tuple[Path, History]:
    """Train, or go on; gives the file of weights (.safetensors, half precision) and the course of the loss."""
    folder = Path(config.out)
    beside = ("out", "checkpoint_seconds")
    runs.claim(folder, {key: value for key, value in asdict(config).items() if key not in beside})
    accelerator = make_accelerator(config.precision, (), folder)
    clouds = ordered(unlabelled(config.data), drawn_from(config.points))
    feed = CloudFeed(clouds, torch.zeros(len(clouds)), config.points, "scale_translate")
    seed_all(config.seed)
    groups = config.groups or (64 if config.model == "point_mae" else None)
    model = point_mae.create(config.model, **({} if groups is None else {"groups": groups}))
    history = fit(model, feed, config.recipe, accelerator, _losses, seed=config.seed, folder=folder,
                  progress=progress, checkpoint_seconds=config.checkpoint_seconds)
    path = folder / f"{config.model}.safetensors"
    if accelerator.is_main_process:
        write_encoder(model, path)
    accelerator.wait_for_everyone()
    return path, history


def write_encoder(model: point_mae.PointMAE, path: Path) -> None:
    """The encoder alone, under the names of the classifier, in half precision."""
    from safetensors.torch import save_file

    prefix = "MAE_encoder."
    state = {k.removeprefix(prefix): v for k, v in model.state_dict().items() if k.startswith(prefix)}
    tensors = {k: (v.half() if v.is_floating_point() else v).cpu().contiguous() for k, v in state.items()}
    with runs.replacing(path) as temporary:
        save_file(tensors, temporary)
