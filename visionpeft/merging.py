"""Writing adapters into weights, and back to the bit.

A merged weight is a new Parameter; the original waits in the holder, for W + D - D would restore only part of it.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from visionpeft import acting, activation, binding, hosts
from visionpeft.adapter import Adapter
from visionpeft.errors import MergeError, VisionPEFTError
from visionpeft.sites import Site

if TYPE_CHECKING:
    from visionpeft.tuner import Tuner


class Written(NamedTuple):
    """One tensor that merging replaced, with what tells whether it was touched since."""

    module: nn.Module
    name: str
    merged: Tensor | None
    version: int


def merge(tuner: Tuner) -> None:
    if tuner.merged is not None:
        return
    if not tuner.active:
        raise MergeError(f"{tuner.name!r} is resting: activate it before merging, so that what merges is what acted")
    if tuner.memory == "reversible":
        raise MergeError(f"{tuner.name!r} is attached as memory=\"reversible\", which is no change of weights")
    tuner.check_wrappers()
    tensors = _merged_tensors(tuner)  # refuses here, before anything changes
    written = []
    for (module, name), value in tensors.items():
        original = module._parameters[name]
        merged = None if value is None else nn.Parameter(value, requires_grad=False)
        written.append(Written(module, name, merged, 0 if merged is None else merged._version))
        held = binding.grip(module, tuner.name)
        held.aside[f"{tuner.name}.{name}"] = original
        module._parameters[name] = merged
    tuner.merged = written
    for root in tuner.backbone.roots.values():
        for _, module, held in binding.holders(root):
            if tuner.name in held.users:
                held.hidden = (*held.hidden, tuner.name)
                binding.undress(module, tuner.name)
    activation.refresh(tuner.backbone)


@torch.no_grad()
@torch.inference_mode(False)
def _merged_tensors(tuner: Tuner) -> dict[tuple[nn.Module, str], Tensor | None]:
    tensors: dict[tuple[nn.Module, str], Tensor | None] = {}
    for site, adapter in tuner.adapters.items():
        if site.kind == "shared":
            continue  # in what its users write
        if not adapter.overrides("weight"):
            adapter.weight(torch.empty(0), None)  # says why not
        _check_alone(tuner, site)
        module, weight, bias, rows, b_rows, transposed = _place(tuner, site, adapter)
        _check_weight(module, weight, site)
        w = tensors.get((module, weight), module._parameters[weight])
        b = tensors.get((module, bias), module._parameters.get(bias))
        assert w is not None
        try:
            with torch.autocast(w.device.type, enabled=False) if not w.is_meta else nullcontext():
                w, b = acting.adapted(adapter, w.t() if transposed else w, b, rows, b_rows)
                w = w.t().contiguous() if transposed else w
        except VisionPEFTError as error:
            raise MergeError(str(error)) from error
        tensors[module, weight] = w
        if bias in module._parameters and b is not module._parameters[bias]:
            tensors[module, bias] = b
    for module, name in tensors:
        held = binding.holder(module)
        if held is not None and held.live.get(name, tuner.name) != tuner.name:
            raise MergeError(
                f"{name} of a {type(module).__name__} is {held.live[name]!r}'s own trainable copy: a merged one would "
                "be saved in its stead. Detach that adapter first, or leave the site out of targets"
            )
    return tensors


def _check_weight(module: nn.Module, name: str, site: Site) -> None:
    weight = module._parameters.get(name)
    if weight is None:
        raise MergeError(
            f"{site}: the weight is computed from others (parametrize, weight_norm): nothing to merge into"
        )
    if type(weight.data).__name__ == "DTensor":
        raise MergeError(f"{site}: the weight is sharded (FSDP2): merge in a model that is not")


def _place(tuner: Tuner, site: Site, adapter: Adapter) -> hosts.Place:
    if site.host:
        return hosts.place(tuner.backbone.module(site.host_path), adapter.place)
    module = tuner.backbone.module(site.path)
    rows = slice(*site.rows) if site.rows else slice(None)
    return hosts.Place(module, "weight", "bias", rows, rows)


def _check_alone(tuner: Tuner, site: Site) -> None:
    """Adapters act in the order of activation: only the first at a site may go into the weight."""
    host = tuner.backbone.module(site.host_path)
    held = binding.holder(host)
    assert held is not None
    acting = [n for n in held.active if set(getattr(held._modules.get(n), "_modules", ())) - {activation.LEARNT}]
    first = acting[0] if acting else None
    if first not in (None, tuner.name):
        raise MergeError(f"{first!r} acts before {tuner.name!r} at {site}: merge {first!r} first, or let it rest")


def unmerge(tuner: Tuner) -> None:
    if tuner.merged is None:
        return
    for w in tuner.merged:
        now = w.module._parameters[w.name]
        if now is not w.merged or (now is not None and now._version != w.version):
            raise MergeError(
                f"{w.name} of a {type(w.module).__name__} was written or replaced since {tuner.name!r} was merged: "
                "the original cannot be restored without losing that change"
            )
    for w in tuner.merged:
        held = binding.holder(w.module)
        assert held is not None
        w.module._parameters[w.name] = held.aside.pop(f"{tuner.name}.{w.name}")  # type: ignore[assignment]
    tuner.merged = None
    for module, mixins in tuner.bindings:
        held = binding.grip(module, tuner.name, *mixins)
    for root in tuner.backbone.roots.values():
        for _, _, held in binding.holders(root):
            held.hidden = tuple(n for n in held.hidden if n != tuner.name)
    activation.refresh(tuner.backbone)
