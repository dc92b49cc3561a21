"""Classification sets of torchvision by class name, downloaded below `root` if torchvision can and they are absent."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np

from visionpeft.data.images import to_rgb
from visionpeft.data.sets import ImageSet, Splits
from visionpeft.data.splitting import complete
from visionpeft.errors import DataError, require

# Names of (train, val, test) where the class has a `split` argument with other names than train and test.
SPLITS = {
    "Country211": ("train", "valid", "test"),
    "CLEVRClassification": ("train", None, "val"),
    "DTD": ("train", "val", "test"),
    "FGVCAircraft": ("train", "val", "test"),
    "Flowers102": ("train", "val", "test"),
    "ImageNet": ("train", None, "val"),
    "Imagenette": ("train", None, "val"),
    "OxfordIIITPet": ("trainval", None, "test"),
    "PCAM": ("train", "val", "test"),
    "RenderedSST2": ("train", "val", "test"),
}
LABELS = ("targets", "labels", "_labels", "y", "_samples", "samples")


@dataclass(frozen=True)
class TorchvisionSource:
    """The images of a torchvision data set."""

    dataset: Any
    name: str

    def __len__(self) -> int:
        return len(self.dataset)

    def image(self, index: int) -> Any:
        try:
            return to_rgb(self.dataset[index][0])
        except Exception as error:  # its loaders raise what Pillow, HDF5 or the file system raises
            raise DataError(f"{self.path(index)}: cannot read this image ({error})") from error

    def path(self, index: int) -> str:
        return f"{self.name}[{index}]"


def load_torchvision(name: str, root: str, seed: int = 0) -> Splits:
    """`torchvision.datasets.<name>` with its own splits; missing ones are held out as `splitting.complete` says.

    Raises:
        DataError: no such class, it cannot be built or downloaded, or its labels are not one whole number per image.
    """
    datasets = require("torchvision.datasets", extra="train")
    factory = getattr(datasets, name, None)
    base = datasets.VisionDataset
    if not (inspect.isclass(factory) and issubclass(factory, base) and factory is not base):
        raise DataError(f"torchvision.datasets has no data set {name!r}; names are like CIFAR10, Flowers102, EuroSAT")
    built = {part: _build(factory, root, extra) for part, extra in _parts(factory).items()}
    parts = {part: ImageSet(TorchvisionSource(d, f"{name}/{part}"), _labels(d, name)) for part, d in built.items()}
    classes = _classes(built["train"], parts["train"])
    return complete(name, classes, parts["train"], parts.get("val"), parts.get("test"), seed=seed)


def _parts(factory: Any) -> dict[str, dict[str, Any]]:
    """The arguments that choose each part."""
    arguments = inspect.signature(factory).parameters
    if "train" in arguments:
        return {"train": {"train": True}, "test": {"train": False}}
    if "split" not in arguments:
        return {"train": {}}
    names = SPLITS.get(factory.__name__, ("train", None, "test"))
    return {part: {"split": name} for part, name in zip(("train", "val", "test"), names, strict=True) if name}


def _build(factory: Any, root: str, extra: dict[str, Any]) -> Any:
    arguments = inspect.signature(factory).parameters
    where = {"root": root} if "root" in arguments else {}
    download = {"download": True} if "download" in arguments else {}
    try:
        return factory(**where, **extra, **download)
    except Exception as error:  # download, checksum, missing scipy, wrong folder: all end here
        raise DataError(f"torchvision.datasets.{factory.__name__} in {root}: {error}") from error


def _labels(dataset: Any, name: str) -> np.ndarray:
    known = [getattr(dataset, key, None) for key in LABELS]
    found = next((v for v in known if v is not None and len(v) == len(dataset)), None)
    if found is None:
        found = [dataset[i][1] for i in range(len(dataset))]
    if isinstance(found, list) and found and isinstance(found[0], tuple):
        found = [pair[1] for pair in found]
    labels = np.asarray(found)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(f"torchvision's {name} does not have one whole number per image as label; "
                        "export it as a folder or a csv table")
    return labels.astype(np.int64)


def _classes(dataset: Any, images: ImageSet) -> list[str]:
    names = getattr(dataset, "classes", None) or getattr(dataset, "categories", None)
    count = int(images.labels.max()) + 1
    return [str(c) for c in names] if names and len(names) >= count else [str(c) for c in range(count)]
