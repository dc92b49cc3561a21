"""Looking for adapters that never act."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from visionpeft import binding
from visionpeft.errors import DeadAdapterError, SiteError, VisionPEFTError
from visionpeft.sites import Site
from visionpeft.tuner import Tuner

Example = Sequence[Any] | Mapping[str, tuple[Any, ...]]


def probe(tuner: Tuner, example: Example) -> None:
    """Run the example in train with gradients and in eval without, and name every adapter that does not act in both.

    In train an adapter acts if the output depends on its tensors (the autograd graph says so, whatever their values);
    in eval if its module consulted it. With {component: example} these components run, one by one. Modes, buffers and
    random state are as before; no gradient is left.
    """
    if not tuner.adapters:
        return
    if not tuner.active or tuner.merged is not None:
        raise VisionPEFTError(f"{tuner.name!r} is merged or rests: only an adapter that acts can be probed")
    dead: dict[Site, list[str]] = {}
    here = [s for s in tuner.adapters if not isinstance(example, Mapping) or tuner.backbone.split(s.path)[0] in example]
    with _untouched(tuner):
        for site in _cut_off(tuner, example):
            dead.setdefault(site, []).append("train")
        for site in _unasked(tuner, example):
            dead.setdefault(site, []).append("eval")
    dead = {site: modes for site, modes in dead.items() if site in here}
    if dead:
        listed = ", ".join(f"{site} (in {' and '.join(modes)})" for site, modes in list(dead.items())[:6])
        more = f" and {len(dead) - 6} more" if len(dead) > 6 else ""
        raise DeadAdapterError(
            f"{len(dead)} of {len(tuner.adapters)} adapters of {tuner.name!r} never act: {listed}{more}. The model "
            "does not call these modules, or reads their weights itself: choose other targets, or exclude= them"
        )


def probe_attached(tuner: Tuner) -> None:
    """Probe with an input built for the library; a model that itself cannot run on that input is left alone."""
    if not tuner.adapters:
        return
    example: Example | None = tuner.backbone.example()
    if set(tuner.backbone.roots) != {""}:
        names = {tuner.backbone.split(site.path)[0] for site in tuner.adapters}
        example = tuner.backbone.examples(names)
        if lost := ", ".join(sorted(names - set(example))):
            _unchecked(f"no input is known for {lost}")
            if not example:
                return
    if example is None:
        _unchecked("no input is known for this kind of model")
        return
    try:
        probe(tuner, example)
    except VisionPEFTError:
        raise
    except Exception as error:
        if (cause := _fails_alone(tuner, example)) is not None:
            _unchecked(f"the model does not run on an input of shape {_shapes(example)} ({type(cause).__name__})")
            return
        raise SiteError(f"the model runs alone but not with {tuner.method.summary()}: {error}") from error


def _shapes(example: Example) -> str:
    first = [e[0] for e in example.values()] if isinstance(example, Mapping) else [example[0]]
    return " and ".join(str(tuple(t.shape)) for t in first)


def _unchecked(why: str) -> None:
    warnings.warn(
        f"liveness is not checked: {why}. Call tuner.probe(*example) with one of yours",
        stacklevel=6,
    )


def _fails_alone(tuner: Tuner, example: Example) -> Exception | None:
    with _untouched(tuner), tuner.disabled():
        try:
            _run(tuner, example)
        except Exception as error:
            return error
    return None


def _run(tuner: Tuner, example: Example) -> Any:
    if isinstance(example, Mapping):
        return [tuner.backbone.roots[name](*args) for name, args in example.items()]
    if not callable(tuner.model):
        raise VisionPEFTError("this model cannot be called as a whole: probe its components one by one")
    return tuner.model(*example)


@torch.enable_grad()
def _cut_off(tuner: Tuner, example: Example) -> list[Site]:
    """Sites whose adapter has tensors that the output, in train, does not depend on at all."""
    _train(tuner, True)
    owned = {site: list(adapter.parameters()) for site, adapter in tuner.adapters.items()}
    params = list({id(p): p for ps in owned.values() for p in ps if p.requires_grad}.values())
    fired, out = _watch(tuner, example, grad=True)
    if not any(True for _ in _tensors(out)):
        raise VisionPEFTError(f"the model's output, a {type(out).__name__}, has no tensors: its parts cannot be probed")
    roots = [t.float().sum() for t in _tensors(out) if t.requires_grad and t.is_floating_point()]
    grads = torch.autograd.grad(roots, params, allow_unused=True) if roots and params else ()
    reached = {id(p) for p, g in zip(params, grads, strict=False) if g is not None}
    fired |= {id(adapter) for site, adapter in tuner.adapters.items() if site.kind == "shared"}  # never asked itself
    return [
        site
        for site, ps in owned.items()
        if (ps and not any(id(p) in reached for p in ps)) or id(tuner.adapters[site]) not in fired
    ]


def _unasked(tuner: Tuner, example: Example) -> list[Site]:
    """Sites whose adapter is not consulted in eval without gradients, where fast paths may skip it."""
    _train(tuner, False)
    fired, _ = _watch(tuner, example, grad=False)
    return [s for s, adapter in tuner.adapters.items() if s.kind != "shared" and id(adapter) not in fired]


def _watch(tuner: Tuner, example: Example, grad: bool) -> tuple[set[int], Any]:
    fired: set[int] = set()
    binding._fired = fired
    try:
        # Compiled parts run as they were written: a graph would be made for this one look, and guard on `_fired`.
        with torch.set_grad_enabled(grad), torch.compiler.set_stance("force_eager"):
            return fired, _run(tuner, example)
    finally:
        binding._fired = None


def _train(tuner: Tuner, mode: bool) -> None:
    for root in tuner.backbone.roots.values():
        root.train(mode)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__dict__"):  # dataclasses and their like
        yield from _tensors(vars(value))


@contextmanager
def _untouched(tuner: Tuner) -> Iterator[None]:
    """Modes, buffers and random state as before, whatever happens inside."""
    modules = [m for root in tuner.backbone.roots.values() for m in root.modules()]
    modes = [m.training for m in modules]
    buffers = [(m, n, b, b.detach().clone()) for m in modules for n, b in m._buffers.items() if b is not None]
    buffers = [entry for entry in buffers if not isinstance(entry[0], binding.Holder)]
    tensors = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    devices = {t.device for t in tensors if t.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=[d.index or 0 for d in devices]):
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                module._buffers[name] = buffer
                if not buffer.is_meta and not torch.equal(buffer, before):
                    buffer.copy_(before)
