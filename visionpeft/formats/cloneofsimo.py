"""LoRA files of cloneofsimo/lora: a pickled list of tensors, up and down in turn, in the order of the modules.

    x.pt                [up (out, r), down (r, in), ...] of every Linear inside `Attention` and `GEGLU` of the UNet
    x.text_encoder.pt   the same of every Linear inside `CLIPAttention`

The list has no names: it fits a model whose modules come in the same order, and all of these Linears are in it. Those
that are not adapted are written as zeros. Opened with weights_only, so that nothing in it runs.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visionpeft.binding import base_class
from visionpeft.errors import FormatError
from visionpeft.formats import common
from visionpeft.formats.common import LowRank
from visionpeft.sites import Backbone
from visionpeft.tuner import Tuner

_OWNERS = {"unet": ("CrossAttention", "Attention", "GEGLU"), "text_encoder": ("CLIPAttention",)}


def save(tuner: Tuner, path: str | Path) -> None:
    """Write the UNet's list to `path`, and the text encoder's beside it if it is adapted.

    Raises:
        FormatError: a module outside the list is adapted, or not by a change of low rank.
    """
    found = {c.path: c for c in common.changes(tuner) if isinstance(c, LowRank)}
    common.tell_growth(tuner, found.values())
    places = _places(tuner.backbone)
    listed = {p for paths in places.values() for p in paths}
    if outside := [p for p in found if p not in listed]:
        raise FormatError(f"{outside[0]}: not in the list of this format, which has no names: Linears of attention and "
                          "GEGLU in a UNet, of attention in a CLIP text encoder")  # fmt: skip
    rank = max(c.rank for c in found.values())
    for part, paths in places.items():
        if any(p in found for p in paths):
            pairs = [_padded(found.get(p), tuner.backbone.module(p), rank) for p in paths]
            torch.save([t for pair in pairs for t in pair], _file(path, part))


def _file(path: str | Path, part: str) -> Path:
    path = Path(path)
    return path if part == "unet" else path.with_suffix(f".text_encoder{path.suffix}")


def _places(backbone: Backbone) -> dict[str, list[str]]:
    """Paths of the Linears of each list, in the order of the modules."""
    found: dict[str, list[str]] = {}
    for name, root in backbone.roots.items():
        part = name or common.component(root)
        prefix = f"{name}." if name else ""
        for path, owner in root.named_modules():
            if base_class(owner).__name__ not in _OWNERS.get(part, ()):
                continue
            linears = [p for p, m in owner.named_modules() if isinstance(m, nn.Linear)]
            found.setdefault(part, []).extend(f"{prefix}{path}.{p}" for p in linears)
    return found


def _padded(change: LowRank | None, module: nn.Module, rank: int) -> tuple[Tensor, Tensor]:
    out, width = module.weight.shape  # type: ignore[union-attr, misc]
    up, down = torch.zeros(int(out), rank), torch.zeros(rank, int(width))
    if change is not None:
        up[:, : change.rank], down[: change.rank] = change.up, change.down
    return up, down


def load(model: Any, path: str | Path, name: str | None = None, *, probe: bool = True) -> Tuner:
    """Attach the list in `path`, and the text encoder's if it lies beside it and the model has one.

    Raises:
        FormatError: the list is not as long as the model has places, or a pair does not fit its place.
    """
    backbone = Backbone(model)
    changes: list[LowRank] = []
    for part, paths in _places(backbone).items():
        file = _file(path, part)
        if part == "unet" or file.exists():
            changes += _changes(_read(file), paths, file)
    return common.attach(model, changes, name, path, probe)


def _changes(tensors: Sequence[Tensor], paths: Sequence[str], file: Path) -> list[LowRank]:
    if len(tensors) != 2 * len(paths):
        raise FormatError(f"{file}: {len(tensors) // 2} pairs, and the model has {len(paths)} places for them")
    pairs = zip(paths, tensors[0::2], tensors[1::2], strict=True)
    return [common.low_rank(p, down.detach(), up.detach(), 1.0) for p, up, down in pairs]


def _read(file: Path) -> list[Tensor]:
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise FormatError(f"{file}: no list of tensors can be read from it ({error})") from error
    if not isinstance(found, list) or not all(isinstance(t, Tensor) for t in found):
        raise FormatError(f"{file}: not a list of tensors")
    return found
