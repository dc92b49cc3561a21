r"""SVFit (Sun et al. 2024, arXiv 2409.05926): the largest singular values learn.

    W = U S V^T,   W' = W + U_r diag(s - s_0) V_r^T

s (r) starts at the r largest singular values s_0 and is all that learns; U_r (out, r) and V_r^T (r, in) are frozen and
come from the weight: they are not in the adapter file, and loading makes the decomposition again. s_0 is in the file,
so that it is not loaded on other weights. Weights that are loaded under an adapter that has not learnt are decomposed
anew. r is at most the smaller side of the matrix. Zero change at the start. Merges.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visionpeft import binding
from visionpeft.adapter import Adapter, Method, factory
from visionpeft.errors import AdapterFileError, SiteError
from visionpeft.methods.roles import attention_first
from visionpeft.sites import Backbone, Site


@dataclass(frozen=True)
class SVFit(Method):
    """
    Attributes:
        rank: number of singular values that learn; where the matrix has fewer, all of them.
    """

    key: ClassVar[str] = "svfit"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    rank: int = 768

    def default_targets(self, backbone: Backbone) -> str:
        return attention_first(backbone)

    def refuses(self, site: Site, module: nn.Module) -> str | None:
        if (reason := super().refuses(site, module)) is not None:
            return reason
        return "its weight is inside another module's: choose other targets" if site.host else None

    def build(self, site: Site, module: nn.Module) -> Adapter:
        weight = binding.original(module, "weight")
        if weight is None:
            raise SiteError(f"SVFit at {site}: the module has no weight to decompose")
        rows = slice(*site.rows) if site.rows else slice(None)
        return SVFitAdapter(weight.detach()[rows], self.rank, **factory(module))


class SVFitAdapter(Adapter):
    """s (r) learns; u (out, r), v (r, in) and start (r) are frozen, and belong to the weight."""

    u: Tensor
    v: Tensor
    start: Tensor

    def __init__(self, weight: Tensor, rank: int, **kw: Any) -> None:
        super().__init__()
        r = min(rank, *weight.shape)
        for name, shape in (("u", (weight.shape[0], r)), ("v", (r, weight.shape[1])), ("start", (r,))):
            self.register_buffer(name, torch.empty(*shape, **kw), persistent=name == "start")
        self.s = nn.Parameter(torch.empty(r, **kw))
        self._decompose(weight)

    @torch.no_grad()
    def _decompose(self, weight: Tensor) -> None:
        if weight.is_meta:
            return
        u, s, v = torch.linalg.svd(weight.to(self.s), full_matrices=False)
        r = len(self.s)
        for own, value in ((self.u, u[:, :r]), (self.v, v[:r]), (self.start, s[:r]), (self.s, s[:r])):
            own.copy_(value)

    def _of(self, values: Tensor) -> bool:
        """Whether these are the singular values that we started from, to the rounding of other types and machines."""
        return torch.allclose(values.to(self.start), self.start, rtol=0, atol=1e-2 * float(self.start.max()))

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        if not self._of(tensors["start"]):
            raise AdapterFileError("SVFit belongs to the weights that it was trained on, and those here are others")
        super().fill(tensors)

    def reloaded(self, weight: Tensor, alone: bool) -> str | None:
        if weight.is_meta or hasattr(weight, "full_tensor"):  # sharded by FSDP2
            return None
        weight = (weight[slice(*self.rows)] if self.rows else weight).to(self.u)
        if self._of((self.u * (weight @ self.v.mT)).sum(0)):
            return None
        if alone and not torch.equal(self.s, self.start):
            return f"SVFit at {self.label} has learnt on other weights than these: detach it before loading"
        self._decompose(weight)
        return None

    def low_rank(self) -> tuple[Tensor, Tensor, float]:
        return self.v, self.u * (self.s - self.start), 1.0

    def weight(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return w + (self.u * (self.s - self.start)) @ self.v, b
