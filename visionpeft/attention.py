"""One switch for how a model computes attention, whatever library it is from.

    vp.set_attention(model, "chunked")     auto, sdpa, chunked, math, xformers; None puts everything back

timm, open_clip, diffusers and transformers all end in `F.scaled_dot_product_attention`. Modules known to do so are
dressed with a mixin under which that one function is answered by the backend; everything before it (projections with
their adapters, rotary embeddings, masks) is as it was.

`sdpa` is torch's own and the floor: nothing here keeps less where it runs its fused kernels. These do not exist for
attention dropout (on CPU), for a mask that learns, and for values of another width: there torch keeps the scores of
all pairs, and `chunked` (Rabe and Staats 2021, arXiv 2112.05682) computes them again in backward, some rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from visionpeft import backbones, binding
from visionpeft.binding import Mixin
from visionpeft.errors import VisionPEFTError, require
from visionpeft.multihead import MultiheadSite

USER = "*attention"  # under which the dressed modules hold our mixin
SCORES = 2**22
"""Scores that a chunk holds at a time."""
WORTH = 2**24
"""Scores above which `auto` computes in chunks where torch would keep them all: 64 MiB in single precision."""


class AttentionError(VisionPEFTError):
    """An attention backend that is unknown, or cannot run here."""


class Call(NamedTuple):
    """The arguments of `F.scaled_dot_product_attention`: q (..., L, E), k (..., S, E), v (..., S, Ev)."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    dropout: float = 0.0
    causal: bool = False
    scale: float | None = None
    grouped: bool = False


def set_attention(model: nn.Module, backend: str | None = "auto", trained_tokens: int | None = None) -> int:
    """Choose how the attention modules of `model` compute; returns how many there are.

    Args:
        backend: "auto" (chunked where torch would keep large scores, else sdpa), "sdpa", "chunked", "math" (written
            out), "xformers" (CUDA, its extra), or None to leave the modules as they were.
        trained_tokens: for other resolutions than in training, the number of tokens T then. Self-attention over N
            tokens gets the scale sqrt(ln N / ln T) / sqrt(E), which keeps its entropy (Jin et al. 2023,
            arXiv 2306.08645, eq. 7); cross-attention is left alone.

    Raises:
        AttentionError: no such backend, it cannot run here, or the model has no attention that is known.
        SiteError: one carries a `forward` of its own; nothing was changed.
    """
    if backend is not None and backend not in BACKENDS:
        raise AttentionError(f"unknown attention backend {backend!r}: one of {', '.join(BACKENDS)}, or None")
    if backend == "xformers":
        _check_xformers(model)
    found = list(_attention_modules(model))
    if not found:
        raise AttentionError(f"no attention module that is known in this {type(model).__name__}")
    if backend is None:
        for _, module, held in list(binding.holders(model)):
            if USER in held.users:
                held.attention = None
                binding.release(module, USER)
        return len(found)
    for module in found:
        binding.check_forward(module, [AttentionSite])
    for module in found:
        mixins = (MultiheadSite,) if isinstance(module, nn.MultiheadAttention) else ()
        binding.grip(module, USER, AttentionSite, *mixins).attention = (backend, trained_tokens)
    for module, attribute, value in list(_switches(model)):
        held = binding.switch(module, USER, attribute, value)
        binding.throw_switches(module, held, held.active)
    return len(found)


def explain(call: Call) -> tuple[str, str]:
    """The backend that "auto" takes for a call, and why."""
    reasons = []
    if call.dropout:
        reasons.append("attention dropout")
    if call.mask is not None and call.mask.requires_grad:
        reasons.append("a mask that learns")
    if call.v.shape[-1] != call.q.shape[-1]:
        reasons.append("values of another width")
    scores = math.prod(call.q.shape[:-1]) * call.k.shape[-2]
    if not reasons:
        return "sdpa", "torch has a fused kernel that keeps no scores"
    if scores < WORTH:
        return "sdpa", f"{' and '.join(reasons)}: torch keeps {scores:,} scores, too few to matter"
    return "chunked", f"{' and '.join(reasons)}: torch would keep {scores:,} scores"


def _attention_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Modules whose forward ends in `F.scaled_dot_product_attention`, or can be told to."""
    for module in model.modules():
        cls = binding.base_class(module)
        library = cls.__module__.partition(".")[0]
        timm = library == "timm" and hasattr(module, "fused_attn")
        diffusers = library == "diffusers" and hasattr(module, "processor") and hasattr(module, "to_out")
        clip = library == "open_clip" and cls.__name__ == "Attention"
        if timm or diffusers or clip or isinstance(module, nn.MultiheadAttention):
            yield module


def _switches(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """What must be set so that the attention modules are called, and call torch's function."""
    for module in _attention_modules(model):
        if hasattr(module, "fused_attn"):  # timm's own switch between sdpa and written out
            yield module, "fused_attn", True
    for _, module in binding.walk(model, "", set()):
        for name, child in module.named_children():
            if any(isinstance(m, nn.MultiheadAttention) for m in child.modules()):
                yield from ((module, *item) for item in backbones.switches(module, name).items())


class AttentionSite(Mixin):
    """A module under which torch's attention function is answered by a backend."""

    layer = 0
    stays = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        backend, tokens = self.peft.attention  # type: ignore[misc]
        with _Answer(BACKENDS[backend], tokens):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


class _Answer(TorchFunctionMode):
    """Calls of `F.scaled_dot_product_attention` go to a backend, all others where they went."""

    def __init__(self, backend: Callable[[Call], Tensor], trained_tokens: int | None) -> None:
        super().__init__()
        self.backend, self.trained_tokens = backend, trained_tokens

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        call = _cast(_parse(*args, **kwargs))
        n = call.q.shape[-2]
        if self.trained_tokens and n == call.k.shape[-2] and n > 1:
            factor = math.sqrt(math.log(n) / math.log(self.trained_tokens))
            call = call._replace(scale=factor * (call.scale or call.q.shape[-1] ** -0.5))
        return self.backend(call)


def _parse(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
           is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Call:  # fmt: skip
    return Call(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def _cast(call: Call) -> Call:
    """The call in the type that autocast has for torch's function, so that no backend mixes types."""
    device = call.q.device.type
    if not torch.is_autocast_enabled(device) or call.q.dtype == torch.float64:
        return call
    dtype = torch.get_autocast_dtype(device)
    mask = call.mask if call.mask is None or call.mask.dtype == torch.bool else call.mask.to(dtype)
    return call._replace(q=call.q.to(dtype), k=call.k.to(dtype), v=call.v.to(dtype), mask=mask)


# ---- backends


def _sdpa(call: Call) -> Tensor:
    return F.scaled_dot_product_attention(call.q, call.k, call.v, call.mask, call.dropout, call.causal,
                                          scale=call.scale, enable_gqa=call.grouped)  # fmt: skip


def _auto(call: Call) -> Tensor:
    return BACKENDS[explain(call)[0]](call)


def _math(call: Call) -> Tensor:
    call = _plain(call)
    scores = (call.q * _scale(call)) @ call.k.mT
    scores = scores if call.mask is None else scores + call.mask
    return F.dropout(scores.softmax(-1), call.dropout) @ call.v


def _chunked(call: Call) -> Tensor:
    call = _plain(call)
    rows = max(16, SCORES // max(1, math.prod(call.q.shape[:-2]) * call.k.shape[-2]))
    seed = int(torch.randint(2**62, ())) if call.dropout else 0
    mask = call.mask
    if mask is not None:
        mask = mask.expand(*mask.shape[:-2], call.q.shape[-2], call.k.shape[-2])
    return _Chunked.apply(call.q, call.k, call.v, mask, _scale(call), call.dropout, seed, rows)


def _xformers(call: Call) -> Tensor:
    ops = require("xformers.ops", extra="xformers")
    call = _plain(call)
    mask = None if call.mask is None else call.mask.expand(*call.q.shape[:-1], call.k.shape[-2]).to(call.q.dtype)
    q, k, v = (t.transpose(1, 2) for t in (call.q, call.k, call.v))  # its layout is (B, L, heads, E)
    return ops.memory_efficient_attention(q, k, v, mask, call.dropout, _scale(call)).transpose(1, 2)


BACKENDS: dict[str, Callable[[Call], Tensor]] = {
    "auto": _auto, "sdpa": _sdpa, "chunked": _chunked, "math": _math, "xformers": _xformers,
}  # fmt: skip


def _check_xformers(model: nn.Module) -> None:
    require("xformers.ops", extra="xformers")
    device = next(model.parameters()).device.type
    if device != "cuda":
        raise AttentionError(f"xformers runs on CUDA and this model is on {device}: use 'auto' or 'chunked'")


def _scale(call: Call) -> float:
    return call.q.shape[-1] ** -0.5 if call.scale is None else call.scale


def _plain(call: Call) -> Call:
    """The same with an additive mask only, and one key for each query head."""
    mask = call.mask
    if call.causal:
        mask = torch.ones(call.q.shape[-2], call.k.shape[-2], dtype=torch.bool, device=call.q.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=call.q.dtype).masked_fill_(~mask, float("-inf"))
    k, v = call.k, call.v
    if call.grouped:
        k, v = (t.repeat_interleave(call.q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    return call._replace(k=k, v=v, mask=mask, causal=False, grouped=False)


class _Chunked(torch.autograd.Function):
    """Attention over some rows of q at a time; the probabilities are computed again in backward.

    Kept: q, k, v and the mask. Dropout masks are drawn again from seeds, one for each chunk.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float,
                seed: int, rows: int) -> Tensor:  # fmt: skip
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale, ctx.dropout, ctx.seed, ctx.rows = scale, dropout, seed, rows
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        for i, lo in enumerate(range(0, q.shape[-2], rows)):
            chunk = slice(lo, lo + rows)
            p = _probabilities(q[..., chunk, :], k, None if mask is None else mask[..., chunk, :], scale)
            kept = _kept(p, dropout, seed + i)
            out[..., chunk, :] = (p if kept is None else p * kept) @ v
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        q, k, v, mask = ctx.saved_tensors
        if torch.is_grad_enabled():
            raise AttentionError("double backward through chunked attention: set_attention(model, 'math')")
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        dmask = torch.zeros_like(mask) if ctx.needs_input_grad[3] else None
        for i, lo in enumerate(range(0, q.shape[-2], ctx.rows)):
            chunk = slice(lo, lo + ctx.rows)
            d, part = dy[..., chunk, :], q[..., chunk, :]
            p = _probabilities(part, k, None if mask is None else mask[..., chunk, :], ctx.scale)
            kept = _kept(p, ctx.dropout, ctx.seed + i)
            dp = d @ v.mT
            dv += (p if kept is None else p * kept).mT @ d
            dp = dp if kept is None else dp * kept
            ds = p * (dp - (dp * p).sum(-1, keepdim=True))
            dq[..., chunk, :] = ds @ k * ctx.scale
            dk += ds.mT @ part * ctx.scale
            if dmask is not None:
                dmask[..., chunk, :] += ds.sum_to_size(dmask[..., chunk, :].shape).to(dmask.dtype)
        return dq, dk, dv, dmask, None, None, None, None


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = (q * scale) @ k.mT
    return (scores if mask is None else scores + mask).softmax(-1)


def _kept(p: Tensor, dropout: float, seed: int) -> Tensor | None:
    """0 or 1 / (1 - dropout) for each probability; the same seed draws it again."""
    if not dropout:
        return None
    generator = torch.Generator(p.device).manual_seed(seed)
    return torch.empty_like(p).bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)
