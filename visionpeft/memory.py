"""Keep nothing that the frozen model would not keep.

A frozen Linear saves no input for backward, but what stands before it usually keeps its own: LayerNorm, GELU and SiLU
save their input, a product saves its factors. `recipe` reads that from the autograd graph and says how to make the
Linear's input again from it, bit for bit, so that an adapter need not keep a second copy. No notes are left on
tensors: they would go stale under in-place operations and foreign hooks.
"""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Nodes whose output views all elements of their input: the storage is that of the node before them.
_VIEWS = frozenset(
    "ViewBackward0 UnsafeViewBackward0 ReshapeAliasBackward0 PermuteBackward0 TransposeBackward0 UnsqueezeBackward0 "
    "SqueezeBackward0 SqueezeBackward1 SqueezeBackward2 AliasBackward0".split()
)


class Recipe(NamedTuple):
    """`make(*tensors)` gives a tensor again; the graph keeps `tensors` in any case."""

    make: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]


def recipe(x: Tensor) -> Recipe | None:
    """How to rebuild `x` from what the autograd graph before it has saved, or None if it must be kept.

    `x` must be kept if it was written in place (its node no longer says what it holds), or if a saved-tensor hook
    (checkpointing, offloading) holds what the node saved: asking for it would undo the hook's work.
    """
    if x.grad_fn is None or x._version:
        return None
    node: Any = x.grad_fn
    while type(node).__name__ in _VIEWS:
        node = node.next_functions[0][0]
    kind = _KINDS.get(type(node).__name__)
    found = kind(node) if kind else _copied(x)
    if found is None:
        return None
    size, stride, offset, make = x.size(), x.stride(), x.storage_offset(), found.make
    return Recipe(lambda *t: make(*t).as_strided(size, stride, offset), tuple(t.detach() for t in found.tensors))


def _copied(x: Tensor) -> Recipe | None:
    """`x`, contiguous, from a source that views, rolls and copies have rearranged: Swin's windows.

    It is what the graph says. A write under no_grad to something between two copies is not in the graph: the gradients
    of the model itself take no notice of it either.
    """
    node: Any = x.grad_fn
    moves: list[Callable[[Tensor], Tensor]] = []
    size = tuple(x.shape)
    while (move := _MOVES.get(type(node).__name__)) is not None and (found := move(node, size)) is not None:
        moves.append(found[0])
        size = found[1]
        node = node.next_functions[0][0]
    kind = _KINDS.get(type(node).__name__)
    source = kind(node) if kind and x.is_contiguous() and not x.storage_offset() else None
    if source is None:
        return None

    def make(*tensors: Tensor) -> Tensor:
        y = source.make(*tensors)
        for step in reversed(moves):
            y = step(y)
        return y.contiguous()

    return Recipe(make, source.tensors)


Size = tuple[int, ...]
Move = tuple[Callable[[Tensor], Tensor], Size]
"""What a node did to its input, and the size of that input."""


def _signed(numbers: Any) -> tuple[int, ...]:
    """Nodes hand out negative numbers as unsigned ones of 64 bits."""
    return tuple(n - 2**64 if n >= 2**63 else n for n in numbers)


def _view(node: Any, size: Size) -> Move:
    return lambda t: t.reshape(size), tuple(node._saved_self_sym_sizes)


def _permute(node: Any, size: Size) -> Move:
    dims = [d % len(size) for d in _signed(node._saved_dims)]
    return lambda t: t.permute(dims), tuple(size[dims.index(d)] for d in range(len(size)))


def _transpose(node: Any, size: Size) -> Move:
    a, b = (d % len(size) for d in _signed((node._saved_dim0, node._saved_dim1)))
    order = [b if d == a else a if d == b else d for d in range(len(size))]
    return lambda t: t.transpose(a, b), tuple(size[d] for d in order)


def _roll(node: Any, size: Size) -> Move:
    shifts, dims = _signed(node._saved_shifts), _signed(node._saved_dims)
    return lambda t: torch.roll(t, shifts, dims) if dims else torch.roll(t, shifts), size


def _pad(node: Any, size: Size) -> Move | None:
    """Padding by nothing, as Swin does at fitting sizes; the node does not say what it padded with."""
    return None if any(node._saved_pad) else (lambda t: t, size)


_MOVES: dict[str, Callable[[Any, Size], Move | None]] = {
    "ConstantPadNdBackward0": _pad,
    "ViewBackward0": _view,
    "UnsafeViewBackward0": _view,
    "ReshapeAliasBackward0": _view,
    "PermuteBackward0": _permute,
    "TransposeBackward0": _transpose,
    "RollBackward0": _roll,
    "CloneBackward0": lambda node, size: (lambda t: t, size),
}


def has_saved_tensor_hooks() -> bool:
    """Whether what autograd saves now goes through a hook, of checkpointing or offloading."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _saved(node: Any, *names: str) -> list[Any] | None:
    """What a node saved under these names, or None where a hook holds one of them or one was overwritten since."""
    raw = [getattr(node, f"_raw_saved_{name}") for name in names]
    if any(r.unpack_hook is not None for r in raw):
        return None
    try:
        return [getattr(node, f"_saved_{name}") for name in names]
    except RuntimeError:  # modified in place: the frozen model's own backward will say so
        return None


def _layer_norm(node: Any) -> Recipe | None:
    saved = _saved(node, "input", "result1", "result2", "weight", "bias")
    if saved is None:
        return None
    if saved[1].dtype != torch.float32 and saved[0].dtype in (torch.float16, torch.bfloat16):
        return None  # the exact statistics were rounded away
    affine = [t is not None for t in saved[3:]]
    exact = saved[1].dtype

    def make(x: Tensor, mean: Tensor, rstd: Tensor, *rest: Tensor) -> Tensor:
        given = iter(rest)
        weight, bias = (next(given) if has else None for has in affine)
        y = x.contiguous().to(exact) - mean  # the layout and the order of the kernel: same bits
        if weight is None:
            y = y.mul_(rstd) if bias is None else torch.addcmul(bias.to(exact), y, rstd)
        elif bias is None:
            y = y.mul_(rstd).mul_(weight)
        else:
            y = torch.addcmul(bias.to(exact), y.mul_(rstd), weight.to(exact))
        return y.to(x.dtype)

    return Recipe(make, tuple(t for t in saved if t is not None))


def _of_input(fn: Callable[[Tensor], Tensor], node: Any) -> Recipe | None:
    saved = _saved(node, "self")
    return None if saved is None else Recipe(fn, tuple(saved))


def _product(node: Any) -> Recipe | None:
    """Both factors, or one that does not learn (weight of an RMSNorm, LayerScale) and what makes the other again."""
    saved = _saved(node, "self", "other")
    if saved is None:
        return None
    lost = [i for i, t in enumerate(saved) if t is None]
    if not lost:
        return Recipe(torch.mul, tuple(saved))
    before = node.next_functions[lost[0]][0]
    kind = _KINDS.get(type(before).__name__)
    source = kind(before) if kind else None
    if source is None:
        return None
    return Recipe(lambda *t: source.make(*t[:-1]) * t[-1], (*source.tensors, saved[1 - lost[0]]))


def _bmm(node: Any) -> Recipe | None:
    """Attention written out, probabilities times values: little work next to the Linear that follows."""
    saved = _saved(node, "self", "mat2")
    return None if saved is None or any(t is None for t in saved) else Recipe(torch.bmm, tuple(saved))


_KINDS: dict[str, Callable[[Any], Recipe | None]] = {
    "BmmBackward0": _bmm,
    "NativeLayerNormBackward0": _layer_norm,
    "GeluBackward0": lambda node: _of_input(functools.partial(F.gelu, approximate=node._saved_approximate), node),
    "SiluBackward0": lambda node: _of_input(F.silu, node),
    "MulBackward0": _product,
}


def live_bytes(fn: Callable[[], Any], device: str | torch.device | None = None) -> int:
    """Bytes that `fn()` allocates and that are still alive while its result is: the result and the graph behind it.

    Counted by the allocator, so that rebuilding is measured as it runs (saved-tensor hooks would switch it off).

    Args:
        device: whose memory; by default that of the current CUDA device if it is in use, else of the CPU.
    """
    gc.collect()
    if device is None:
        device = "cuda" if torch.cuda.is_available() and torch.cuda.memory_allocated() else "cpu"
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        result = fn()
        gc.collect()
        alive = torch.cuda.memory_allocated(device) - before
    else:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler tells of every start and stop otherwise
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            result = fn()
            gc.collect()
        alive = sum(event.self_cpu_memory_usage for event in profile.key_averages())
    del result
    return alive
