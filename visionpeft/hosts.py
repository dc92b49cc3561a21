"""Modules that read the weights of their parts themselves, so that the parts' adapters act at the host.

    nn.MultiheadAttention        its own forward, in `visionpeft.multihead`
    open_clip's AttentionPool2d  its own forward: q, k, v and output projection through their adapters
    raw projections              `x @ visual.proj`, `F.linear(x, in_proj_weight)`: whoever reads the tensor gets the
                                 adapted one, on every entry point (`encode_text` is no forward)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionpeft import acting, backbones, multihead
from visionpeft.adapter import Adapter
from visionpeft.binding import Mixin
from visionpeft.errors import SiteError

POOL = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "attn_out": "c_proj"}


class Place(NamedTuple):
    """Where the weight and the bias of a part live; `transposed` if the tensor is used as x @ P."""

    module: nn.Module
    weight: str
    bias: str
    rows: slice = slice(None)
    b_rows: slice = slice(None)
    transposed: bool = False


class PoolSite(Mixin):
    """The ResNets' attention pooling: x (N, C, H, W) -> (N, out), the mean token attending to itself and all others."""

    layer = 2

    def forward(self, x: Tensor) -> Tensor:
        adapters = self.peft.acting()
        if not adapters:
            return super().forward(x)  # type: ignore[misc]
        m: Any = self
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + m.positional_embedding.to(x.dtype)
        q, k, v = (_pool_linear(m, adapters, place, t) for place, t in zip(POOL, (x[:, :1], x, x), strict=False))
        q, k, v = (t.unflatten(-1, (m.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return _pool_linear(m, adapters, "attn_out", y)[:, 0]


def _pool_linear(m: Any, adapters: list[Adapter], place: str, x: Tensor) -> Tensor:
    linear = getattr(m, POOL[place])
    return acting.linear(x, linear.weight, linear.bias, [a for a in adapters if a.place == place], m.peft.route)


class RawSite(Mixin):
    """A module with raw tensors as weights: reading one gives it adapted, writing and saving see the original."""

    layer = 4


def _projection(name: str) -> property:
    def read(self: Any) -> Tensor | None:
        value = self._parameters[name]
        for adapter in self.peft.acting():
            if adapter.place == name and value is not None:
                value = acting.adapted(adapter, value.t(), None)[0].t()
        return value

    return property(read)


def _fused(index: int) -> property:
    def read(self: Any) -> Tensor | None:
        pair = self._parameters["in_proj_weight"], self._parameters["in_proj_bias"]
        for adapter in self.peft.acting():
            rows = slice(*adapter.rows)  # type: ignore[misc]
            pair = acting.adapted(adapter, *pair, rows, rows)
        return pair[index]

    return property(read)


class VisualProjectionSite(RawSite):
    proj = _projection("proj")


class TextProjectionSite(RawSite):
    text_projection = _projection("text_projection")


class FusedSite(RawSite):
    """open_clip's custom attention, which calls its out_proj but reads in_proj_weight (3d, d) itself."""

    in_proj_weight = _fused(0)
    in_proj_bias = _fused(1)


RAW: dict[str, type[RawSite]] = {
    "proj": VisualProjectionSite,
    "text_projection": TextProjectionSite,
    "in_proj_weight": FusedSite,
}


def mixin(host: nn.Module) -> type[Mixin]:
    """What the host of other modules' or its own tensors' sites does."""
    if isinstance(host, nn.MultiheadAttention):
        return multihead.MultiheadSite
    raw = backbones.raw(host)
    return RAW[next(iter(raw))] if raw else PoolSite


def check(host: nn.Module, adapter: Adapter) -> None:
    """Refuse what a raw tensor cannot host: only its values can be adapted.

    Raises:
        SiteError: the adapter acts on an output, or drops entries of its input.
    """
    if not backbones.raw(host):
        return
    why = "" if adapter.overrides("weight") else "it acts on an output"
    why = "dropout acts on an input: set dropout=0" if getattr(adapter, "dropout", 0.0) else why
    if why:
        raise SiteError(
            f"{type(adapter).__name__} at {adapter.label}: the model reads this tensor itself, so that only its "
            f"values can be adapted, and {why}"
        )


def place(host: nn.Module, name: str) -> Place:
    """Where the weight of the part `name` of a host lives."""
    find: Callable[[Any], dict[str, Place]]
    if isinstance(host, nn.MultiheadAttention):
        return Place(*multihead.places(host)[name])
    find = _raw_places if backbones.raw(host) else _pool_places
    return find(host)[name]


def _raw_places(m: Any) -> dict[str, Place]:
    found: dict[str, Place] = {}
    for tensor, role in backbones.raw(m).items():
        if isinstance(role, tuple):
            size = m._parameters[tensor].shape[0] // len(role)
            spans = [slice(i * size, (i + 1) * size) for i in range(len(role))]
            bias = tensor.replace("weight", "bias")
            found |= {part: Place(m, tensor, bias, s, s) for part, s in zip(role, spans, strict=True)}
        else:
            found[tensor] = Place(m, tensor, "", transposed=True)
    return found


def _pool_places(m: Any) -> dict[str, Place]:
    return {name: Place(getattr(m, child), "weight", "bias") for name, child in POOL.items()}
