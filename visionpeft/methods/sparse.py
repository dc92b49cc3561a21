"""x S^T for a matrix S (out, in) that is zero but at a few places: what SHiRA and SPT's single entries add to a Linear.

Kept for backward: the values and their places, and what rebuilds x (`memory.recipe`). S is made again, so that it costs
no memory between forward and backward. Where most columns of S are zero, as sensitive entries stand in few, the others
alone are multiplied. Plain torch does the same where autograd must see every step, see `lowrank`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visionpeft import lowrank
from visionpeft.errors import VisionPEFTError


def matrix(values: Tensor, places: Tensor, shape: tuple[int, ...]) -> Tensor:
    """S of that shape: values (k) at the flat indices `places` (k), which differ from one another."""
    return values.new_zeros(math.prod(shape)).scatter(0, places.long(), values).view(shape)


class Columns:
    """The columns of S that are not zero, found once and again when the places have changed."""

    def __init__(self) -> None:
        self.known: tuple[Tensor, int, Tensor | None, Tensor] | None = None

    def __call__(self, places: Tensor, width: int) -> tuple[Tensor | None, Tensor]:
        """columns (c) and places (k) in the matrix (out, c) of these; None and the places given if most have some."""
        if places.is_inference():  # has no version
            return None, places
        if self.known is None or self.known[0] is not places or self.known[1] != places._version:
            columns, inside = (places % width).unique(return_inverse=True)
            if 2 * len(columns) > width:
                self.known = places, places._version, None, places
            else:
                narrow = (places // width * len(columns) + inside).to(places.dtype)
                self.known = places, places._version, columns.long(), narrow
        return self.known[2:]

    def __reduce__(self) -> tuple[type[Columns], tuple[()]]:
        return Columns, ()  # a copy looks for itself: versions of copied places count anew


def add(x: Tensor, y: Tensor, values: Tensor, places: Tensor, shape: tuple[int, ...], columns: Columns,
        route: str = "rebuild") -> Tensor:  # fmt: skip
    """y + x S^T: x (..., in), y (..., out), a fresh tensor of y's shape and dtype.

    values (k) stand at the flat indices `places` (k) of S, whose shape is (out, in); `columns` is the adapter's own.
    """
    if route == "plain" or lowrank.is_traced(x):
        return y + F.linear(x.to(y.dtype), matrix(values, places, shape).to(y.dtype))
    chosen, narrow = columns(places, shape[1])
    if not torch.is_grad_enabled():
        return _sum(x, y, values, chosen, narrow)
    make, tensors = lowrank.kept(x, route)
    return _Sparse.apply(x, y, values, chosen, narrow, make, *tensors)  # type: ignore[no-any-return]


def _rows(x: Tensor, columns: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x (..., in) as rows (tokens, in or c)."""
    x2 = x.reshape(-1, x.shape[-1])
    return (x2 if columns is None else x2.index_select(1, columns)).to(dtype)


def _matrix(values: Tensor, places: Tensor, out: int, x2: Tensor) -> Tensor:
    return matrix(values, places, (out, x2.shape[1])).to(x2.dtype)


def _sum(x: Tensor, y: Tensor, values: Tensor, columns: Tensor | None, places: Tensor) -> Tensor:
    z, out = y.new_empty(y.shape), y.shape[-1]  # no view: the caller may write to it
    with torch.autocast(x.device.type, enabled=False):
        x2 = _rows(x, columns, y.dtype)
        torch.addmm(y.reshape(-1, out), x2, _matrix(values, places, out, x2).t(), out=z.view(-1, out))
    return z


class _Sparse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, values: Tensor, columns: Tensor | None, places: Tensor,
                make: Callable[..., Tensor] | None, *source: Tensor) -> Tensor:  # fmt: skip
        ctx.make, ctx.x_shape, ctx.x_dtype, ctx.dtype = make, x.shape, x.dtype, y.dtype
        ctx.columns, ctx.places = columns, places  # the adapter's own
        ctx.save_for_backward(values, *source)
        return _sum(x, y, values, columns, places)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise VisionPEFTError("double backward through fused adapters: set tuner.fused = False for plain torch")
        values, *source = ctx.saved_tensors
        columns, places = ctx.columns, ctx.places
        with torch.autocast(dy.device.type, enabled=False):
            x2 = _rows(ctx.make(*source) if ctx.make else source[0], columns, ctx.dtype)
            d2 = dy.reshape(-1, dy.shape[-1])
            dvalues = (d2.t() @ x2).view(-1).index_select(0, places).to(values.dtype)
            dx = None
            if ctx.needs_input_grad[0]:
                dx = d2 @ _matrix(values, places, d2.shape[1], x2)
                if columns is not None:
                    dx = dx.new_zeros(len(dx), ctx.x_shape[-1]).index_copy_(1, columns, dx)
                dx = dx.view(ctx.x_shape).to(ctx.x_dtype)
        return dx, dy, dvalues, None, None, None, *[None] * len(source)
