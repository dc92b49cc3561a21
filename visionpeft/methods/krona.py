r"""KronA for diffusion (DiffuseKronA, Marjit et al. 2024, arXiv 2402.17412; after KronA, arXiv 2212.10650).

    W' = W + A ⊗ B,   A (a1, a2), B (b1, b2),   a1 b1 = out, a2 b2 = in

a1 a2 + b1 b2 numbers a site, and the rank of the change is rank(A) rank(B). A is drawn and B is zero: identity at the
start; the scale is 1. The product is never built to run: with x as (.., a2, b2) the change is A X B^T, contracted in
the cheaper order, and its intermediate is made again in backward. Sites: query, key, value and output of attention, as
in the paper. Merges.

The official code (IBM/DiffuseKronA) gives the rows of A ⊗ B in another order; `from_official` puts B's place right. Its
alpha does not work, so that there is none here. The paper's shape (4, 64) needs sides that 4 and 64 divide; (16, 16)
has as many numbers on SDXL and is the one that PEFT, LyCORIS and diffusers can read (they take one factor for both).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visionpeft import lowrank
from visionpeft.adapter import Adapter, Method, factory
from visionpeft.errors import MethodError, VisionPEFTError
from visionpeft.methods.roles import attention_first
from visionpeft.sites import Backbone, Site


@dataclass(frozen=True)
class KronA(Method):
    """
    Attributes:
        a1, a2: rows and columns of A; they divide the rows and the columns of the weight. Any two numbers do.
        init: how A is drawn: "normal" (deviation 1 / a1, the official code) or "kaiming" (uniform, a = sqrt 5).
    """

    key: ClassVar[str] = "krona"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    a1: int = 4
    a2: int = 64
    init: str = "normal"

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.a1, self.a2) < 1:
            raise MethodError(f"a1={self.a1}, a2={self.a2}: expected at least 1")
        if self.init not in ("normal", "kaiming"):
            raise MethodError(f"init={self.init!r}: expected 'normal' or 'kaiming'")

    def default_targets(self, backbone: Backbone) -> str:
        return attention_first(backbone)

    def refuses(self, site: Site, module: nn.Module) -> str | None:
        if (reason := super().refuses(site, module)) is not None:
            return reason
        out, width = site.shape
        if out % self.a1 or width % self.a2:
            return (
                f"a1={self.a1} must divide its {out} rows and a2={self.a2} its {width} columns: "
                f"a1={math.gcd(out, self.a1)}, a2={math.gcd(width, self.a2)} would do here"
            )
        return None

    def build(self, site: Site, module: nn.Module) -> Adapter:
        return KronAdapter(self, (site.shape[0], site.shape[1]), **factory(module))


class KronAdapter(Adapter):
    """a (a1, a2), b (b1, b2)."""

    def __init__(self, method: KronA, shape: tuple[int, int], **kw: Any) -> None:
        super().__init__()
        self.init = method.init
        self.a = nn.Parameter(torch.empty(method.a1, method.a2, **kw))
        self.b = nn.Parameter(torch.empty(shape[0] // method.a1, shape[1] // method.a2, **kw))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.init == "normal":
            nn.init.normal_(self.a, std=1 / self.a.shape[0])
        else:
            nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        nn.init.zeros_(self.b)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return add_kron(x, y, self.a, self.b, self.route)

    def weight(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return w + torch.kron(self.a, self.b), b


def from_official(a: Tensor, b: Tensor) -> Tensor:
    """The change of the weight (a1 b1, a2 b2) that the official code makes of its factors, rows in its order."""
    rows = torch.arange(a.shape[0] * b.shape[0]).view(a.shape[0], b.shape[0]).T.flatten()
    return torch.kron(a, b)[rows]


def add_kron(x: Tensor, y: Tensor, a: Tensor, b: Tensor, route: str = "rebuild") -> Tensor:
    """y + x (A ⊗ B)^T: x (.., a2 b2), y (.., a1 b1), a fresh tensor of y's shape and dtype."""
    if route == "plain" or lowrank.is_traced(x) or not torch.is_grad_enabled():
        return _product(x.to(y.dtype), y, a.to(y.dtype), b.to(y.dtype))
    make, tensors = lowrank.kept(x, route)
    return _Kron.apply(x, y, a, b, make, *tensors)  # type: ignore[no-any-return]


def _left_first(a: Tensor, b: Tensor) -> bool:
    """Whether (A X) B^T takes fewer products than A (X B^T)."""
    (a1, a2), (b1, b2) = a.shape, b.shape
    return a1 * b2 * (a2 + b1) < a2 * b1 * (b2 + a1)


def _inner(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The first of the two contractions: A X (n, a1, b2) or X B^T (n, a2, b1), of x (n, a2, b2)."""
    return torch.matmul(a, x) if _left_first(a, b) else x @ b.t()


def _product(x: Tensor, y: Tensor, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """y + x (A ⊗ B)^T, written to `out` if given."""
    inner = _inner(x.reshape(-1, a.shape[1], b.shape[1]), a, b)
    if _left_first(a, b):
        into = None if out is None else out.view(-1, b.shape[0])
        y2 = torch.addmm(y.reshape(-1, b.shape[0]), inner.reshape(-1, b.shape[1]), b.t(), out=into)  # type: ignore[call-overload]
        return y2.view(y.shape)
    into = None if out is None else out.view(-1, a.shape[0], b.shape[0])
    y3 = y.reshape(-1, a.shape[0], b.shape[0])
    return torch.baddbmm(y3, a.expand(len(y3), -1, -1), inner, out=into).view(y.shape)  # type: ignore[call-overload, no-any-return]


class _Kron(torch.autograd.Function):
    """Keeps the factors and what rebuilds x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, a: Tensor, b: Tensor, make: Callable[..., Tensor] | None,
                *source: Tensor) -> Tensor:  # fmt: skip
        ctx.make, ctx.x_shape, ctx.x_dtype, ctx.dtype = make, x.shape, x.dtype, y.dtype
        ctx.save_for_backward(a, b, *source)
        out = y.new_empty(y.shape)  # no view: the caller may write to it
        with torch.autocast(x.device.type, enabled=False):
            _product(x.to(y.dtype), y, a.to(y.dtype), b.to(y.dtype), out)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise VisionPEFTError("double backward through fused adapters: set tuner.fused = False for plain torch")
        a, b, *source = ctx.saved_tensors
        with torch.autocast(dy.device.type, enabled=False):
            x = (ctx.make(*source) if ctx.make else source[0]).to(ctx.dtype)
            dx, da, db = _gradients(x, dy, a.to(ctx.dtype), b.to(ctx.dtype), ctx.needs_input_grad[0])
        dx = None if dx is None else dx.view(ctx.x_shape).to(ctx.x_dtype)
        return dx, dy, da.to(a.dtype), db.to(b.dtype), None, *[None] * len(source)


def _gradients(x: Tensor, dy: Tensor, a: Tensor, b: Tensor, wants_x: bool) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of x, A and B."""
    x3 = x.reshape(-1, a.shape[1], b.shape[1])
    d3 = dy.reshape(-1, a.shape[0], b.shape[0])
    inner = _inner(x3, a, b)
    if _left_first(a, b):
        dinner = d3 @ b
        db = d3.reshape(-1, b.shape[0]).t() @ inner.reshape(-1, b.shape[1])
        return torch.matmul(a.t(), dinner) if wants_x else None, _outer(dinner, x3), db
    dinner = torch.matmul(a.t(), d3)
    db = dinner.reshape(-1, b.shape[0]).t() @ x3.reshape(-1, b.shape[1])
    return dinner @ b if wants_x else None, _outer(d3, inner), db


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """Sum over n of left[n] right[n]^T: (n, i, k), (n, j, k) -> (i, j)."""
    return left.transpose(0, 1).flatten(1) @ right.transpose(0, 1).flatten(1).t()
