"""What a segmentation run is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visionpeft.pipelines.settings import Common, ManyCells, OneCell


@dataclass(frozen=True)
class Settings(Common):
    """What segmentation takes besides."""

    job: ClassVar[str] = "segmentation"

    img_size: int | None = None
    """Side of the training crops in pixels; None is what the model was pre-trained with."""
    data: str = "bundled"
    """bundled, bundled-shift, folder:PATH, voc:PATH, ade20k:PATH or cityscapes:PATH; an ending ?train=100&test=50 draws
    a fixed subset."""
    out: str = "runs/segmentation"
    """Folder for the runs."""
    augment: str | None = None
    """crop, flip, scale or colour, each of which includes those before it; "none" crops at the centre."""
    decoder: str = "linear"
    """linear or dpt (plain ViTs), fpn or upernet (all backbones)."""
    channels: int = 128
    """Width of the decoder, a multiple of 64."""
    dice: float | None = None
    """Weight of the Dice loss beside the cross-entropy."""
    mask_values: tuple[int, ...] = ()
    """The number that stands for each class in the masks of a folder, such as 0 255."""
    ignore_index: int | None = None
    """A number in the masks of a folder that means no class."""
    windows: int | None = None
    """Side of the windows in which images are evaluated; 0 takes them whole. None is 0, but for the bundled images as
    large as the crops."""
    overlap: float = 0.5
    """Least share of a window that the next one covers too."""
    shift: tuple[str, ...] = ()
    """Other data with the same classes, whose test images are scored too, such as bundled-shift."""


@dataclass(frozen=True)
class Config(Settings, OneCell):
    """One cell of segmentation."""


@dataclass(frozen=True)
class Sweep(Settings, ManyCells):
    """Cells over methods and seeds."""

    method: tuple[str, ...] = ("raw", "linear", "ssf", "lora:targets=linear", "adaptformer", "full")
    """Methods, each with its settings, such as ssf "lora:rank=8,targets=query value" linear full; also raw, scratch."""
