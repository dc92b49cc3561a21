r"""SVFit (Sun et al. 2024, arXiv 2409.05926): the largest singular values learn.

    W = U S V^T,   W' = W + U_r diag(s - s_0) V_r^T

s (r) starts at the r largest singular values s_0 and is all that learns; U_r (out, r) and V_r^T (r, in) are frozen and
come from the weight: they are not in the adapter file, and loading makes the decomposition again. r is at most the
smaller side of the matrix. Zero change at the start. Merges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visionpeft import binding
from visionpeft.adapter import Adapter, Method, factory
from visionpeft.errors import SiteError
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
    """s (r) learns; u (out, r), v (r, in) and start (r) are frozen."""

    u: Tensor
    v: Tensor
    start: Tensor

    def __init__(self, weight: Tensor, rank: int, **kw: Any) -> None:
        super().__init__()
        r = min(rank, *weight.shape)
        if weight.is_meta:
            u, s, v = (weight.new_empty(*shape, **kw) for shape in ((weight.shape[0], r), (r,), (r, weight.shape[1])))
        else:
            u, s, v = torch.linalg.svd(weight.to(**kw), full_matrices=False)
        for name, value in (("u", u[:, :r]), ("v", v[:r]), ("start", s[:r])):
            self.register_buffer(name, value.clone(), persistent=False)
        self.s = nn.Parameter(s[:r].clone())

    def low_rank(self) -> tuple[Tensor, Tensor, float]:
        return self.v, self.u * (self.s - self.start), 1.0

    def weight(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return w + (self.u * (self.s - self.start)) @ self.v, b
