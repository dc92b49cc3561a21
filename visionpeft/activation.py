"""Which adapters act, and which trainable copies stand in the model.

Adapters in modules act by name: every holder carries the names that do. Tensors that learn in place need more: at any
time one tensor stands in the module, the original or somebody's copy, and all the others wait in the holder.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from visionpeft import binding
from visionpeft.adapter import Forgiving
from visionpeft.errors import VisionPEFTError
from visionpeft.sites import Backbone

if TYPE_CHECKING:
    from visionpeft.tuner import Tuner

REGISTRY = "_visionpeft"  # attribute of the roots
LEARNT = "learnt"  # key of the copies that wait, beside the places of the adapters


class Registry:
    """What is kept about one whole model, as an attribute of its roots.

    Attributes:
        roots: the components that were attached to together.
        tuners: name -> tuner, in the order of attaching.
        order: names of the active ones, in the order in which they act.
        requires_grad: the flags of all parameters before the first adapter came.
        fused: whether Linears use the fused function, see `Tuner.fused`.
        training: for BatchNorms that were frozen: their own mode and that of the root, before.
    """

    def __init__(self, roots: Mapping[str, nn.Module]) -> None:
        self.roots = dict(roots)
        self.tuners: dict[str, Tuner] = {}
        self.order: tuple[str, ...] = ()
        self.fused = True
        self.requires_grad: dict[tuple[str, str], bool] = {}
        self.training: dict[str, tuple[bool, bool]] = {}


class Learnt(Forgiving):
    """Trainable copies of a module's tensors while they do not stand in the module."""


def known(backbone: Backbone) -> Registry | None:
    """What is kept about this model, for whoever has had it checked by `registry`, which looks at every module."""
    return next(iter(backbone.roots.values())).__dict__.get(REGISTRY)


def registry(backbone: Backbone) -> Registry | None:
    """What is kept about this model, None if nothing is attached.

    Raises:
        VisionPEFTError: adapters were attached through another root, a part of this model or a model around it.
    """
    own = [root.__dict__.get(REGISTRY) for root in backbone.roots.values()]
    found = known(backbone)
    same = found is None or list(found.roots.values()) == list(backbone.roots.values())
    if not same or any(r is not found for r in own):
        raise VisionPEFTError(
            "adapters were attached to other components together with some of these: use the same ones"
        )
    names = set(found.tuners) if found else set()
    for root in backbone.roots.values():
        for path, _, held in binding.holders(root):
            strangers = {name for name in held.users if name not in names and not name.startswith(binding.SAMPLES)}
            if strangers:
                raise VisionPEFTError(
                    f"{', '.join(map(repr, strangers))} at {path or 'the root'} came through another "
                    "root, a part of this model or one around it: attach, load and activate through that one"
                )
    return found


def tuners(model: Any) -> dict[str, Tuner]:
    """All adapters of a model by name, in the order of attaching."""
    found = registry(Backbone(model))
    return dict(found.tuners) if found else {}


def activate(model: Any, which: Mapping[str, float] | Sequence[str | None] | str) -> None:
    """Say which adapters act from now on: by name with their strength, or one for each sample of the next batches.

    Args:
        which: {"cat": 0.7, "ink": 0.5} or "cat"; all others rest. A list names one adapter for each sample of the
            next batches, classifiers included, None for the bare model: see `visionpeft.batches`.

    Raises:
        VisionPEFTError: an unknown name, or two active adapters that bring different classifiers.
    """
    backbone = Backbone(model)
    there = tuners(model)
    if isinstance(which, str):
        which = {which: 1.0}
    if not isinstance(which, Mapping):
        from visionpeft.batches import activate_samples

        return activate_samples(backbone, which)
    unknown = [name for name in which if name not in there]
    if unknown:
        raise VisionPEFTError(f"no adapter named {', '.join(unknown)}; there are: {', '.join(there) or 'none'}")
    set_active(backbone, [(there[name], float(strength)) for name, strength in which.items()])


@torch.inference_mode(False)
def set_active(backbone: Backbone, wanted: Sequence[tuple[Tuner, float]]) -> None:
    """Make exactly these act, in this order, for all samples. Refuses before anything changes."""
    found = known(backbone)
    if found is None:
        return
    strengths = {tuner.name: strength for tuner, strength in wanted}
    for tuner in found.tuners.values():
        if tuner.merged is not None and strengths.get(tuner.name) != tuner.scale:
            raise VisionPEFTError(f"{tuner.name!r} is merged: unmerge it before it can rest or change its strength")
    _check_merged(found, [tuner for tuner, _ in wanted])
    for tuner, strength in wanted:
        tuner.check_strength(strength)
    _check_there([tuner for tuner, _ in wanted])
    _check_shared([tuner for tuner, _ in wanted])
    check_offloaded(backbone)
    release_samples(backbone)
    found.order = tuple(strengths)
    for tuner in found.tuners.values():
        tuner.active = tuner.name in strengths
    for tuner, strength in wanted:
        tuner.set_strength(strength)
    _refresh(backbone, found)


def refresh(backbone: Backbone) -> None:
    """Tell every holder who acts now, and put the tensors that should stand in their places."""
    if (found := known(backbone)) is not None:
        _refresh(backbone, found)


def _refresh(backbone: Backbone, found: Registry) -> None:
    names = tuple(name for name in found.order if found.tuners[name].merged is None)
    thawed = any(not found.tuners[name].method.freezes_statistics for name in found.order)
    keeps = any(found.tuners[name].memory == "keep" for name in found.order)
    route = "plain" if not found.fused else "keep" if keeps else "rebuild"
    _settle_all(backbone, found)
    for root in backbone.roots.values():
        for _, module, held in binding.holders(root):
            held.act(names, route)
            held.__dict__["thawed"] = thawed or "running_mean" in held.live  # of a classifier that learns
            binding.throw_switches(module, held, names)
            if isinstance(module, binding.FrozenStatistics):
                module.training = held.thawed and root.training


def release_samples(backbone: Backbone) -> None:
    """Back to the same adapters for all samples."""
    for root in backbone.roots.values():
        held = binding.holder(root)
        if held is None or held.samples is None:
            continue
        held.samples = held.backbone = None
        binding.release(root, binding.SAMPLES)
        for _, _, held in binding.holders(root):
            held.mixed = False


def _check_there(wanted: Sequence[Tuner]) -> None:
    for tuner in wanted:
        for path, _ in tuner.in_place:
            if binding.holder(tuner.backbone.module(path)) is None:
                raise _replaced(path)


def _replaced(path: str) -> VisionPEFTError:
    return VisionPEFTError(f"{path or 'the root'} was replaced since an adapter was attached: detach it, attach again")


def _check_merged(found: Registry, wanted: Sequence[Tuner]) -> None:
    """Where one adapter is merged, no other can act before it, and no other's copy of a tensor can stand."""
    for merged in (t for t in found.tuners.values() if t.merged is not None):
        before = [t for t in wanted[: wanted.index(merged)] if t.merged is None] if merged in wanted else []
        for other in before:
            if here := {site.path for site in merged.adapters} & {site.path for site in other.adapters}:
                raise VisionPEFTError(f"{merged.name!r} is merged, so that it acts before {other.name!r} at "
                                      f"{min(here)}: name it first, or unmerge it")
        written = {(id(w.module), w.name) for w in merged.merged or ()}
        for other in wanted:
            for path, name in other.in_place if other is not merged else ():
                if (id(other.backbone.module(path)), name) in written:
                    raise VisionPEFTError(
                        f"{merged.name!r} is merged into {path}.{name}, of which {other.name!r} brings a copy: unmerge "
                        "it first"
                    )


def _check_shared(wanted: Sequence[Tuner]) -> None:
    """Two adapters may bring the same `train=` tensor only if it holds the same numbers."""
    owners: dict[tuple[str, str], Tuner] = {}
    for tuner in wanted:
        for key in tuner.trained:
            other = owners.setdefault(key, tuner)
            if other is not tuner and not torch.equal(other.learnt(*key), tuner.learnt(*key)):
                path = ".".join(part for part in key if part)
                raise VisionPEFTError(
                    f"{other.name!r} and {tuner.name!r} each bring their own {path}, "
                    f"{tuple(other.learnt(*key).shape)} and {tuple(tuner.learnt(*key).shape)}: they cannot act "
                    "together. Activate one of them, or one per sample"
                )


def check_offloaded(backbone: Backbone) -> None:
    """What learns in place is exchanged by moving tensors, and accelerate would bring back those that it put away."""
    for tuner in found.tuners.values() if (found := known(backbone)) is not None else ():
        for path, name in tuner.in_place:
            if binding.offloaded(backbone.module(path)):
                raise VisionPEFTError(
                    f"{path}.{name}, which {tuner.name!r} brings a copy of, is offloaded module by module: who acts "
                    "cannot change. Remove the hooks first (accelerate.hooks.remove_hook_from_module(model, "
                    "recurse=True), pipe.remove_all_hooks()), and offload again afterwards"
                )


def settle(backbone: Backbone) -> None:
    """Put the tensor that should stand in each module in its place."""
    if (found := known(backbone)) is not None:
        _settle_all(backbone, found)


def _settle_all(backbone: Backbone, found: Registry) -> None:
    everyone = list(found.tuners.values())
    keys = dict.fromkeys(key for tuner in everyone for key in tuner.in_place)
    for path, name in keys:
        owners = [t for t in everyone if t.active and (path, name) in t.in_place]
        _settle(backbone.module(path), path, name, owners, everyone)


def _settle(module: nn.Module, path: str, name: str, owners: list[Tuner], everyone: list[Tuner]) -> None:
    held = binding.holder(module)
    if held is not None and any(f"{t.name}.{name}" in held.aside for t in everyone if t.merged is not None):
        return  # merged into what stands there
    if held is None and not owners:
        return  # replaced by its owner, and nobody of ours acts there
    if held is None:
        raise _replaced(path)
    if name in held.live:  # back to where it waits
        owner = held.live.pop(name)
        put_waiting(held, owner, name, binding.get_tensor(module, name))
        binding.put_back(module, name)
    elif name in held.aside:  # a blend: nobody's copy
        binding.put_back(module, name)
    if not owners:
        return
    binding.set_aside(module, name)
    whole = [t for t in owners if (path, name) in t.trained]  # all equal, see _check_shared
    alone = whole[:1] or [t for t in owners if len(owners) == 1 and t.scale == 1]
    if alone:
        held.live[name] = alone[0].name
        value = take_waiting(held, alone[0].name, name)
    else:
        if torch.is_grad_enabled():
            warnings.warn(
                f"{path}.{name} stands blended and learns nothing: at a scale other than 1, and where two adapters "
                "bring the same tensor, what learns in place is frozen",
                stacklevel=2,
            )
        value = _blend(binding.original(module, name), held, name, owners)
    binding.set_tensor(module, name, value)


@torch.no_grad()
def _blend(base: Tensor | None, held: binding.Holder, name: str, owners: list[Tuner]) -> Tensor:
    """base + sum of strength * (copy - base), frozen; a counter is taken whole from the last owner."""
    assert base is not None
    if not base.is_floating_point():
        return waiting(held, owners[-1].name, name).detach().clone()
    value = base.detach().clone()
    for tuner in owners:
        value += tuner.scale * (waiting(held, tuner.name, name).detach() - base)
    return nn.Parameter(value, requires_grad=False) if isinstance(base, nn.Parameter) else value


def waiting(held: binding.Holder, owner: str, name: str) -> Tensor:
    box = held._modules[owner][LEARNT]  # type: ignore[index]
    return box._parameters[name] if name in box._parameters else box._buffers[name]


def put_waiting(held: binding.Holder, owner: str, name: str, value: Tensor | None) -> None:
    box: nn.Module = held._modules[owner][LEARNT]  # type: ignore[index]
    (box._parameters if isinstance(value, nn.Parameter) else box._buffers)[name] = value  # type: ignore[assignment]


def take_waiting(held: binding.Holder, owner: str, name: str) -> Tensor:
    box: nn.Module = held._modules[owner][LEARNT]  # type: ignore[index]
    return (box._parameters if name in box._parameters else box._buffers).pop(name)  # type: ignore[return-value]
