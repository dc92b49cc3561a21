"""LyCORIS files: LoKr (KronA), LoRA.

    lycoris_<path>.lokr_w1 (a1, a2)   .lokr_w2 (b1, b2)   .alpha ()      lora_unet_<path>, lora_te_<path> in pipelines

LyCORIS finds the shapes of both factors from one number, so that it reads a1 = a2 only; so do PEFT and diffusers'
`unet.load_lora_adapter` (which wants `prefix=None` and no alpha: `as_diffusers=True`). Readers that take the Kronecker
product of whatever is there (ComfyUI) read any: `any_shape=True`. With both factors whole the scale is 1 whatever
alpha says; it is in w2.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visionpeft.errors import FormatError
from visionpeft.formats import common, kohya
from visionpeft.formats.common import Change, Kron
from visionpeft.sites import Backbone
from visionpeft.tuner import Tuner

_LOKR = ("lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b")
_LORA = ("lora_down.weight", "lora_up.weight")


def save(tuner: Tuner, path: str | Path, *, any_shape: bool = False, as_diffusers: bool = False) -> None:
    """Write one file: for `create_lycoris_from_weights` if the tuner is on one module, else under sd-scripts' names.

    Args:
        any_shape: also write a1 != a2, for readers that do not ask for the shape.
        as_diffusers: keys `<path>.lokr_w1` without alpha, for `unet.load_lora_adapter(..., prefix=None)`; of a tuner
            on a pipeline `unet.<path>.lokr_w1`, for `prefix="unet"`.

    Raises:
        FormatError: a1 != a2, which LyCORIS would read wrongly; or something that is no change of a weight.
    """
    found = common.changes(tuner, kron=True)
    if as_diffusers and len(parts := {tuner.backbone.split(c.path)[0] for c in found}) > 1:
        raise FormatError(f"{tuner.name!r} is on {', '.join(sorted(parts))}, and load_lora_adapter is for one module")
    if set(tuner.backbone.roots) != {""} and not as_diffusers:
        kohya.refuse_transformers(tuner.backbone)
    names = _names(tuner.backbone, as_diffusers)
    tensors: dict[str, Tensor] = {}
    for change in found:
        if isinstance(change, Kron) and not any_shape:
            _readable(change)
        tensors |= {f"{names[change.path]}.{k}": v for k, v in _tensors(change, as_diffusers).items()}
    ranks = {c.rank if isinstance(c, common.LowRank) else 1 for c in found}
    common.write(path, tensors, kohya.header(tuner.backbone, Path(path).stem, "lycoris.kohya", ranks))


def _readable(change: Kron) -> None:
    (a1, a2), (b1, b2) = change.w1.shape, change.w2.shape
    if a1 != a2 or a1 > min(b1, b2):
        raise FormatError(
            f"{change.path}: LyCORIS, PEFT and diffusers take one factor for rows and columns, at most as large as "
            f"what is left, and A is {a1} x {a2} beside {b1} x {b2}: train with a1 = a2 (16, 16 has as many numbers as "
            "4, 64 on SDXL), write an exact LoRA (formats.diffusers or kohya), or give any_shape=True for readers "
            "that multiply whatever is there, as ComfyUI does"
        )


def _tensors(change: Change, as_diffusers: bool) -> dict[str, Tensor]:
    if isinstance(change, Kron):
        found = {"lokr_w1": change.w1, "lokr_w2": change.w2}
        return found if as_diffusers else found | {"alpha": torch.tensor(1.0)}
    if as_diffusers:
        raise FormatError(f"{change.path}: a LoRA goes to formats.diffusers")
    up = change.up.view(*change.up.shape, *[1] * (change.down.dim() - 2))
    return {"lora_down.weight": change.down, "lora_up.weight": up, "alpha": torch.tensor(float(change.rank))}


def _names(backbone: Backbone, as_diffusers: bool) -> Mapping[str, str]:
    if as_diffusers:
        return {path: path for path in common.names(backbone)}
    if set(backbone.roots) == {""}:
        return {path: f"lycoris_{path.replace('.', '_')}" for path in common.names(backbone)}
    return kohya.flat_names(backbone)


# ---- in -------------------------------------------------------------------------------------------------------------


def load(model: Any, path: str | Path, name: str | None = None, *, probe: bool = True) -> Tuner:
    """Attach a LyCORIS file. LoKr of one shape comes as KronA, of several or with factors of low rank as exact LoRA.

    Raises:
        FormatError: LoHa, OFT, DoRA, Tucker factors and what else is no change of low rank; or another model's.
    """
    tensors, _ = common.read(path)
    found = common.by_module(tensors, (*_LOKR, *_LORA, "alpha"), path)
    backbone = Backbone(model)
    where: dict[str, str | tuple[str, ...]] = {own: own for own in common.names(backbone)}
    where |= kohya.flat_paths(backbone)
    where |= {f"lycoris_{own.replace('.', '_')}": own for own in common.names(backbone)}
    where |= {".".join(name): own for own, name in common.names(backbone).items()} | common.by_rest(backbone)
    located = common.located(found, where, path)
    return common.attach(model, [_change(own, found[m], path) for m, own in located.items()], name, path, probe)


def _change(own: str, parts: Mapping[str, Tensor], path: str | Path) -> Change:
    if "lora_down.weight" in parts:
        down, up = parts["lora_down.weight"], parts["lora_up.weight"]
        return common.low_rank(own, down, up, kohya._scale(parts, down.shape[0]))
    (w1, r1), (w2, r2) = (_factor(own, parts, w, path) for w in ("lokr_w1", "lokr_w2"))
    rank = r2 or r1
    scale = float(parts["alpha"]) / rank if rank and "alpha" in parts else 1.0
    return Kron(own, w1, w2 * scale)


def _factor(own: str, parts: Mapping[str, Tensor], name: str, path: str | Path) -> tuple[Tensor, int]:
    """A factor and the rank that it was written with, 0 if it is whole."""
    if name in parts:
        whole, rank = parts[name].float(), 0
    elif f"{name}_a" in parts and f"{name}_b" in parts:
        a, b = parts[f"{name}_a"].float(), parts[f"{name}_b"].float()
        whole, rank = a @ b, b.shape[0]
    else:
        raise FormatError(f"{path}: {own} lacks {name}")
    if whole.dim() != 2:
        raise FormatError(f"{path}: {own} is a LoKr of a conv with a kernel, which KronA does not adapt")
    return whole, rank
