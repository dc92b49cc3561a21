"""`nn.MultiheadAttention` with adapters on query, key, value and output projection.

torch's own forward reads `in_proj_weight` and `out_proj.weight` as raw parameters, so that a hook on `out_proj` never
fires. While adapters act, or `set_attention` has chosen a backend, this forward takes its place: projections with their
adapters, then SDPA. What SDPA cannot give (attention weights, bias_kv, zero_attn, unbatched input) goes to torch's
forward with adapted weights lent to it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visionpeft import acting
from visionpeft.adapter import Adapter
from visionpeft.binding import Mixin
from visionpeft.errors import SiteError

QKV = ("query", "key", "value")


class MultiheadSite(Mixin):
    layer = 2

    def forward(self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
                need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
                is_causal: bool = False) -> Any:  # fmt: skip
        adapters = self.peft.acting()
        rest = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        if not adapters and self.peft.attention is None:
            return super().forward(query, key, value, *rest)  # type: ignore[misc]
        hint = is_causal and attn_mask is None  # torch refuses that itself
        if hint or need_weights or self.bias_k is not None or self.add_zero_attn or query.dim() == 2:  # type: ignore[attr-defined]
            return _lent(self, adapters, super().forward, (query, key, value, *rest))  # type: ignore[misc]
        q, k, v = _project(self, adapters, query, key, value)
        y = _attend(self, q, k, v, key_padding_mask, attn_mask)
        out = [a for a in adapters if a.place == "attn_out"]
        y = acting.linear(y, self.out_proj.weight, self.out_proj.bias, out, self.peft.route)  # type: ignore[attr-defined]
        return (y if self.batch_first else y.transpose(0, 1)), None  # type: ignore[attr-defined]


def _project(m: Any, adapters: list[Adapter], query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Query, key and value projections (N, L, E) or (L, N, E), with the adapters of each."""
    at = {p: [a for a in adapters if a.place == p] for p in QKV}
    bias, route, e = m.in_proj_bias, m.peft.route, m.embed_dim
    if m._qkv_same_embed_dim and query is key and key is value:
        own = [a for a in adapters if a.place in QKV]
        return list(acting.linear(query, m.in_proj_weight, bias, own, route).chunk(3, -1))
    split = (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight)
    weights = m.in_proj_weight.chunk(3) if m._qkv_same_embed_dim else split
    biases = (None, None, None) if bias is None else bias.chunk(3)
    inputs = zip(QKV, (query, key, value), weights, biases, strict=True)
    return [acting.linear(x, w, b, at[p], route, start=QKV.index(p) * e) for p, x, w, b in inputs]


def _attend(
    m: Any, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
) -> Tensor:
    """Scaled dot-product attention of projected q, k, v -> (N, L, E)."""
    if not m.batch_first:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    q, k, v = (t.unflatten(-1, (m.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    mask = None if attn_mask is None else _additive(attn_mask, q.dtype)
    if mask is not None and mask.dim() == 3:
        mask = mask.view(-1, m.num_heads, *mask.shape[1:])
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, q.dtype)[:, None, None, :]
        mask = padding if mask is None else mask + padding
    y = F.scaled_dot_product_attention(q, k, v, mask, m.dropout if m.training else 0.0)
    return y.transpose(1, 2).flatten(2)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to the scores; True in a boolean mask means: do not attend."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def places(m: Any) -> dict[str, tuple[Any, str, str, slice, slice]]:
    """Where each part's weight and bias live: (module, weight name, bias name, rows of the weight, of the bias)."""
    e = m.embed_dim
    found = {"attn_out": (m.out_proj, "weight", "bias", slice(None), slice(None))}
    for i, part in enumerate(QKV):
        rows = slice(i * e, (i + 1) * e)
        if m._qkv_same_embed_dim:
            found[part] = (m, "in_proj_weight", "in_proj_bias", rows, rows)
        else:
            found[part] = (m, f"{part[0]}_proj_weight", "in_proj_bias", slice(None), rows)
    return found


def _lent(m: Any, adapters: list[Adapter], forward: Any, args: tuple[Any, ...]) -> Any:
    """torch's own forward on adapted weights, which go back whatever happens."""
    at = places(m)
    before: dict[tuple[Any, str], Tensor | None] = {}
    try:
        for adapter in adapters:
            if adapter.training and getattr(adapter, "dropout", False):
                raise SiteError(
                    f"{adapter.label}: dropout on the adapter's input needs need_weights=False and batched input, "
                    "without bias_kv and zero_attn; set dropout=0"
                )
            module, weight, bias, rows, b_rows = at[adapter.place]
            for name in (weight, bias):
                before.setdefault((module, name), module._parameters[name])
            w, b = acting.adapted(adapter, module._parameters[weight], module._parameters[bias], rows, b_rows)
            module._parameters[weight], module._parameters[bias] = w, b
        return forward(*args)
    finally:
        for (module, name), value in before.items():
            module._parameters[name] = value
