"""What a run is asked for, and what it gives back: the part that all jobs share, and that of classification."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from visionpeft.pipelines.backbone import Backbone
from visionpeft.training import Recipe, runs

BASELINES = ("raw", "scratch")
"""Rows that adapt nothing: what the pixels give away without a network, and training from random weights."""


@dataclass(frozen=True)
class Common:
    """What the cells of any sweep share. None means: as the preset of the data, or the default recipe, says."""

    model: str = "nano_vit"
    """nano_vit, or any timm name."""
    checkpoint: str | None = None
    """Local weights for a timm model: .safetensors, .pth or .npz."""
    img_size: int | None = None
    """Side of the images in pixels, for models that can take several."""
    data: str = "bundled"
    root: str | None = None
    """Folder that holds the data sets."""
    protocol: str | None = None
    """Preprocessing: checkpoint, vtab-imagenet, vtab-half or vtab-raw."""
    out: str = "runs"
    """Folder for the runs."""
    lr: float | None = None
    head_lr: float | None = None
    """Rate of the classifier or decoder, as a multiple of lr; 30 for full fine-tuning, else 1."""
    epochs: int | None = None
    batch_size: int | None = None
    weight_decay: float | None = None
    optimizer: str | None = None
    warmup_epochs: int | None = None
    drop_path: float | None = None
    label_smoothing: float | None = None
    augment: str | None = None
    class_weights: bool | None = None
    drop_last: bool | None = None
    ema: float | None = None
    clip: float | None = None
    accumulation: int | None = None
    grid: tuple[str, ...] = ()
    """Values to try on the validation split, such as lr=1e-3,3e-3, or of the method's fields: scale=0.1,1,10; the best
    is trained again on all of train."""
    precision: str = "fp32"
    """fp32, bf16 or fp16."""
    trackers: tuple[str, ...] = ()
    """Trackers of accelerate, such as tensorboard."""
    workers: int | None = None
    """DataLoader processes, where images are not held in memory."""
    track_test: int = 0
    """Also look at the test set every so many epochs, as much of the literature does; reported apart, as such."""
    checkpoint_seconds: float = 60.0
    """Least time between two resumable checkpoints."""

    @property
    def job(self) -> str:
        """Module of visionpeft.pipelines that does the work."""
        raise NotImplementedError

    @property
    def backbone(self) -> Any:
        """How to make the model: a dataclass with to_dict, which goes into the adapter file."""
        return Backbone(self.model, self.checkpoint, self.img_size)

    @property
    def data_name(self) -> str:
        """The data without the folders of a path."""
        return re.sub(r":.*/", ":", re.sub(r"/+(?=$|\?)", "", self.data))

    def given_recipe(self) -> dict[str, Any]:
        """The fields of a Recipe that were given."""
        names = {f.name for f in fields(Recipe)}
        return {key: value for key, value in asdict(self).items() if key in names and value is not None}


@dataclass(frozen=True)
class OneCell(Common):
    """One method, one seed."""

    method: str = "lora"
    """A method with its settings, such as lora:rank=4; or raw, or scratch."""
    seed: int = 0

    @property
    def folder(self) -> Path:
        cell = (self.model, self.data_name, self.method, f"seed{self.seed}")
        return Path(self.out, *map(runs.slug, cell))

    def identity(self) -> dict[str, Any]:
        """What decides the numbers: all but where to and how fast."""
        beside = ("out", "trackers", "workers", "checkpoint_seconds")
        return {key: value for key, value in asdict(self).items() if key not in beside}


@dataclass(frozen=True)
class ManyCells(Common):
    """Methods and seeds."""

    method: tuple[str, ...] = ("raw", "scratch", "linear", "ssf", "lora", "full")
    """Methods, each with its settings, such as ssf "lora:rank=8,targets=query value" linear full; also raw, scratch."""
    seeds: tuple[int, ...] = (0,)
    jobs: int | None = None
    """Cells at a time, each with its share of the cores. On the command line None is one per core (at most eight) for
    the bundled model, which gains nothing from more threads, and otherwise one."""


@dataclass(frozen=True)
class Settings(Common):
    """What classification takes besides."""

    job: ClassVar[str] = "classification"

    data: str = "bundled"
    """bundled, digits, fashion-mnist, vtab, vtab:TASK, fgvc:SET, fewshot:SET, torchvision:NAME, folder:PATH, csv:PATH
    or npz:PATH; an ending ?train=1000&test=2000 draws a fixed subset."""
    shots: int | None = None
    """Images per class of a few-shot list."""
    mixup: float | None = None
    cutmix: float | None = None
    augment: str | None = None
    """flip, crop, resized_crop or randaugment."""


@dataclass(frozen=True)
class Config(Settings, OneCell):
    """One cell of classification."""


@dataclass(frozen=True)
class Sweep(Settings, ManyCells):
    """Cells over tasks, methods and seeds."""

    tasks: tuple[str, ...] = ("all",)
    """Tasks of a family of data sets such as vtab."""


@dataclass
class Result:
    """What a cell measured."""

    data: str
    model: str
    method: str
    seed: int
    accuracy: float = 0.0
    """The main score on the test set after the last epoch, a fraction; `measure` says which."""
    measure: str = "accuracy"
    """accuracy (top-1, or mean average precision for multi-label data), or mIoU."""
    metrics: dict[str, float] = field(default_factory=dict)
    """All scores and the last losses; the same to the last bit when a killed run was resumed on a CPU."""
    adapter_parameters: int | None = None
    """Scalars of the adapters, without classifier or decoder; all of the base for full fine-tuning."""
    trained_parameters: int | None = None
    """All scalars that learnt."""
    file_bytes: int | None = None
    seconds_per_step: float | None = None
    seconds_waiting: float | None = None
    """Of a step, waiting for data: median over steps."""
    peak_memory: int | None = None
    """Bytes during training: of the device, on a CPU of the whole process."""
    seconds: float = 0.0
    """Wall time of the cell in the process that finished it."""
    test_images: int = 0
    classes: list[str] = field(default_factory=list)
    per_class: dict[str, float] = field(default_factory=dict)
    """IoU of each class that occurs in the test set or in what was predicted for it."""
    correct: str = ""
    """Which test images were classified right, "1", or wrong, "0"; empty where an image has no single class."""
    confusion: list[list[int]] | None = None
    """Counts of test images or pixels, rows the true class; None for multi-label data and for more than 100 classes."""
    recipe: dict[str, Any] = field(default_factory=dict)
    selection: list[dict[str, Any]] = field(default_factory=list)
    """Grid points and their score on the validation split."""
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    folder: str = ""
