"""What a dressed module does: one mixin for each way in which an adapter can act.

    LinearSite        one fused function for base and low-rank deltas, then adapters of the output in turn
    WeightSite        convs, norms, others: weight lent to the base class's forward, or the output adapted
    TapSite, BranchSite   the ends of a residual branch: the first keeps its input, the last hands it to the adapters
    BlockSite         tokens put in before a block and taken out after; taps cleared whatever happens

`nn.MultiheadAttention` has its own in `visionpeft.multihead`, whole models in `visionpeft.batches`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visionpeft import lowrank
from visionpeft.adapter import Adapter
from visionpeft.binding import Mixin, Tap
from visionpeft.errors import SiteError


def on_rows(adapter: Adapter, x: Tensor, y: Tensor, start: int = 0) -> Tensor:
    """The output y with the adapter's rows (counted from `start`) adapted, as strongly as it says."""
    lo, hi = (r - start for r in adapter.rows or (start, start + y.shape[-1]))
    if (lo, hi) == (0, y.shape[-1]):
        return _blend(y, adapter(x, y), adapter.strength)
    part = y[..., lo:hi]
    return torch.cat([y[..., :lo], _blend(part, adapter(x, part), adapter.strength), y[..., hi:]], -1)


def _blend(base: Tensor, adapted: Tensor, strength: float) -> Tensor:
    return adapted if strength == 1 else torch.lerp(base, adapted.to(base.dtype), strength)


def linear(x: Tensor, w: Tensor, b: Tensor | None, adapters: Sequence[Adapter], route: str, start: int = 0) -> Tensor:
    """A Linear with its adapters, in order. Rows of the adapters count from `start`.

    x (..., in), w (out, in), b (out) or None -> (..., out).
    """
    for i in reversed(range(len(adapters))):
        if adapters[i].overrides("enter"):  # those before it act on what it gives
            y = linear(_blend(x, adapters[i].enter(x), adapters[i].strength), w, b, adapters[:i], route, start)
            return _add(x, y, adapters[i + 1 :], w.shape[0], start)
    parts: list[lowrank.Part] = []
    rest = list(adapters)
    while rest and (found := _part(rest[0], w.shape[0], start)) is not None:
        parts.append(found)
        rest.pop(0)
    after = _rescaling(rest, w.shape[0], start)
    if parts or after:
        y = lowrank.linear(x, w, b, parts, after, route)
    else:
        y = nn.functional.linear(x, w, b)
    return _add(x, y, rest, w.shape[0], start)


def _add(x: Tensor, y: Tensor, adapters: Sequence[Adapter], out: int, start: int) -> Tensor:
    """The output y with adapters on it, one after the other."""
    for adapter in adapters:
        if (found := _part(adapter, out, start)) is not None:
            y = y + lowrank.delta(x, found, out, y.dtype)
        else:
            y = on_rows(adapter, x, y, start)
    return y


def _rescaling(rest: list[Adapter], out: int, start: int) -> lowrank.Rescale | None:
    """Take the adapters that scale and shift off the front of `rest`, while their rows follow one another."""
    taken: list[tuple[int, int, lowrank.Rescale]] = []
    while rest and rest[0].strength == 1 and (found := rest[0].scale_shift()) is not None:
        lo, hi = (r - start for r in rest[0].rows or (start, start + out))
        if taken and lo < taken[-1][1]:
            break
        taken.append((lo, hi, lowrank.Rescale(*found)))
        rest.pop(0)
    if len(taken) < 2 and all((lo, hi) == (0, out) for lo, hi, _ in taken):
        return taken[0][2] if taken else None
    return _side_by_side(taken, out)


def _side_by_side(taken: Sequence[tuple[int, int, lowrank.Rescale]], out: int) -> lowrank.Rescale:
    """One rescaling of all rows; rows that nobody took keep gamma 1 and beta 0."""
    gammas, betas, at = [], [], 0
    for lo, hi, found in [*taken, (out, out, None)]:
        first = taken[0][2].gamma
        gammas.append(first.new_ones(lo - at))
        betas.append(first.new_zeros(lo - at))
        if found is not None:
            gammas.append(found.gamma)
            betas.append(found.beta)
        at = hi
    sources = {found.source for *_, found in taken}
    return lowrank.Rescale(torch.cat(gammas), torch.cat(betas), sources.pop() if len(sources) == 1 else "kept")


def _part(adapter: Adapter, out: int, start: int) -> lowrank.Part | None:
    found = adapter.low_rank()
    if found is None:
        return None
    a, b, scale = found
    lo, hi = adapter.rows or (start, start + out)
    dropout = float(getattr(adapter, "dropout", 0.0)) if adapter.training else 0.0
    return lowrank.Part(lo - start, hi - start, scale * adapter.strength, a, b, dropout)


class LinearSite(Mixin):
    layer = 4

    def forward(self, input: Tensor) -> Tensor:
        adapters = self.peft.acting()
        if not adapters:
            return super().forward(input)  # type: ignore[misc]
        return linear(input, self.weight, self.bias, adapters, self.peft.route)  # type: ignore[attr-defined]


class WeightSite(Mixin):
    """Any module with `weight` and perhaps `bias`: adapters of the weight first, then those of the output."""

    layer = 4

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        adapters = self.peft.acting()
        if not adapters:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        last = max((i for i, a in enumerate(adapters) if a.on_weight), default=-1) + 1
        params = self._parameters  # type: ignore[attr-defined]
        w, b = params.get("weight"), params.get("bias")
        try:
            for adapter in adapters[:last]:
                rows = slice(*adapter.rows) if adapter.rows else slice(None)
                params["weight"], new_b = adapted(adapter, params["weight"], params.get("bias"), rows, rows)
                if "bias" in params:
                    params["bias"] = new_b
            y = super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            if last:
                params["weight"] = w
                if "bias" in params:
                    params["bias"] = b
        for adapter in adapters[last:]:
            x = _first(args, kwargs)
            y = on_rows(adapter, x, y) if adapter.rows else _blend(y, adapter(x, y), adapter.strength)
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
    if b is not None and new_b is not None and part_b is not None and new_b is not part_b:
        b = _replace(b, b_rows, _blend(part_b.to(new_b.dtype), new_b, adapter.strength))
    return w, b


def _replace(whole: Tensor, rows: slice, part: Tensor) -> Tensor:
    part = part.to(whole.dtype)
    lo, hi, _ = rows.indices(whole.shape[0])
    return part if (lo, hi) == (0, whole.shape[0]) else torch.cat([whole[:lo], part, whole[hi:]])


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first argument, which is the input, however it was given."""
    return args[0] if args else next(iter(kwargs.values()))


def _with_first(args: tuple[Any, ...], kwargs: dict[str, Any], x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((x, *args[1:]), kwargs) if args else ((), {**kwargs, next(iter(kwargs)): x})


class TapSite(Mixin):
    """First module of a residual branch."""

    layer = 3

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y = super().forward(*args, **kwargs)  # type: ignore[misc]
        if self.peft.tap is not None:
            self.peft.tap.x, self.peft.tap.y = _first(args, kwargs), y
        return y


class BranchSite(Mixin):
    """Last module of a residual branch: its output is added to the residual stream."""

    layer = 2

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y = super().forward(*args, **kwargs)  # type: ignore[misc]
        for adapter in self.peft.acting("branch"):
            tap: Tap = adapter.tap  # type: ignore[assignment]
            if tap.x is None:
                raise SiteError(f"{adapter.label}: the branch ended before it began; was its first module replaced?")
            y = _blend(y, adapter(tap.y if adapter.normed else tap.x, y), adapter.strength)
        return y


class BlockSite(Mixin):
    """A whole block: adapters put tokens in and take them out again; taps inside hold nothing afterwards."""

    layer = 1

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        adapters = self.peft.acting("block", "stage")
        try:
            for adapter in adapters:
                if args:
                    args = adapter.arguments(*args)
                else:
                    args, kwargs = _with_first(args, kwargs, adapter.before(_first(args, kwargs)))
            for tap in self.peft.taps:
                tap.rest = args[1:]
            y = super().forward(*args, **kwargs)  # type: ignore[misc]
            for adapter in reversed(adapters):
                y = adapter.after(y)
            return y
        finally:
            for tap in self.peft.taps:
                tap.rest = ()
                tap.x = tap.y = None
