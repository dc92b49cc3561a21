"""What a run on point clouds is asked for, and what its adapter file says of model and clouds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from visionpeft.data.parts import is_parts
from visionpeft.models import point_transformer
from visionpeft.pipelines.settings import Common, ManyCells, OneCell

NANO = "nano_point_mae"


@dataclass(frozen=True)
class Settings(Common):
    """What point clouds take besides."""

    model: str = NANO
    """nano_point_mae, point_mae, point_bert, act, recon, pointgpt_s, pointgpt_b or pointgpt_l."""
    checkpoint: str | None = None
    """Pre-trained weights: official .pth (opened without unpickling) or .safetensors; the nano model has its own."""
    data: str = "bundled"
    """bundled, npz:PATH, folder:PATH, modelnet:PATH, scanobjectnn:obj_bg (obj_only, pb_t50_rs) or
    fewshot:5way10shot/0; with a part for every point, which are then what is learnt: bundled-parts, parts:PATH or
    shapenetpart:PATH."""
    out: str = "runs/points"
    """Folder for the runs."""
    augment: str | None = None
    """scale_translate, rotate (about y), none, which still draws points anew, or fixed, the same points each time."""
    points: int | None = None
    """Points of a cloud that the model sees; None is 2,048 for ScanObjectNN and ShapeNetPart, 1,024 for all else."""
    groups: int | None = None
    """Tokens of a cloud; None is 128 for 2,048 points and 64 for fewer, and what the nano model was made for."""
    votes: int = 0
    """Also score the test set by the mean over so many augmented passes; reported apart."""

    @property
    def job(self) -> str:
        """Whether clouds have one class each or a part for every point, the data say."""
        return "point_parts" if is_parts(self.data) else "points"

    @property
    def seen(self) -> int:
        """Points that the model sees."""
        return self.points or (2048 if self.data.startswith(("scanobjectnn", "shapenetpart")) else 1024)

    @property
    def backbone(self) -> CloudBackbone:
        usual = 64 if self.seen < 2048 else 128
        own = point_transformer.ARCHITECTURES[NANO].groups if self.model == NANO else usual
        return CloudBackbone(self.model, self.checkpoint, self.groups or own)


@dataclass(frozen=True)
class Config(Settings, OneCell):
    """One cell."""

    method: str = "pointgst"
    """A method with its settings, such as pointgst:rank=36; or raw, or scratch."""


@dataclass(frozen=True)
class Sweep(Settings, ManyCells):
    """Cells over methods and seeds."""

    method: tuple[str, ...] = ("raw", "scratch", "linear", "pointgst", "lora", "full")
    """Methods, each with its settings; also raw (features by hand), scratch."""


@dataclass(frozen=True)
class CloudBackbone:
    """How to make a model; travels in the adapter file."""

    name: str
    checkpoint: str | None
    groups: int

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "checkpoint": self.checkpoint, "groups": self.groups}


@dataclass(frozen=True)
class Sampling:
    """What happens to a cloud before the model sees it; travels in the adapter file."""

    points: int
    scaled: bool
    """Whether it is centred and scaled into the unit sphere."""

    def to_dict(self) -> dict[str, Any]:
        return {"points": self.points, "scaled": self.scaled}
