"""Blocks that keep nothing: `attach(..., memory="reversible")`, after MEFT (Liao et al., arXiv 2306.00477).

    h[n+1] = F[n](h[n]) + LAMBDA h[n-1],     h[-1] = h[0],     the last block gives (h[N] + h[N-1]) / 2

F is a block with its adapters. It is MEFT1 without the second adapter, and can be undone: h[n-1] follows from h[n+1]
and h[n]. So backward needs the last two states alone and makes the others again one block at a time; its memory does
not grow with the depth. MEFT has LAMBDA 0.1 and undoes it in floating point, where an error grows tenfold with every
block. Here the states are whole numbers, LAMBDA is a power of two and the BITS that the product drops are kept, so that
every state comes back to the bit. These bits, for each element and block, are all that grows with the depth.

The adapted model differs from the pre-trained one at the start, in evaluation as in training; the file says so and
`vp.load` restores it. It does not merge. One backward a forward. Host code may look at what a block gives, but must
hand the very same tensor to the next. Compiled, it computes the same in plain torch and keeps what that keeps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from visionpeft import lowrank
from visionpeft.binding import Mixin
from visionpeft.errors import VisionPEFTError

BITS = 6
LAMBDA = 2.0**-BITS
_UNIT = 2.0**-40  # of the whole numbers: finer than single precision for all above 1e-5
_MOST = 2.0**21  # states beyond become NaN, as an overflow should


class Chain:
    """Blocks of one width that follow one another; between the first and the last of them it holds the stream."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.stream: Stream | None = None
        self.last: Any = None  # h[n - 1] while compiled

    def __getstate__(self) -> dict[str, Any]:
        return {"length": self.length, "stream": None, "last": None}


class Stream:
    """The two states of one forward, as whole numbers, with what undoing needs.

    Attributes:
        at: number of blocks behind the states; `before` and `now` are h[at - 1] and h[at], int64.
        last, given: h[at - 1] and h[at] as tensors of the graph, until the last block.
        lost: bits that the product with LAMBDA dropped, packed; calls: block, arguments and random state of each.
    """

    def __init__(self, x: Tensor) -> None:
        self.at = 0
        self.before = self.now = _whole(x)
        self.last = self.given = x
        self.dtype = x.dtype
        self.lost: list[Tensor] = []
        self.calls: list[Call] = []

    def do(self, y: Tensor, keep: bool) -> Tensor:
        """Go on by what a block gave, y = F(h); returns h[at + 1]."""
        if keep:
            self._push(self.before & (2**BITS - 1))
        self.before, self.now = self.now, _whole(y) + (self.before >> BITS)
        self.at += 1
        good = (y.abs() < _MOST) & (self.now.abs() < _MOST / _UNIT)
        return torch.where(good, self.state(self.now), torch.nan)

    def undo(self) -> tuple[Tensor, Tensor]:
        """Back by one block; returns its input, a leaf, and what it gave, with the graph between them."""
        x = self.state(self.before).requires_grad_()
        y = self.calls.pop().again(x)
        self.before, self.now = ((self.now - _whole(y)) << BITS) | self._pop(), self.before
        self.at -= 1
        return x, y

    def state(self, whole: Tensor) -> Tensor:
        return (whole.double() * _UNIT).to(self.dtype)

    def _push(self, bits: Tensor) -> None:
        if self.at % (63 // BITS):
            self.lost[-1] = (self.lost[-1] << BITS) | bits
        else:
            self.lost.append(bits)

    def _pop(self) -> Tensor:
        bits = self.lost[-1] & (2**BITS - 1)
        if (self.at - 1) % (63 // BITS):
            self.lost[-1] = self.lost[-1] >> BITS
        else:
            self.lost.pop()
        return bits


def _whole(x: Tensor) -> Tensor:
    return (x.detach().double().clamp(-_MOST, _MOST) / _UNIT).round().long()


class Call:
    """One block's call, which can be repeated exactly: random numbers, autocast."""

    def __init__(self, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> None:
        self.forward, self.args, self.kwargs = forward, args, kwargs
        self.random = torch.get_rng_state()
        self.devices, self.states = get_device_states(x)
        self.kind = x.device.type
        self.autocast = torch.is_autocast_enabled(self.kind), torch.get_autocast_dtype(self.kind)

    @torch.enable_grad()  # the same kernels, and so the same bits, every time
    def __call__(self, x: Tensor) -> Tensor:
        on, dtype = self.autocast
        with torch.autocast(self.kind, dtype, enabled=on):
            return self.forward(x, *self.args, **self.kwargs)  # type: ignore[no-any-return]

    def again(self, x: Tensor) -> Tensor:
        with torch.random.fork_rng(self.devices, device_type=self.kind):
            torch.set_rng_state(self.random)
            set_device_states(self.devices, self.states)
            return self(x)


class ReversibleSite(Mixin):
    layer = 0

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        held = self.peft
        if not any(ReversibleSite in held.users.get(name, ()) for name in held.active):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc, no-any-return]
        chain, index = held.chain
        if lowrank.is_traced(x):
            return self._plain(chain, index, x, super().forward(x, *args, **kwargs))  # type: ignore[misc]
        stream = self._stream(chain, index, x)
        if any(isinstance(a, Tensor) and a.requires_grad for a in (*args, *kwargs.values())):
            raise VisionPEFTError('memory="reversible": a block was given another tensor that needs a gradient')
        try:
            y = _step(stream, Call(super().forward, args, kwargs, x), _learning(self))
        except BaseException:
            chain.stream = None
            raise
        if index < chain.length - 1:
            return y
        chain.stream = None
        return (y + stream.last) / 2

    def _plain(self, chain: Chain, index: int, x: Tensor, y: Tensor) -> Tensor:
        y = y + LAMBDA * (chain.last if index else x)
        chain.last = x if index < chain.length - 1 else None
        return y if index < chain.length - 1 else (y + x) / 2

    def _stream(self, chain: Chain, index: int, x: Tensor) -> Stream:
        if index == 0:
            chain.stream = Stream(x)
        stream = chain.stream
        if stream is None or stream.at != index or stream.given is not x:
            chain.stream = None
            raise VisionPEFTError(
                'memory="reversible": the model does something between its blocks, or calls them out of turn; use '
                'memory="checkpoint"'
            )
        return stream


def _step(stream: Stream, call: Call, params: list[Tensor]) -> Tensor:
    last, x = stream.last, stream.given
    if torch.is_grad_enabled():
        stream.calls.append(call)
        y: Tensor = _Block.apply(stream, last, x, *params)
    else:
        y = stream.do(call(stream.state(stream.now)).detach(), keep=False)
    stream.last, stream.given = x, y
    return y


def _learning(block: nn.Module) -> list[Tensor]:
    """All that learns in a block, factors that its adapters share with others included."""
    shared = [m.__dict__["shared"] for m in block.modules() if isinstance(m.__dict__.get("shared"), nn.Module)]
    found = {id(p): p for m in (block, *shared) for p in m.parameters() if p.requires_grad}
    return list(found.values())


class _Block(torch.autograd.Function):
    """(h[n-1], h[n]) -> h[n+1]; keeps the stream alone."""

    @staticmethod
    def forward(ctx: Any, stream: Stream, last: Tensor, x: Tensor, *params: Tensor) -> Tensor:
        ctx.stream, ctx.index, ctx.params = stream, stream.at, params
        return stream.do(stream.calls[-1](stream.state(stream.now)).detach(), keep=True)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        stream = ctx.stream
        if torch.is_grad_enabled():
            raise VisionPEFTError('memory="reversible" has no double backward')
        if stream.at <= ctx.index:
            raise VisionPEFTError('memory="reversible": a second backward through the same forward')
        while stream.at > ctx.index + 1:  # blocks that no gradient came through
            stream.undo()
        x, y = stream.undo()
        wanted = [p for p, needed in zip(ctx.params, ctx.needs_input_grad[3:], strict=True) if needed]
        dx, *found = torch.autograd.grad(y, [x, *wanted], dy.to(y.dtype), allow_unused=True)
        grads = iter(found)
        return None, dy * LAMBDA, dx, *[next(grads) if n else None for n in ctx.needs_input_grad[3:]]
