"""Attaching a method to a model, and taking it off again without a trace."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visionpeft import acting, activation, backbones, binding, hosts, levers
from visionpeft.activation import LEARNT, Learnt, Registry
from visionpeft.adapter import Adapter, Method
from visionpeft.errors import SiteError, VisionPEFTError
from visionpeft.methods import METHODS
from visionpeft.sites import Backbone, Site, kind_of
from visionpeft.targets import trained_tensors
from visionpeft.tuner import Tuner


@torch.inference_mode(False)
def attach(
    model: Any,
    method: Method | type[Method] | str,
    name: str = "default",
    train: str | Sequence[str] | None = None,
    *,
    memory: str = "rebuild",
    probe: bool = True,
) -> Tuner:
    """Put a method on a model and return the handle. The model stays the same object and loses no key.

    All parameters are frozen but those that learn. Where an input can be built (timm, open_clip, transformers) the
    model is run once in train and once in eval, and an adapter that never acts is an error. A failure leaves no trace.

    Args:
        model: a module, a dict of named modules, or a diffusers pipeline.
        method: `vp.LoRA(rank=8)`, or a key of METHODS for its defaults.
        name: what this adapter is called in the model.
        train: globs of base tensors that also learn, each adapter having its own copy; "head" is the classifier.
        memory: what to keep for backward: rebuild, keep, checkpoint or reversible, see `visionpeft.levers`.
        probe: whether to look for dead adapters at once.

    Raises:
        SiteError: nothing matches, the method cannot act somewhere, or a module carries a `forward` of its own.
        DeadAdapterError: an adapter never acts.
        VisionPEFTError: the name is taken, an adapter is merged, or the model is in DDP or FSDP already.
    """
    levers.check(memory)
    backbone = Backbone(model)
    method = _method(method)
    check_name(backbone, name)
    sites = method.choose(backbone)
    check_sites(method, sites, backbone)
    if train is None and method.trains == "head" and not backbone.heads():
        warnings.warn("the model has no classifier: nothing learns. Create it with num_classes", stacklevel=2)
    elif train is None:
        train = method.trains
    trained = trained_tensors(backbone, train)
    _warn_head(backbone, sites, trained)
    kept = dataclasses.replace(method, targets=None) if callable(method.targets) else method  # lambdas do not pickle
    tuner = Tuner(backbone, kept, name, sites, memory)
    learnt = method.learns(sites, backbone)
    return bind(tuner, method.adapters(sites, backbone), learnt, trained, probe)


def bind(tuner: Tuner, adapters: dict[Site, Adapter], learnt: Iterable[tuple[str, str]],
         trained: list[tuple[str, str]], probe: bool,
         values: Mapping[tuple[str, str], Tensor] | None = None) -> Tuner:  # fmt: skip
    """Put built adapters in their places; on any failure take everything off again."""
    backbone = tuner.backbone
    _check_unwrapped(backbone)
    found = activation.registry(backbone)
    active = found.order if found else ()
    activation.release_samples(backbone)
    try:
        registry = _register(tuner)
        _freeze_statistics(tuner, registry)
        for site, adapter in adapters.items():
            tuner.adapters[site] = adapter
            _place(tuner, site, adapter)
        tuner.trained = trained
        copies: dict[int | str, Tensor] = {}
        for key in dict.fromkeys([*learnt, *trained]):
            _copy(tuner, *key, copies, (values or {}).get(key))
        levers.dress(tuner, lambda module, mixin: _dress(tuner, module, mixin))
        _activate_new(tuner, registry)
        if probe:
            from visionpeft.probing import probe_attached

            probe_attached(tuner)
    except BaseException:
        _remove(tuner)
        if found is not None:
            found.order = active
            for other in found.tuners.values():
                other.active = other.name in active
            activation.refresh(backbone)
        raise
    return tuner


def detach(tuner: Tuner) -> None:
    """Leave the model as it was before `attach`: classes, keys, Parameter objects and their flags."""
    found = activation.registry(tuner.backbone)
    if found is None or found.tuners.get(tuner.name) is not tuner:
        return
    tuner.check_wrappers()
    tuner.unmerge()
    _remove(tuner)


# ---- checks ---------------------------------------------------------------------------------------------------------


def _method(method: Method | type[Method] | str) -> Method:
    if isinstance(method, Method):
        return method
    if isinstance(method, type) and issubclass(method, Method):
        return method()
    if method not in METHODS:
        raise VisionPEFTError(f"no method {method!r}; there are: {', '.join(METHODS)}, or an object as vp.LoRA(rank=8)")
    return METHODS[method]()


def check_name(backbone: Backbone, name: str) -> None:
    found = activation.registry(backbone)
    if not name or "." in name or hasattr(binding.Holder(), name):
        raise VisionPEFTError(f"name {name!r}: expected a word without dots that no module has as an attribute")
    if found is None:
        return
    if name in found.tuners:
        raise VisionPEFTError(f"an adapter named {name!r} is attached already: give another name=, or detach it first")
    if merged := [t.name for t in found.tuners.values() if t.merged is not None]:
        raise VisionPEFTError(f"{merged[0]!r} is merged: unmerge it before attaching another")


def _check_unwrapped(backbone: Backbone) -> None:
    """Data parallelism keeps those parameters alike among its processes that it has seen."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kinds = (nn.parallel.DistributedDataParallel, *((fsdp.FSDPModule, fsdp.FullyShardedDataParallel) if fsdp else ()))
    inside = (type(module).__name__ for _, module in backbone.named_modules() if isinstance(module, kinds))
    if wrapper := backbone.wrapper or next(inside, ""):
        raise VisionPEFTError(f"the model is in {wrapper} already, whose processes would train what comes now apart "
                              "from each other: attach or load first, wrap or shard then")


def check_sites(method: Method, sites: Sequence[Site], backbone: Backbone) -> None:
    backbone.check_tower(sites, method.tower)
    refused = [(s, why) for s in sites if (why := method.refuses(s, backbone.module(s.path)))]
    if refused:
        site, why = refused[0]
        more = f" (and {len(refused) - 1} more sites)" if len(refused) > 1 else ""
        shape = "x".join(map(str, site.shape))
        raise SiteError(f"{type(method).__name__} cannot act at {site} [{site.kind} {shape}]: {why}{more}")


def _warn_head(backbone: Backbone, sites: Sequence[Site], trained: list[tuple[str, str]]) -> None:
    touched = {site.path for site in sites} | {path for path, _ in trained}
    for head in backbone.heads():
        if not any(path == head or path.startswith(head + ".") for path in touched):
            warnings.warn(
                f'the classifier {head!r} neither trains nor is adapted; give train="head" to train it', stacklevel=3
            )


# ---- binding --------------------------------------------------------------------------------------------------------


def _register(tuner: Tuner) -> Registry:
    """Enter the tuner; the first one freezes the model and notes how it was."""
    backbone = tuner.backbone
    registry = activation.registry(backbone)
    if registry is None:
        registry = Registry(backbone.roots)
        for path, module, name in backbone.named_tensors():
            param = module._parameters[name]
            assert param is not None
            registry.requires_grad.setdefault((path, name), param.requires_grad)
        for _, module, name in backbone.named_tensors():
            module._parameters[name].requires_grad_(False)  # type: ignore[union-attr]
        for root in backbone.roots.values():
            root.__dict__[activation.REGISTRY] = registry
    registry.tuners[tuner.name] = tuner
    return registry


def _freeze_statistics(tuner: Tuner, registry: Registry) -> None:
    for path, module in list(tuner.backbone.named_modules()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            root = tuner.backbone.roots[tuner.backbone.split(path)[0]]
            registry.training.setdefault(path, (module.training, root.training))
            binding.grip(module, tuner.name, binding.FrozenStatistics)
            tuner.bindings.append((module, (binding.FrozenStatistics,)))


def _place(tuner: Tuner, site: Site, adapter: Adapter) -> None:
    adapter.kind, adapter.place, adapter.rows, adapter.label = site.kind, site.place, site.rows, str(site)
    path = site.ends[1] if site.kind == "branch" else site.host_path
    if site.kind == "branch":
        _tap(tuner, site, adapter)
    host = tuner.backbone.module(path)
    if adapter.on_weight and site.kind in ("conv", "norm", "embed") and "weight" not in host._parameters:
        raise SiteError(
            f"{site}: the weight is computed from others (parametrize, weight_norm), so no adapter can be lent"
        )
    if site.host:
        hosts.check(host, adapter)
    held = _dress(tuner, host, *([] if site.kind == "shared" else [_mixin(site, host)]))
    box = held._modules.setdefault(tuner.name, nn.ModuleDict())
    assert isinstance(box, nn.ModuleDict)
    box._modules[site.place] = adapter
    held.train(host.training)
    _switch(tuner, path)


def _mixin(site: Site, host: nn.Module) -> type[binding.Mixin]:
    if site.kind == "branch":
        return acting.BranchSite
    if site.kind in ("block", "stage"):
        return acting.BlockSite
    if site.host:
        return hosts.mixin(host)
    plain = binding.base_class(host).forward is nn.Linear.forward  # type: ignore[attr-defined]
    return acting.LinearSite if plain else acting.WeightSite


def _dress(tuner: Tuner, module: nn.Module, *mixins: type[binding.Mixin]) -> binding.Holder:
    try:
        held = binding.grip(module, tuner.name, *mixins)
    except SiteError as error:
        path = next((p for p, m in tuner.backbone.named_modules() if m is module), "")
        raise SiteError(f"{path}: {error}") from None
    tuner.bindings.append((module, mixins))
    return held


def _tap(tuner: Tuner, site: Site, adapter: Adapter) -> None:
    """Let the branch's first module keep its input, and the block drop it whatever happens."""
    first = _dress(tuner, tuner.backbone.module(site.ends[0]), acting.TapSite)
    first.tap = first.tap or binding.Tap()
    adapter.tap = first.tap
    adapter.normed = adapter.normed and kind_of(tuner.backbone.module(site.ends[0])) == "norm"
    block = _dress(tuner, tuner.backbone.module(site.path), acting.BlockSite)
    block.taps = tuple(dict.fromkeys((*block.taps, first.tap)))


def _owners(tuner: Tuner, path: str) -> Iterator[tuple[nn.Module, str]]:
    """Every module above a path, with the name of its child on the way."""
    while path:
        path, _, child = path.rpartition(".")
        if tuner.backbone.split(path)[0] not in tuner.backbone.roots:
            return
        yield tuner.backbone.module(path), child


def _switch(tuner: Tuner, path: str) -> None:
    """Make every module above call its children."""
    for module, child in _owners(tuner, path):
        for attribute, value in backbones.switches(module, child).items():
            binding.switch(module, tuner.name, attribute, value)
    _guard(tuner, path)


def _guard(tuner: Tuner, path: str) -> None:
    """Modules above that must know of it, whether adapters or tensors of ours are there."""
    for module, child in _owners(tuner, path):
        if (mixin := backbones.guard(module, child)) is not None:
            _dress(tuner, module, mixin)


def _copy(tuner: Tuner, path: str, name: str, copies: dict[int | str, Tensor], value: Tensor | None = None) -> None:
    """A trainable copy of the original, or the value given for it, waiting to be put in its place.

    Tied tensors stay tied: one original has one copy, and so has what the method says to be one.
    """
    module = tuner.backbone.module(path)
    held = binding.grip(module, tuner.name)
    box = held._modules.setdefault(tuner.name, nn.ModuleDict())
    assert isinstance(box, nn.ModuleDict)
    if LEARNT not in box._modules:
        box._modules[LEARNT] = Learnt()
    original = binding.original(module, name)
    assert original is not None
    group = tuner.method.shares((path, name), tuner.backbone) or id(original)
    if group not in copies:
        value = original.detach().clone() if value is None else value.detach().to(original, copy=True)
        if isinstance(original, nn.Parameter):
            value = nn.Parameter(value, requires_grad=value.is_floating_point())
        copies[group] = value
    _guard(tuner, path)
    activation.put_waiting(held, tuner.name, name, copies[group])
    held.train(module.training)
    tuner.in_place.append((path, name))


def _activate_new(tuner: Tuner, registry: Registry) -> None:
    """The new adapter acts beside the others; those that bring other tensors for the same place rest."""
    rivals = [t for n in registry.order if set((t := registry.tuners[n]).trained) & set(tuner.trained)]
    if rivals:
        names = ", ".join(repr(t.name) for t in rivals)
        warnings.warn(
            f"{names} rests now: {tuner.name!r} brings its own {'.'.join(tuner.trained[0])}. "
            "visionpeft.activate(model, name) switches between them",
            stacklevel=4,
        )
    names_before = [n for n in registry.order if registry.tuners[n] not in rivals and n != tuner.name]
    wanted = [(registry.tuners[n], registry.tuners[n].scale) for n in names_before]
    activation.set_active(tuner.backbone, [*wanted, (tuner, tuner.scale)])


# ---- removing -------------------------------------------------------------------------------------------------------


def _remove(tuner: Tuner) -> None:
    """Everything of this tuner off the model; also after attaching stopped halfway."""
    backbone = tuner.backbone
    registry = activation.registry(backbone)
    if registry is None:
        return
    activation.release_samples(backbone)
    tuner.active, tuner.kept = False, None
    registry.order = tuple(n for n in registry.order if n != tuner.name)
    activation.refresh(backbone)
    registry.tuners.pop(tuner.name, None)
    for root in backbone.roots.values():
        for _, module, held in list(binding.holders(root)):
            if tuner.name in held.users:
                binding.release(module, tuner.name)
    _thaw_statistics(backbone, registry)
    if not registry.tuners:
        for root in backbone.roots.values():
            root.__dict__.pop(activation.REGISTRY, None)
        for path, module, name in backbone.named_tensors():
            if (path, name) in registry.requires_grad:
                module._parameters[name].requires_grad_(registry.requires_grad[path, name])  # type: ignore[union-attr]


def _thaw_statistics(backbone: Backbone, registry: Registry) -> None:
    for path, (own, root_before) in list(registry.training.items()):
        module = backbone.module(path)
        if not isinstance(module, binding.FrozenStatistics):
            root = backbone.roots[backbone.split(path)[0]]
            module.training = root.training if own == root_before else own
            del registry.training[path]
