"""How adapters act: the only file that touches module classes and `_parameters`.

The module that is *called* gets a cached subclass of its own class, with the same name, whose `forward` consults the
adapters in one reserved child of the module, the `Holder`. So the object stays the same, `isinstance` stays true, the
base keys stay unchanged, and deepcopy, pickle, `.to`, DDP, FSDP2 and `torch.compile` see ordinary modules. What it
does depends on the module:

    Linear                    one fused function for base and low-rank deltas, then adapters of the output in turn
    convs, norms, others      weight lent to the base class's forward, or the output adapted
    nn.MultiheadAttention     `visionpeft.attention.MultiheadSite`
    ends of a residual branch the first keeps its input (`Tap`), the last hands it to the adapters
    whole blocks              tokens put in before and taken out after; taps cleared whatever happens
    frozen BatchNorm          stays in eval

Tensors that learn in place are replaced by a trainable copy, the original set aside in the holder.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visionpeft import lowrank
from visionpeft.adapter import Adapter
from visionpeft.errors import SiteError, VisionPEFTError

SLOT = "peft"

_MODULES = ("linear", "conv", "norm", "embed")  # kinds of site that are a module with a weight
_fired: set[int] | None = None  # ids of the adapters consulted, while a probe looks


class Tap:
    """The input of a residual branch, kept from its first module until its last."""

    x: Tensor | None = None


class Holder(nn.Module):
    """All that is ours at one module.

    Children: for each adapter name a ModuleDict from part to adapter. Buffers (not saved): originals set aside.

    Attributes:
        active: names of the adapters that act, in order; here or elsewhere in the model.
        live: tensor name -> name of the adapter whose trainable copy stands in the module.
        hidden: names whose tensors are left out of the state dict (merged ones).
        fused: whether the fused function is used where it can be.
        tap: input of the residual branch that begins here, taps: all that this block must clear.
        mixed: each sample has its own adapter, and only the root (with `samples` and `backbone`) may say which acts.
        saved: attributes of the module that were switched, with their values before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.active: tuple[str, ...] = ()
        self.hidden: tuple[str, ...] = ()
        self.fused = True
        self.tap: Tap | None = None
        self.taps: tuple[Tap, ...] = ()
        self.saved: dict[str, Any] = {}
        self.live: dict[str, str] = {}
        self.mixed = False
        self.samples: tuple[str | None, ...] | None = None
        self.backbone: Any = None
        self.registry: Any = None  # at a root: what `tuner` keeps about the whole model
        self.users: dict[str, tuple[type, ...]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """The identity: a Sequential that holds us passes through."""
        return x

    def acting(self, *kinds: str) -> list[Adapter]:
        """Adapters of sites of these kinds (all but branches and blocks if none is given) that act, in order."""
        if self.mixed:
            raise VisionPEFTError("each sample has its own adapter: call the model itself, not a part or another method of it")
        own = self._modules
        boxes = [own[name] for name in self.active if name in own]
        adapters = [a for box in boxes for a in box.values() if a.kind in (kinds or _MODULES)]  # type: ignore[union-attr]
        if _fired is not None:
            _fired.update(map(id, adapters))
        return adapters

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        out = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        for key in [k for k in out if k.startswith(prefix) and k[len(prefix) :].split(".")[0] in self.hidden]:
            del out[key]
        return out


# ---- the sites ------------------------------------------------------------------------------------------------------


def holder(module: nn.Module) -> Holder | None:
    return module._modules.get(SLOT)  # type: ignore[return-value]


def on_rows(adapter: Adapter, x: Tensor, y: Tensor, start: int = 0) -> Tensor:
    """The output y with the adapter's rows (counted from `start`) adapted, as strongly as it says."""
    lo, hi = (r - start for r in adapter.rows or (start, start + y.shape[-1]))
    if (lo, hi) == (0, y.shape[-1]):
        return _blend(y, adapter(x, y), adapter.strength)
    part = y[..., lo:hi]
    return torch.cat([y[..., :lo], _blend(part, adapter(x, part), adapter.strength), y[..., hi:]], -1)


def _blend(base: Tensor, adapted: Tensor, strength: float) -> Tensor:
    return adapted if strength == 1 else torch.lerp(base, adapted.to(base.dtype), strength)


def linear(x: Tensor, w: Tensor, b: Tensor | None, adapters: Sequence[Adapter], fused: bool, start: int = 0) -> Tensor:
    """A Linear with its adapters, in order. Rows of the adapters count from `start`.

    x (..., in), w (out, in), b (out) or None -> (..., out).
    """
    parts: list[lowrank.Part] = []
    rest = list(adapters)
    while rest and (found := _part(rest[0], w.shape[0], start)) is not None:
        parts.append(found)
        rest.pop(0)
    y = lowrank.linear(x, w, b, parts, plain=not fused) if parts else nn.functional.linear(x, w, b)
    for adapter in rest:
        if (found := _part(adapter, w.shape[0], start)) is not None:
            y = y + lowrank.linear(x, torch.zeros_like(w), None, [found], plain=True)
        else:
            y = on_rows(adapter, x, y, start)
    return y


def _part(adapter: Adapter, out: int, start: int) -> lowrank.Part | None:
    found = adapter.low_rank()
    if found is None:
        return None
    a, b, scale = found
    lo, hi = adapter.rows or (start, start + out)
    dropout = float(getattr(adapter, "dropout", 0.0)) if adapter.training else 0.0
    return lowrank.Part(lo - start, hi - start, scale * adapter.strength, a, b, dropout)


class LinearSite:
    def forward(self, x: Tensor) -> Tensor:
        peft: Holder = self.peft  # type: ignore[attr-defined]
        adapters = peft.acting()
        if not adapters:
            return super().forward(x)  # type: ignore[misc]
        return linear(x, self.weight, self.bias, adapters, peft.fused)  # type: ignore[attr-defined]


class WeightSite:
    """Any module with `weight` and perhaps `bias`: adapters of the weight first, then those of the output."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        peft: Holder = self.peft  # type: ignore[attr-defined]
        adapters = peft.acting()
        if not adapters:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        last = max((i for i, a in enumerate(adapters) if a.on_weight), default=-1) + 1
        params = self._parameters  # type: ignore[attr-defined]
        w, b = params.get("weight"), params.get("bias")
        try:
            for adapter in adapters[:last]:
                params["weight"], new_b = adapted(adapter, params["weight"], params.get("bias"))
                if "bias" in params:
                    params["bias"] = new_b
            y = super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            if last:
                params["weight"] = w
                if "bias" in params:
                    params["bias"] = b
        for adapter in adapters[last:]:
            y = _blend(y, adapter(args[0], y), adapter.strength)
        return y


def adapted(adapter: Adapter, w: Tensor, b: Tensor | None, rows: slice = slice(None),
            b_rows: slice = slice(None)) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Weight and bias with the adapter in them, in their own dtypes, as strongly as it says.

    The sum is made in the wider of the dtypes, so that a half-precision weight is rounded once.
    """
    part_b = None if b is None else b[b_rows]
    new_w, new_b = adapter.weight(w[rows], part_b)
    if part_b is None and new_b is not None:
        raise SiteError(f"{type(adapter).__name__} at {adapter.label} needs a bias, and the module has none")
    w = _replace(w, rows, _blend(w[rows].to(new_w.dtype), new_w, adapter.strength))
    if b is not None and new_b is not None and part_b is not None:
        b = _replace(b, b_rows, _blend(part_b.to(new_b.dtype), new_b, adapter.strength))
    return w, b


def _replace(whole: Tensor, rows: slice, part: Tensor) -> Tensor:
    part = part.to(whole.dtype)
    lo, hi, _ = rows.indices(whole.shape[0])
    return part if (lo, hi) == (0, whole.shape[0]) else torch.cat([whole[:lo], part, whole[hi:]])


class TapSite:
    """First module of a residual branch."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        tap = self.peft.tap  # type: ignore[attr-defined]
        if tap is not None:
            tap.x = x
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]


class BranchSite:
    """Last module of a residual branch: its output is added to the residual stream."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y = super().forward(*args, **kwargs)  # type: ignore[misc]
        peft: Holder = self.peft  # type: ignore[attr-defined]
        for adapter in peft.acting("branch"):
            tap: Tap = adapter.tap  # type: ignore[assignment]
            if tap.x is None:
                raise SiteError(f"{adapter.label}: the branch ended before it began; was its first module replaced?")
            y = _blend(y, adapter(tap.x, y), adapter.strength)
        return y


class BlockSite:
    """A whole block: adapters put tokens in and take them out again; taps inside hold nothing afterwards."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        peft: Holder = self.peft  # type: ignore[attr-defined]
        adapters = peft.acting("block")
        try:
            for adapter in adapters:
                x = adapter.before(x)
            y = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            for adapter in reversed(adapters):
                y = adapter.after(y)
            return y
        finally:
            for tap in peft.taps:
                tap.x = None


class FrozenStatistics:
    """A BatchNorm whose running statistics stay as they are."""

    def train(self, mode: bool = True) -> Any:
        return super().train(False)  # type: ignore[misc]


# ---- classes --------------------------------------------------------------------------------------------------------


@functools.cache
def site_class(cls: type, mixins: tuple[type, ...]) -> type:
    """The subclass of `cls` with the mixins in front; one per combination, so that compiled code is shared."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__reduce_ex__": _reduce}
    return type(cls.__name__, (*mixins, cls), {**names, "_base": cls, "_mixins": mixins})


def _reduce(self: Any, protocol: Any) -> Any:
    return _rebuild, (self._base, self._mixins), self.__dict__


def _rebuild(cls: type, mixins: tuple[type, ...]) -> Any:
    made = site_class(cls, mixins)
    return made.__new__(made)


def base_class(module: nn.Module) -> type:
    """The module's class as its owner wrote it."""
    return getattr(type(module), "_base", type(module))


def grip(module: nn.Module, name: str, *mixins: type) -> Holder:
    """The module's holder, made at need; `name` uses these mixins from now on.

    Raises:
        SiteError: the instance carries a `forward` of its own, which would shadow the binding.
    """
    if mixins and "forward" in module.__dict__:
        raise SiteError(
            f"a {type(module).__name__} carries an instance-level `forward` (accelerate and LyCORIS put one there): "
            "it would shadow the adapter. Remove that wrapper first, attach, then wrap again."
        )
    if SLOT not in module._modules:
        if hasattr(module, SLOT):
            raise SiteError(f"a {type(module).__name__} has an attribute {SLOT!r} of its own, the name that we need")
        module.add_module(SLOT, Holder())
    held: Holder = module._modules[SLOT]  # type: ignore[assignment]
    held.users[name] = tuple(dict.fromkeys((*held.users.get(name, ()), *mixins)))
    _dress(module, held)
    return held


def release(module: nn.Module, name: str) -> None:
    """Forget `name` at this module; with its last user the module is as it was."""
    held = holder(module)
    if held is None:
        return
    held.users.pop(name, None)
    held.active = tuple(n for n in held.active if n != name)
    held.hidden = tuple(n for n in held.hidden if n != name)
    held._modules.pop(name, None)
    if not held.users:
        for attribute, value in held.saved.items():
            setattr(module, attribute, value)
        del module._modules[SLOT]
        module.__class__ = base_class(module)
    else:
        _dress(module, held)


def undress(module: nn.Module, name: str) -> None:
    """Take the mixins of `name` off while it is merged; its tensors stay."""
    held = holder(module)
    assert held is not None
    held.users[name] = tuple(m for m in held.users[name] if m is FrozenStatistics)
    _dress(module, held)


_ORDER: tuple[type, ...] = (BlockSite, BranchSite, TapSite, WeightSite, LinearSite, FrozenStatistics)


def _dress(module: nn.Module, held: Holder) -> None:
    wanted = {m for mixins in held.users.values() for m in mixins}
    known = [m for m in _ORDER if m in wanted]
    mixins = tuple([*sorted(wanted - set(known), key=lambda m: m.__name__), *known])
    cls = base_class(module)
    module.__class__ = site_class(cls, mixins) if mixins else cls


def switch(module: nn.Module, name: str, attribute: str, value: Any) -> None:
    """Set an attribute of the module until `name` and all others let go of it."""
    held = grip(module, name)
    held.saved.setdefault(attribute, getattr(module, attribute))
    setattr(module, attribute, value)


def holders(root: nn.Module) -> Iterator[tuple[str, nn.Module, Holder]]:
    """Path, module and holder of every module below root that has one."""
    for path, module in root.named_modules():
        if (held := holder(module)) is not None:
            yield path, module, held


# ---- tensors that are replaced --------------------------------------------------------------------------------------


def get_tensor(module: nn.Module, name: str) -> Tensor | None:
    return module._parameters.get(name) if name in module._parameters else module._buffers.get(name)


def set_tensor(module: nn.Module, name: str, value: Tensor | None) -> None:
    """Put a parameter or a buffer in place without any copy."""
    table = module._parameters if name in module._parameters else module._buffers
    table[name] = value  # type: ignore[assignment]
    if getattr(module, "attention_bias_cache", None):  # timm's LeViT keeps what it computed from its biases
        module.attention_bias_cache = {}
    if isinstance(module, nn.Linear) and name == "weight" and value is not None:
        module.out_features, module.in_features = value.shape


def set_aside(module: nn.Module, name: str) -> None:
    """Keep the original of a tensor in the holder, once."""
    held = holder(module)
    assert held is not None
    if f"base_{name}" not in held._buffers:
        held.register_buffer(f"base_{name}", get_tensor(module, name), persistent=False)


def original(module: nn.Module, name: str) -> Tensor | None:
    """The tensor as the user's model had it."""
    held = holder(module)
    if held is not None and f"base_{name}" in held._buffers:
        return held._buffers[f"base_{name}"]
    return get_tensor(module, name)


def put_back(module: nn.Module, name: str) -> None:
    """The original in its place again: the same object unless the model was moved or cast meanwhile."""
    held = holder(module)
    assert held is not None
    value = held._buffers.pop(f"base_{name}")
    held._non_persistent_buffers_set.discard(f"base_{name}")
    if name in module._parameters and not isinstance(value, nn.Parameter) and value is not None:
        value = nn.Parameter(value, requires_grad=False)
    set_tensor(module, name, value)
