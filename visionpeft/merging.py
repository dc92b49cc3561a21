"""Writing adapters into weights, and back to the bit.

A merged weight is a new Parameter; the original waits in the holder, for W + D - D would restore only part of it. Who
switches to and fro among merged adapters can have the merged weights kept as well: then it is a change of pointers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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


Key = tuple[nn.Module, str]  # module and name of one of its tensors


class Written(NamedTuple):
    """One tensor that merging replaced, with what tells whether it was touched since."""

    module: nn.Module
    name: str
    merged: Tensor | None
    version: int


class Kept(NamedTuple):
    """Merged tensors, and all they were computed from, which tells whether they still hold when put in again.

    The adapter's own tensors are compared by value, for they are small; weights by their storage and version.
    """

    merged: dict[Key, nn.Parameter | None]
    originals: dict[Key, tuple[Tensor, int] | None]
    adapter: dict[str, Tensor]
    scale: float

    @classmethod
    def of(cls, tuner: Tuner, merged: dict[Key, nn.Parameter | None]) -> Kept:
        own = {key: value.clone() for key, value in tuner.state_dict().items()}
        return cls(merged, {key: _state(*key) for key in merged}, own, tuner.scale)

    def holds(self, tuner: Tuner) -> bool:
        if self.scale != tuner.scale or not all(_untouched(*key, was) for key, was in self.originals.items()):
            return False
        own = tuner.state_dict()
        return own.keys() == self.adapter.keys() and all(_same(own[key], was) for key, was in self.adapter.items())


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and not a.is_meta and torch.equal(a, b)


def _state(module: nn.Module, name: str) -> tuple[Tensor, int] | None:
    """A tensor's storage, held so that no other can come to its address, and its version."""
    tensor = module._parameters.get(name)
    return None if tensor is None else (tensor.detach(), tensor._version)


def _untouched(module: nn.Module, name: str, was: tuple[Tensor, int] | None) -> bool:
    now = _state(module, name)
    return now is was if now is None or was is None else now[0].is_set_to(was[0]) and now[1] == was[1]


def merge(tuner: Tuner, keep: bool = False) -> None:
    if tuner.merged is not None:
        return
    if not tuner.active:
        raise MergeError(f"{tuner.name!r} is resting: activate it before merging, so that what merges is what acted")
    if tuner.memory == "reversible":
        raise MergeError(f"{tuner.name!r} is attached as memory=\"reversible\", which is no change of weights")
    tuner.check_wrappers()
    _check_sites(tuner)  # refuses here, before anything changes
    holds = tuner.kept is not None and tuner.kept.holds(tuner)
    merged = tuner.kept.merged if holds else _merged_tensors(tuner)
    _check_live(tuner, merged)
    if keep and not holds:
        tuner.kept = Kept.of(tuner, merged)
    elif not keep:
        tuner.kept = None
    written = []
    for (module, name), value in merged.items():
        original = module._parameters[name]
        written.append(Written(module, name, value, 0 if value is None else value._version))
        held = binding.grip(module, tuner.name)
        held.aside[f"{tuner.name}.{name}"] = original
        module._parameters[name] = value
    tuner.merged = written
    for module, held in _holders(tuner):
        held.hidden = (*held.hidden, tuner.name)
        binding.undress(module, tuner.name)
    activation.refresh(tuner.backbone)


def _holders(tuner: Tuner) -> Iterator[tuple[nn.Module, binding.Holder]]:
    """Every module with something of this tuner, once."""
    inside = [tuner.backbone.module(path) for path, _ in tuner.in_place]
    for module in dict.fromkeys([module for module, _ in tuner.bindings] + inside):
        held = binding.holder(module)
        if held is not None and tuner.name in held.users:
            yield module, held


def _check_sites(tuner: Tuner) -> None:
    for site, adapter in tuner.adapters.items():
        if site.kind == "shared":
            continue  # in what its users write
        if not adapter.overrides("weight"):
            adapter.weight(torch.empty(0), None)  # says why not
        host = tuner.backbone.module(site.host_path)
        _check_alone(tuner, site, host)
        place = _place(site, adapter, host)
        _check_weight(place.module, place.weight, site)


@torch.no_grad()
@torch.inference_mode(False)
def _merged_tensors(tuner: Tuner) -> dict[Key, nn.Parameter | None]:
    tensors: dict[Key, Tensor | None] = {}
    for site, adapter in tuner.adapters.items():
        if site.kind == "shared":
            continue
        module, weight, bias, rows, b_rows, transposed = _place(site, adapter, tuner.backbone.module(site.host_path))
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
    return {key: None if w is None else nn.Parameter(w, requires_grad=False) for key, w in tensors.items()}


def _check_live(tuner: Tuner, tensors: Iterable[Key]) -> None:
    for module, name in tensors:
        held = binding.holder(module)
        if held is not None and held.live.get(name, tuner.name) != tuner.name:
            raise MergeError(
                f"{name} of a {type(module).__name__} is {held.live[name]!r}'s own trainable copy: a merged one would "
                "be saved in its stead. Detach that adapter first, or leave the site out of targets"
            )


def _check_weight(module: nn.Module, name: str, site: Site) -> None:
    weight = module._parameters.get(name)
    if weight is None:
        raise MergeError(
            f"{site}: the weight is computed from others (parametrize, weight_norm): nothing to merge into"
        )
    if type(weight.data).__name__ == "DTensor":
        raise MergeError(f"{site}: the weight is sharded (FSDP2): merge in a model that is not")


def _place(site: Site, adapter: Adapter, host: nn.Module) -> hosts.Place:
    if site.host:
        return hosts.place(host, adapter.place)
    rows = slice(*site.rows) if site.rows else slice(None)
    return hosts.Place(host, "weight", "bias", rows, rows)


def _check_alone(tuner: Tuner, site: Site, host: nn.Module) -> None:
    """Adapters act in the order of activation: only the first at a site may go into the weight."""
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
        binding.grip(module, tuner.name, *mixins)
    for _, held in _holders(tuner):
        held.hidden = tuple(n for n in held.hidden if n != tuner.name)
    activation.refresh(tuner.backbone)
