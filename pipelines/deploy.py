"""After training: a run folder or an adapter file back into a model, its predictions or masks, its merged weights."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import visionpeft as vp
from visionpeft import data
from visionpeft.data.images import EXTENSIONS
from visionpeft.errors import AdapterFileError, DataError
from visionpeft.models import nano
from visionpeft.pipelines.backbone import Backbone, build, takes_size
from visionpeft.training import runs


@dataclass
class Deployed:
    """A model with a trained adapter, in eval mode."""

    model: nn.Module
    tuner: Any
    classes: list[str]
    spec: data.Preprocessing
    backbone: Backbone
    metadata: dict[str, Any]

    @property
    def multi_label(self) -> bool:
        return self.metadata.get("multi_label", False)

    @property
    def task(self) -> str:
        """classification or segmentation."""
        return self.metadata.get("task", "classification")


@dataclass(frozen=True)
class Prediction:
    """What the model says of one image."""

    path: str
    label: str
    """The likeliest class; for multi-label models all classes above one half, separated by spaces."""
    probability: float
    """Of the likeliest class."""
    others: list[tuple[str, float]]
    """The next likeliest classes."""


def adapter_path(run: str | Path) -> Path:
    """The adapter file of a run folder, or the file itself.

    Raises:
        RunError: there is none.
    """
    path = Path(run)
    path = path / "adapter.safetensors" if path.is_dir() else path
    if not path.is_file():
        why = "the raw row has no model" if (path.parent / "result.json").exists() else "is the run finished?"
        raise runs.RunError(f"{path}: no adapter file here; {why}")
    return path


def restore(run: str | Path, checkpoint: str | None = None) -> Deployed:
    """Build the backbone that the adapter file names and load the adapter into it.

    Args:
        checkpoint: where the backbone's weights are now, if not where they were.

    Raises:
        AdapterFileError: the file does not say what backbone and classes it was made for.
    """
    path = adapter_path(run)
    metadata = vp.state.read_header(path).get("metadata", {})
    missing = [key for key in ("backbone", "classes", "preprocessing") if key not in metadata]
    if missing:
        raise AdapterFileError(f"{path} is not of `visionpeft classify` or `segment`: its metadata lack "
                               f"{', '.join(missing)}")
    named = Backbone(**metadata["backbone"])
    backbone = named if checkpoint is None else Backbone(named.name, checkpoint, named.img_size)
    model = _make(backbone, metadata, metadata.get("pretrained", True))
    tuner = vp.load(model, path)
    return Deployed(model.eval(), tuner, metadata["classes"],
                    data.Preprocessing.from_dict(metadata["preprocessing"]), backbone, metadata)


def _make(backbone: Backbone, metadata: dict[str, Any], pretrained: bool) -> nn.Module:
    """The model without its adapter."""
    classes = len(metadata["classes"])
    if metadata.get("task") != "segmentation":
        return build(backbone, classes, pretrained=pretrained)
    from visionpeft.pipelines.segmentation import make_model

    model = make_model(backbone, classes, metadata["decoder"], metadata["channels"], pretrained=pretrained)
    if metadata.get("fixed"):
        model.fixed = tuple(metadata["fixed"])
    return model


def image_files(images: str | Path) -> list[Path]:
    """An image file, or all image files below a folder, sorted.

    Raises:
        DataError: there is none.
    """
    return files_below(images, EXTENSIONS, "images")


def files_below(given: str | Path, suffixes: Sequence[str], what: str) -> list[Path]:
    """A file, or all files of some kinds below a folder, sorted; an error says that there is no `what`."""
    path = Path(given)
    if path.is_file():
        return [path]
    found = sorted(p for p in path.rglob("*")
                   if p.suffix.lower() in suffixes and p.is_file() and not p.name.startswith("."))
    if not found:
        raise DataError(f"{path}: no {what} ({', '.join(suffixes)}) found here")
    return found


def outputs(files: Sequence[Path], given: str | Path, out: Path, suffix: str) -> list[Path]:
    """Where the result of each file goes: below `out` as it lies below the folder given, with another ending.

    Raises:
        DataError: two files would share one.
    """
    base = Path(given) if Path(given).is_dir() else Path(given).parent
    found: dict[Path, Path] = {}
    for file in files:
        target = (out / file.relative_to(base)).with_suffix(suffix)
        if target in found:
            raise DataError(f"{found[target]} and {file} would both be written to {target}: rename one")
        found[target] = file
    return list(found)


@torch.no_grad()
def predict(deployed: Deployed, paths: list[Path], batch_size: int = 32) -> Iterator[Prediction]:
    """Predictions in the order of `paths`.

    Raises:
        DataError: an image cannot be read; it is named.
    """
    transform = deployed.spec.transform()
    device = next(deployed.model.parameters()).device
    for start in range(0, len(paths), batch_size):
        part = paths[start:start + batch_size]
        inputs = torch.stack([transform(data.read_image(path)) for path in part])
        logits = deployed.model(inputs.to(device)).float().cpu()
        chances = logits.sigmoid() if deployed.multi_label else logits.softmax(1)
        yield from (prediction(path, row, deployed.classes, deployed.multi_label)
                    for path, row in zip(part, chances, strict=True))


def prediction(path: Path, chances: Tensor, classes: list[str], multi_label: bool = False) -> Prediction:
    """What probabilities [C] say of a file."""
    best = chances.topk(min(3, len(classes)))
    ranked = [(classes[int(i)], float(p)) for p, i in zip(best.values, best.indices, strict=True)]
    label = ranked[0][0]
    if multi_label:
        label = ";".join(name for name, p in zip(classes, chances, strict=True) if p > 0.5)
    return Prediction(str(path), label, ranked[0][1], ranked[1:])


def write_predictions(path: Path, predictions: list[Prediction]) -> None:
    """CSV with columns path, label, probability."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", "probability"])
    writer.writerows([p.path, p.label, f"{p.probability:.6f}"] for p in predictions)
    runs.write_text(path, text.getvalue())


@torch.no_grad()
def write_masks(deployed: Deployed, images: str | Path, out: Path) -> int:
    """Segment an image or all images of a folder; returns how many.

    Writes, for each image, out/masks/NAME.png, a palette picture whose values are the classes, and
    out/overlays/NAME.png, the image under their colours; and the names of the classes into out/classes.txt.

    Raises:
        DataError: an image cannot be read, or two differ by their endings alone; they are named.
    """
    from visionpeft.data.mask_transforms import together
    from visionpeft.report.segmentation import coloured, overlay
    from visionpeft.training.dense import Windows

    windows = Windows(deployed.metadata["windows"], deployed.metadata["overlap"])
    transform, paths = together(deployed.spec), image_files(images)
    for path, place in zip(paths, outputs(paths, images, Path(), ".png"), strict=True):
        image = data.read_image(path)
        inputs = transform(image, np.zeros((image.height, image.width), np.uint8))[0][None]
        mask = windows.logits(deployed.model, inputs)[0].argmax(0).to(torch.uint8).numpy()
        for kind, picture in (("masks", coloured(mask)), ("overlays", overlay(image, mask))):
            target = out / kind / place
            target.parent.mkdir(parents=True, exist_ok=True)
            picture.save(target)
    runs.write_text(out / "classes.txt", "".join(f"{name}\n" for name in deployed.classes))
    return len(paths)


def merged_model(deployed: Deployed) -> nn.Module:
    """A new model without adapters, of timm (for segmentation with a decoder), that computes what the adapted one does.

    Raises:
        MergeError: the method is no change of weights; it is named.
        AdapterFileError: the merged model does not give the adapted model's output (never seen; checked all the same).
    """
    example = torch.randn(2, 3, *deployed.spec.size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = deployed.model(example)
    deployed.tuner.merge()
    plain = _make(deployed.backbone, deployed.metadata, pretrained=False).eval()
    plain.load_state_dict(deployed.model.state_dict())
    with torch.no_grad():
        worst = float((plain(example) - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    if not worst < 1e-3:
        raise AdapterFileError(f"the merged model is off by {worst:.1e} of the largest logit: please report this")
    return plain


def save_weights(model: nn.Module, path: Path, deployed: Deployed) -> None:
    """Plain weights in one safetensors file, class names and preprocessing in its header."""
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    header = {"format": "pt", "classes": json.dumps(deployed.classes),
              "preprocessing": json.dumps(deployed.spec.to_dict())}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata=header)


def export(model: nn.Module, path: Path, size: tuple[int, int]) -> None:
    """A torch.export program for any batch size; opens with torch.export.load alone."""
    example = torch.zeros(2, 3, *size)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.export.save(program, path)


def loading_line(deployed: Deployed, path: Path) -> str:
    """Python that loads merged weights: without this library, but for decoders of segmentation."""
    backbone, classes = deployed.backbone, len(deployed.classes)
    if deployed.task == "segmentation":
        imports = ["from visionpeft.pipelines.backbone import Backbone",
                   "from visionpeft.pipelines.segmentation import make_model"]
        given = f"{deployed.metadata['decoder']!r}, {deployed.metadata['channels']}, pretrained=False"
        made = f"make_model(Backbone({backbone.name!r}, img_size={backbone.img_size}), {classes}, {given})"
    elif backbone.name in nano.ARCHITECTURES:
        imports = ["from visionpeft.models import nano"]
        made = f"nano.create({backbone.name!r}, pretrained=False, num_classes={classes})"
    else:
        imports, size = ["import timm"], backbone.img_size
        extra = f", img_size={size}" if size is not None and takes_size(backbone) else ""
        made = f"timm.create_model({backbone.name!r}, num_classes={classes}{extra})"
    load = f"model.load_state_dict(load_file({str(path)!r}))"
    return "; ".join([*imports, "from safetensors.torch import load_file", f"model = {made}", load])
