"""A Linear, all its low-rank deltas, and a scale and shift behind them, in one autograd function.

    z = x W^T + b,   z[..., lo:hi] += scale * (drop(x) A^T) B^T     for every part (lo, hi, scale, A, B, dropout)
    y = gamma * z + beta                                            for a rescaling (gamma, beta, source), if any

Kept for backward: the parameters, what rebuilds x (`memory.recipe`), and what the rescaling's source says. Dropout
masks are drawn again from a seed. Products with the rank have it first, (r, tokens): several times faster on CPU. Plain
torch does the same where autograd must
see every step: under compile and torch.func transforms, on meta tensors, and for double backward once `tuner.fused`
is False.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

from visionpeft.errors import VisionPEFTError
from visionpeft.memory import has_saved_tensor_hooks, recipe


class Part(NamedTuple):
    """A (r, in) and B (hi - lo, r) add scale * B A to rows lo..hi of the weight."""

    lo: int
    hi: int
    scale: float
    a: Tensor
    b: Tensor
    dropout: float = 0.0


class Rescale(NamedTuple):
    """gamma and beta (out): y = gamma * z + beta.

    `source` is where backward has z from, which the gradient of gamma needs. "output": from y, which costs nothing
    where the next operation keeps y anyway (attention, GELU). "input": the Linear is computed again, from x, which must
    cost nothing either; so it is too if y was written since. "kept": z stays.
    """

    gamma: Tensor
    beta: Tensor
    source: str = "kept"


def linear(x: Tensor, w: Tensor, b: Tensor | None, parts: Sequence[Part], after: Rescale | None = None,
           route: str = "rebuild") -> Tensor:  # fmt: skip
    """x (..., in), w (out, in), b (out) -> (..., out): the Linear with its deltas; a fresh tensor, never a view.

    `route` is "rebuild", "keep" (x stays whatever could rebuild it) or "plain" torch. The result has the dtype that the
    plain Linear would give: that of autocast, else of x and w; adapters follow.
    """
    device = x.device.type
    autocast = not x.is_meta and x.dtype != torch.float64 and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else torch.promote_types(x.dtype, w.dtype)
    mixed = not autocast and x.dtype != w.dtype  # torch has its own error for that
    if route == "plain" or mixed or is_traced(x):
        return _plain(x, w, b, parts, after, dtype)
    seed = int(torch.randint(2**62, ())) if any(p.dropout for p in parts) else 0
    spec = [_Spec(p.lo, p.hi, p.scale, p.dropout, seed + i) for i, p in enumerate(parts)]
    ab = [t for p in parts for t in (p.a, p.b)]
    with torch.autocast(device, enabled=False):
        if not torch.is_grad_enabled():
            z = _compute(x, w, b, spec, dtype, ab)
            return z if after is None else _rescale(z, after.gamma, after.beta, out=z)
        source, make, tensors = _sources(x, w, bool(parts), after, route)
        gamma, beta, _ = after or (None, None, "")
        y = _Fused.apply(x, w, b, gamma, beta, source, spec, dtype, make, len(tensors), *tensors, *ab)
    if source == "output" and y.grad_fn is not None:
        y.grad_fn.y, y.grad_fn.version = y.detach(), y._version  # not y itself: a node that holds it is never freed
    return y


def is_traced(x: Tensor) -> bool:
    """Whether every step must be seen: by torch.compile, by a torch.func transform, or because `x` has no values."""
    return torch.compiler.is_compiling() or x.is_meta or peek_interpreter_stack() is not None


def kept(x: Tensor, route: str) -> tuple[Callable[..., Tensor] | None, tuple[Tensor, ...]]:
    """What backward has x from: a recipe and its tensors, or x itself."""
    found = recipe(x) if x.requires_grad and route == "rebuild" else None
    return found or (None, (x,))


def _sources(x: Tensor, w: Tensor, parts: bool, after: Rescale | None,
             route: str) -> tuple[str, Callable[..., Tensor] | None, tuple[Tensor, ...]]:  # fmt: skip
    """Where backward has z from, and x: from a recipe and its tensors, from x itself, or not at all."""
    make, tensors = kept(x, route)
    needs_x = parts or w.requires_grad
    source = "" if after is None else after.source if route == "rebuild" else "kept"
    if source == "output" and (not (needs_x or make) or has_saved_tensor_hooks()):
        source = "kept"  # y may be written to, and then x is needed after all
    if needs_x or source in ("input", "output"):
        return source, make, tensors
    return source, None, ()


def _rescale(z: Tensor, gamma: Tensor, beta: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.addcmul(beta.to(z.dtype), z, gamma.to(z.dtype), out=out)


def _plain(x: Tensor, w: Tensor, b: Tensor | None, parts: Sequence[Part], after: Rescale | None,
           dtype: torch.dtype) -> Tensor:  # fmt: skip
    y = F.linear(x, w, b)
    for part in parts:
        y = y + delta(x, part, w.shape[0], dtype)
    return y if after is None else _rescale(y, after.gamma, after.beta)


def delta(x: Tensor, p: Part, out: int, dtype: torch.dtype) -> Tensor:
    """What one part adds to the output: x (..., in) -> (..., out), zero outside its rows. Plain torch."""
    h = F.linear(F.dropout(x, p.dropout) if p.dropout else x, p.a.to(x.dtype)) * p.scale
    y = F.linear(h, p.b.to(h.dtype)).to(dtype)
    return y if (p.lo, p.hi) == (0, out) else F.pad(y, (p.lo, out - p.hi))


def _mask(x: Tensor, p: float, seed: int) -> Tensor:
    """A dropout mask (0 or 1 / (1 - p)) that the same seed draws again."""
    generator = torch.Generator(x.device).manual_seed(seed)
    return torch.empty_like(x).bernoulli_(1 - p, generator=generator).div_(1 - p)


class _Spec(NamedTuple):
    lo: int
    hi: int
    scale: float
    dropout: float
    seed: int


def _compute(x: Tensor, w: Tensor, b: Tensor | None, spec: Sequence[_Spec], dtype: torch.dtype,
             ab: Sequence[Tensor]) -> Tensor:  # fmt: skip
    """z, the output before any rescaling."""
    x2 = x.to(dtype).reshape(-1, x.shape[-1])
    out = x2.new_empty(*x.shape[:-1], w.shape[0])
    z = out.view(-1, w.shape[0])
    if b is None:
        torch.mm(x2, w.to(dtype).t(), out=z)
    else:
        torch.addmm(b.to(dtype), x2, w.to(dtype).t(), out=z)
    for h, s, up in zip(_down(x2, spec, ab[0::2]), spec, ab[1::2], strict=True):
        z[:, s.lo : s.hi].addmm_(h.t(), up.to(dtype).t(), alpha=s.scale)
    return out


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
                source: str, spec: list[_Spec], dtype: torch.dtype, make: Callable[..., Tensor] | None, kept: int,
                *tensors: Tensor) -> Tensor:  # fmt: skip
        rebuilt, ab = tensors[:kept], tensors[kept:]
        out = _compute(x, w, b, spec, dtype, ab)
        y = out if gamma is None or beta is None else _rescale(out, gamma, beta, None if source == "kept" else out)
        again = [out] if source == "kept" else []
        ctx.source, ctx.spec, ctx.dtype, ctx.make, ctx.kept = source, spec, dtype, make, kept
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.save_for_backward(w, b, gamma, beta, *ab, *rebuilt, *again)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        w, b, gamma, beta, *rest = ctx.saved_tensors
        if torch.is_grad_enabled():
            raise VisionPEFTError("double backward through fused adapters: set tuner.fused = False for plain torch")
        n, dtype = len(ctx.spec), ctx.dtype
        ab, rest = rest[: 2 * n], rest[2 * n :]
        with torch.autocast(dy.device.type, enabled=False):
            y, z = _take_output(ctx), rest[-1] if ctx.source == "kept" else None
            lacks_z = gamma is not None and y is None and z is None
            x2: Any = _take_input(ctx, rest) if n or ctx.needs_input_grad[1] or lacks_z else None
            d2 = dy.to(dtype).reshape(-1, dy.shape[-1])
            dgamma = dbeta = None
            if gamma is not None:
                z = _compute(x2, w, b, ctx.spec, dtype, ab) if lacks_z else z
                dgamma, dbeta = _rescale_grads(d2, y, z, gamma, beta)
                d2 = d2 * gamma.to(dtype)
            dx = d2 @ w.to(dtype) if ctx.needs_input_grad[0] else None
            grads = _part_grads(x2, d2, dx, ctx.spec, ab) if n else []
            dw = (d2.t() @ x2).to(w.dtype) if ctx.needs_input_grad[1] else None
            db = d2.sum(0).to(b.dtype) if ctx.needs_input_grad[2] else None
        dx = None if dx is None else dx.view(ctx.x_shape).to(ctx.x_dtype)
        return dx, dw, db, dgamma, dbeta, *[None] * (5 + ctx.kept), *grads


def _take_input(ctx: Any, kept: Sequence[Tensor]) -> Tensor:
    """x as rows, (tokens, in)."""
    x = ctx.make(*kept[: ctx.kept]) if ctx.make else kept[0]
    return x.to(ctx.dtype).reshape(-1, ctx.x_shape[-1])


def _take_output(ctx: Any) -> Tensor | None:
    """The output, if it is at hand and nobody wrote to it; given up at once, as autograd gives up what it saved."""
    y, ctx.y = getattr(ctx, "y", None), None
    return y if y is not None and y._version == ctx.version else None


def _rescale_grads(d2: Tensor, y: Tensor | None, z: Tensor | None, gamma: Tensor,
                   beta: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of gamma and beta from z, or from y = gamma z + beta; summed in gamma's precision."""
    dbeta = d2.sum(0, dtype=gamma.dtype)
    if y is None:
        return (d2 * z.view_as(d2)).sum(0, dtype=gamma.dtype), dbeta  # type: ignore[union-attr]
    return ((d2 * y.view_as(d2)).sum(0, dtype=gamma.dtype) - beta * dbeta) / gamma, dbeta


def _down(x2: Tensor, spec: Sequence[_Spec], downs: Sequence[Tensor]) -> list[Tensor]:
    """h (r, tokens) = A drop(x)^T of every part; one product for all where nothing is dropped."""
    if any(s.dropout for s in spec):
        xs = (_mask(x2, s.dropout, s.seed).mul_(x2) if s.dropout else x2 for s in spec)
        return [a.to(x2.dtype) @ x.t() for x, a in zip(xs, downs, strict=True)]
    if not downs:
        return []
    return list((torch.cat(list(downs)).to(x2.dtype) @ x2.t()).split([a.shape[0] for a in downs]))


def _part_grads(x2: Tensor, d2: Tensor, dx: Tensor | None, spec: Sequence[_Spec],
                ab: Sequence[Tensor]) -> list[Tensor]:  # fmt: skip
    """Gradients of every A and B, in turn; what flows to x through the parts is added to dx."""
    downs, ups = ab[0::2], ab[1::2]
    if any(s.dropout for s in spec):
        parts = zip(spec, downs, ups, strict=True)
        return [g for s, a, up in parts for g in _dropped(x2, d2[:, s.lo : s.hi], dx, s, a, up)]
    dhs, db = [], []
    for s, up, h in zip(spec, ups, _down(x2, spec, downs), strict=True):
        d = d2[:, s.lo : s.hi]
        dhs.append((up.to(d.dtype).t() @ d.t()).mul_(s.scale))
        db.append((h @ d).mul_(s.scale).t().to(up.dtype))
    dh = torch.cat(dhs)
    if dx is not None:
        dx.addmm_(dh.t(), torch.cat(list(downs)).to(dx.dtype))
    da = (dh @ x2).split([a.shape[0] for a in downs])
    return [g for a, ga, gb in zip(downs, da, db, strict=True) for g in (ga.to(a.dtype), gb)]


def _dropped(x2: Tensor, d: Tensor, dx: Tensor | None, s: _Spec, a: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of one A and B under dropout, the mask drawn again; adds to dx."""
    down = a.to(x2.dtype)
    dh = (up.to(d.dtype).t() @ d.t()).mul_(s.scale)
    mask = _mask(x2, s.dropout, s.seed) if s.dropout else torch.ones((), dtype=x2.dtype, device=x2.device)
    if dx is not None:
        dx.add_((dh.t() @ down).mul_(mask))
    x2 = mask * x2
    return (dh @ x2).to(a.dtype), (down @ x2.t() @ d).mul_(s.scale).t().to(up.dtype)
