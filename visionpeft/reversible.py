"""Blocks that keep nothing: `attach(..., memory="reversible")`, after MEFT (Liao et al., arXiv 2306.00477).

    h[n+1] = F[n](h[n]) + LAMBDA h[n-1],     h[-1] = h[0],     the last block gives (h[N] + h[N-1]) / 2

F is a block with its adapters. It is MEFT1 without the second adapter, and can be undone: h[n-1] follows from h[n+1]
and h[n]. So backward needs the last two states alone and makes the others again one block at a time; its memory does
not grow with the depth. MEFT has LAMBDA 0.1 and undoes it in floating point, where an error grows tenfold with every
block. Here the states are whole numbers, LAMBDA is a power of two and the BITS that the product drops are kept, so that
every state comes back to the bit. These bits, for each element and block, are all that grows with the depth.

The adapted model differs from the pre-trained one at the start, in evaluation as in training; the file says so and
`vp.load` restores it. It does not merge. One backward a forward. Host code may look at what a block gives, but must
hand the very same tensor to the next. A state that does not come back (weights written or adapters switched between
forward and backward, a kernel that gives other bits the second time) is an error, never a wrong gradient. Compiled, it
computes the same in plain torch and keeps what that keeps.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import get_device_states, set_device_states

from visionpeft import binding, lowrank
from visionpeft.errors import VisionPEFTError

BITS = 6
LAMBDA = 2.0**-BITS
_UNIT = 2.0**-40  # of the whole numbers: finer than single precision for all above 1e-5
_MOST = 2.0**21  # states beyond become NaN, as an overflow should
_OUT_OF_TURN = (
    'memory="reversible": the model does something between its blocks (so does FSDP2 that shards each), calls them out '
    'of turn, or has compiled some of them alone; use memory="checkpoint"'
)
_PACKED = 63 // BITS  # blocks whose bits share a number


class Chain:
    """Blocks of one width that follow one another; from the first to the last of them it holds what the next one needs.

    Attributes:
        stream: the two states.
        last: h[n - 1] as a tensor of the graph.
        given: h[n] for as long as the host has it; once it is gone, the model has stopped here, and all else goes too.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.stream: Stream | None = None
        self.last: Tensor | None = None
        self.given: weakref.ref[Tensor] | None = None

    def hold(self, last: Tensor, given: Tensor) -> None:
        self.last, self.given = last, weakref.ref(given, lambda _: self.clear())

    def __getstate__(self) -> dict[str, Any]:
        return {"stream": None, "last": None, "given": None}


class Stream:
    """The two states of one forward, as whole numbers, with what undoing needs.

    The graph holds it, so it holds no tensor of the graph.

    Attributes:
        at: number of blocks behind the states; `before` and `now` are h[at - 1] and h[at], int64.
        calls: those that can be undone; lost: the bits that the product with LAMBDA dropped, packed.
    """

    def __init__(self, x: Tensor) -> None:
        self.at = 0
        self.before = self.now = _whole(x)
        self.dtype = x.dtype
        self.calls: list[Call] = []
        self.lost: list[Tensor] = []

    def enter(self, x: Tensor) -> Tensor:
        """h[at] as the block is given it: x, but in whole numbers, and NaN where x is no number."""
        return torch.where(x.detach().abs() < _MOST, self.state(self.now), torch.nan)

    def do(self, y: Tensor, call: Call | None) -> Tensor:
        """Go on by what a block gave, y = F(h); returns h[at + 1]. Without a call there is no way back."""
        if y.shape != self.now.shape:
            raise VisionPEFTError(f'memory="reversible": a block makes {tuple(y.shape)} of {tuple(self.now.shape)}')
        if call is not None:
            call.total = self.before.sum()
            self._push(self.before & (2**BITS - 1))
            self.calls.append(call)
        self.before, self.now = self.now, _whole(y) + (self.before >> BITS)
        self.at += 1
        good = (y.abs() < _MOST) & (self.now.abs() < _MOST / _UNIT)
        return torch.where(good, self.state(self.now), torch.nan)

    def undo(self) -> tuple[Tensor, Tensor]:
        """Back by one block; returns its input, a leaf, and what it gave, with the graph between them."""
        call = self.calls.pop()
        x = self.state(self.before).requires_grad_()
        y = call.again(x)
        self.before, self.now = ((self.now - _whole(y)) << BITS) | self._pop(), self.before
        self.at -= 1
        if not torch.equal(self.before.sum(), call.total):
            raise VisionPEFTError(
                f'memory="reversible": block {self.at} gave other numbers in backward than in forward. Were weights '
                "written, or adapters switched or scaled in between? (Or numbers overflowed, or a kernel is not "
                "deterministic: torch.use_deterministic_algorithms)"
            )
        return x, y

    def state(self, whole: Tensor) -> Tensor:
        return (whole.double() * _UNIT).to(self.dtype)

    def _push(self, bits: Tensor) -> None:
        if len(self.calls) % _PACKED:
            self.lost[-1] = (self.lost[-1] << BITS) | bits
        else:
            self.lost.append(bits)

    def _pop(self) -> Tensor:
        bits = self.lost[-1] & (2**BITS - 1)
        if len(self.calls) % _PACKED:
            self.lost[-1] = self.lost[-1] >> BITS
        else:
            self.lost.pop()
        return bits


def _whole(x: Tensor) -> Tensor:
    return (x.detach().double().clamp(-_MOST, _MOST) / _UNIT).round().long()


class Call:
    """One block's call, which can be repeated exactly: random numbers, autocast, the tensors that learn."""

    total: Tensor

    def __init__(
        self, block: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor
    ) -> None:
        self.block, self.forward, self.args, self.kwargs = block, forward, args, kwargs
        self.kind = x.device.type
        self.random = torch.get_rng_state()
        self.devices, self.states = get_device_states(x)
        self.autocast = torch.is_autocast_enabled(self.kind), torch.get_autocast_dtype(self.kind)
        self.learning = _learning(block)

    @torch.enable_grad()  # the same kernels, and so the same bits, as when it is repeated
    def first(self, x: Tensor) -> Tensor:
        return self.forward(x.requires_grad_(), *self.args, **self.kwargs).detach()  # type: ignore[no-any-return]

    @torch.enable_grad()
    def again(self, x: Tensor) -> Tensor:
        if list(map(id, _learning(self.block))) != list(map(id, self.learning)):
            raise VisionPEFTError(
                'memory="reversible": other tensors learn now than in forward (another adapter is active, or '
                'functional_call lent them). Use memory="rebuild" for that'
            )
        on, dtype = self.autocast
        with torch.random.fork_rng(self.devices, device_type=self.kind), torch.autocast(self.kind, dtype, enabled=on):
            torch.set_rng_state(self.random)
            set_device_states(self.devices, self.states, device_type=self.kind)
            return self.forward(x, *self.args, **self.kwargs)  # type: ignore[no-any-return]


class ReversibleSite(binding.Mixin):
    layer = 0

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        held, inner = self.peft, super().forward  # type: ignore[misc]
        if ReversibleSite.__name__ not in held.levers:
            return inner(x, *args, **kwargs)  # type: ignore[no-any-return]
        chain, place = held.chain
        if lowrank.is_traced(x):
            return _plain(chain, place, x, inner(x, *args, **kwargs))
        if not torch.is_grad_enabled():
            binding.refuse_reentrant()
        if any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves((args, kwargs))):
            raise VisionPEFTError('memory="reversible": a block was given another tensor that needs a gradient')
        if place == "first":
            chain.stream = Stream(x)
            chain.hold(x, x)
        if chain.given is None or chain.given() is not x:
            chain.clear()
            raise VisionPEFTError(_OUT_OF_TURN)
        try:
            y = _step(chain, self, inner, x, args, kwargs)  # type: ignore[arg-type]
        except BaseException:
            chain.clear()
            raise
        chain.hold(x, y)
        if place == "last":
            chain.clear()
            return (y + x) / 2
        return y


def _plain(chain: Chain, place: str, x: Tensor, y: Tensor) -> Tensor:
    """The formula where every step must be seen."""
    last = x if place == "first" else chain.last
    if last is None:
        raise VisionPEFTError(_OUT_OF_TURN)
    y = y + LAMBDA * last
    chain.last = None if place == "last" else x
    return (y + x) / 2 if place == "last" else y


def _step(chain: Chain, block: nn.Module, inner: Any, x: Tensor, args: tuple[Any, ...],
          kwargs: dict[str, Any]) -> Tensor:  # fmt: skip
    stream, last = chain.stream, chain.last
    assert stream is not None
    if torch.is_grad_enabled():
        call = Call(block, inner, args, kwargs, x)
        return _Block.apply(stream, call, last, x, *call.learning)  # type: ignore[no-any-return]
    if stream.calls:  # blocks before it can be undone only if it can
        call = Call(block, inner, args, kwargs, x)
        return stream.do(call.first(stream.enter(x)), call)
    return stream.do(inner(stream.enter(x), *args, **kwargs), None)


def _learning(block: nn.Module) -> list[Tensor]:
    """All that learns in a block, factors that its adapters share with others included."""
    shared = [m.__dict__["shared"] for m in block.modules() if isinstance(m.__dict__.get("shared"), nn.Module)]
    found = {id(p): p for m in (block, *shared) for p in m.parameters() if p.requires_grad}
    return list(found.values())


class _Block(torch.autograd.Function):
    """(h[n-1], h[n]) -> h[n+1]; keeps the stream alone."""

    @staticmethod
    def forward(ctx: Any, stream: Stream, call: Call, last: Tensor, x: Tensor, *params: Tensor) -> Tensor:
        ctx.stream, ctx.index = stream, stream.at
        return stream.do(call.first(stream.enter(x)), call)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        stream = ctx.stream
        if torch.is_grad_enabled():
            raise VisionPEFTError('memory="reversible" has no double backward')
        if stream.at <= ctx.index:
            raise VisionPEFTError('memory="reversible": a second backward through the same forward')
        while stream.at > ctx.index + 1:  # blocks that no gradient came through
            stream.undo()
        learning = stream.calls[-1].learning
        x, y = stream.undo()
        needed = ctx.needs_input_grad[4:]
        wanted = [p for p, n in zip(learning, needed, strict=True) if n]
        dx, *found = torch.autograd.grad(y, [x, *wanted], dy.to(y.dtype), allow_unused=True)
        grads = iter(found)
        if not stream.calls:
            stream.before = stream.now = dy.new_empty(0)
        return None, None, dy * LAMBDA, dx, *[next(grads) if n else None for n in needed]
