"""x S^T for a matrix S (out, in) that is zero but at a few places: what SHiRA and SPT's single entries add to a Linear.

Kept for backward: the values and their places, and what rebuilds x (`memory.recipe`). S is made again, so that it costs
no memory between forward and backward. Plain torch does the same where autograd must see every step, see `lowrank`.
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


def add(x: Tensor, y: Tensor, values: Tensor, places: Tensor, shape: tuple[int, ...],
        route: str = "rebuild") -> Tensor:  # fmt: skip
    """y + x S^T: x (..., in), y (..., out), a fresh tensor of y's shape and dtype."""
    if route == "plain" or lowrank.is_traced(x):
        return y + F.linear(x.to(y.dtype), matrix(values, places, shape).to(y.dtype))
    if not torch.is_grad_enabled():
        return _sum(x, y, values, places, shape)
    make, tensors = lowrank.kept(x, route)
    return _Sparse.apply(x, y, values, places, shape, make, *tensors)  # type: ignore[no-any-return]


def _sum(x: Tensor, y: Tensor, values: Tensor, places: Tensor, shape: tuple[int, ...]) -> Tensor:
    out = y.new_empty(y.shape)  # no view: the caller may write to it
    with torch.autocast(x.device.type, enabled=False):
        x2, y2 = x.to(y.dtype).reshape(-1, shape[1]), y.reshape(-1, shape[0])
        torch.addmm(y2, x2, matrix(values, places, shape).to(y.dtype).t(), out=out.view(-1, shape[0]))
    return out


class _Sparse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, values: Tensor, places: Tensor, shape: tuple[int, ...],
                make: Callable[..., Tensor] | None, *source: Tensor) -> Tensor:  # fmt: skip
        ctx.make, ctx.shape, ctx.x_shape, ctx.x_dtype, ctx.dtype = make, shape, x.shape, x.dtype, y.dtype
        ctx.save_for_backward(values, places, *source)
        return _sum(x, y, values, places, shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise VisionPEFTError("double backward through fused adapters: set tuner.fused = False for plain torch")
        values, places, *source = ctx.saved_tensors
        with torch.autocast(dy.device.type, enabled=False):
            x2 = (ctx.make(*source) if ctx.make else source[0]).to(ctx.dtype).reshape(-1, ctx.shape[1])
            d2 = dy.reshape(-1, ctx.shape[0])
            dvalues = (d2.t() @ x2).view(-1).index_select(0, places.long()).to(values.dtype)
            dx = None
            if ctx.needs_input_grad[0]:
                dx = (d2 @ matrix(values, places, ctx.shape).to(ctx.dtype)).view(ctx.x_shape).to(ctx.x_dtype)
        return dx, dy, dvalues, None, None, None, *[None] * len(source)
