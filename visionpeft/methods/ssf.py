r"""SSF, scale and shift of deep features (Lian et al. 2022, arXiv 2210.08823; official code dongzelian/SSF).

    y = gamma * z + beta        on the output z of every operation, per channel

gamma ~ N(1, 0.02), beta ~ N(0, 0.02): not the identity at the start, as in the paper. Sites: patch embedding, norms,
qkv, attention output and both MLP layers: 74 on ViT-B/16. After a norm with weight and bias, and after a conv with
bias, the two are folded into these. Merges into weight and bias; refused where there is no bias to take beta, or where
the module treats its weight before use (weight standardisation).

The gradient of gamma needs z. What goes into attention or the MLP's non-linearity is kept by these anyway and z is
had from it, (y - beta) / gamma; elsewhere z is kept, or computed again at the sites of `recompute`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from visionpeft.adapter import Adapter, Method, factory
from visionpeft.binding import base_class
from visionpeft.errors import MergeError
from visionpeft.lowrank import is_traced
from visionpeft.sites import Backbone, Site

_KEPT_BEHIND = frozenset({"qkv", "query", "key", "value", "mlp_in"})
"""Roles whose output the next operation keeps for its own backward."""
_LEAST = 0.05
"""Smallest |gamma| that is inverted: below, the rounding of y weighs too much in z."""


_LOOKED_AT: WeakKeyDictionary[nn.Module, tuple[int, bool]] = WeakKeyDictionary()
"""Version of an adapter's gamma -> whether it can be inverted; no state of the adapter's own."""


@dataclass(frozen=True)
class SSF(Method):
    """
    Attributes:
        recompute: roles of Linears whose output is computed again in backward, instead of kept. "attn_out mlp_out"
            keeps nothing that the frozen ViT would not keep, "" keeps both and is the fastest.
    """

    key: ClassVar[str] = "ssf"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv", "norm"})

    recompute: str = "attn_out"

    def default_targets(self, backbone: Backbone) -> str:
        """Every Linear, conv and norm: "after every operation"."""
        sites = [site for site in backbone.sites(self.tower) if site.role != "head"]
        others = {site.role for site in sites if site.kind in ("conv", "norm") and not site.part}
        return " ".join([*{site.kind for site in sites if site.kind == "linear"}, *sorted(others)])

    def build(self, site: Site, module: nn.Module) -> Adapter:
        own = module._parameters
        standardised = "Std" in base_class(module).__name__
        whole = own.get("weight") is not None and own.get("bias") is not None
        folds = whole and not standardised and site.kind in ("norm", "conv")
        channels_first = site.kind == "norm" and "2d" in base_class(module).__name__
        dims = len(site.shape) - 2 if site.kind == "conv" else 2 if channels_first else 0
        source = source_of(site.role, self.recompute)
        return SSFAdapter(site.shape[0], dims, folds, standardised, source, **factory(module))


def source_of(role: str, recompute: str) -> str:
    """Where the gradient of a scale behind a Linear has the Linear's output from, see `lowrank.Rescale`."""
    return "input" if role in recompute.split() else "output" if role in _KEPT_BEHIND else "kept"


class Rescaling(Adapter):
    """What scales the output of its site, and shifts it perhaps; `dims` spatial dimensions follow the channels."""

    gamma: nn.Parameter

    def __init__(self, dims: int, source: str) -> None:
        super().__init__()
        self.dims, self.source = dims, source

    def factors(self) -> tuple[Tensor, Tensor]:
        """The scale and the shift (channels)."""
        raise NotImplementedError

    def scale_shift(self) -> tuple[Tensor, Tensor, str] | None:
        gamma, beta = self.factors()
        source = "kept" if self.source == "output" and not self._invertible(gamma) else self.source
        return gamma, beta, source

    def _invertible(self, gamma: Tensor) -> bool:
        """Whether no scale is near zero; an accelerator, whose answer takes waiting, is asked once per update."""
        if is_traced(gamma):
            return True  # plain torch runs there, and keeps what it needs
        version = self.gamma._version
        known = _LOOKED_AT.get(self)
        if known is None or known[0] != version or gamma.device.type == "cpu":  # writing through .data has no version
            known = _LOOKED_AT[self] = version, bool(gamma.detach().abs().min() > _LEAST)
        return known[1]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        gamma, beta = (t.to(y.dtype).view(-1, *[1] * self.dims) for t in self.factors())
        return torch.addcmul(beta, y, gamma)


class SSFAdapter(Rescaling):
    """gamma, beta (channels)."""

    def __init__(self, channels: int, dims: int, folds: bool, standardised: bool, source: str, **kw: Any) -> None:
        super().__init__(dims, source)
        self.folds, self.standardised = folds, standardised
        self.gamma = nn.Parameter(torch.empty(channels, **kw))
        self.beta = nn.Parameter(torch.empty(channels, **kw))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.gamma, mean=1.0, std=0.02)
        nn.init.normal_(self.beta, mean=0.0, std=0.02)

    @property
    def on_weight(self) -> bool:
        return self.folds

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.gamma, self.beta

    def weight(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.standardised:
            raise MergeError(f"SSF at {self.label} cannot be merged: the conv standardises its weight, undoing gamma")
        if b is None:
            raise MergeError(f"SSF at {self.label} cannot be merged: there is no bias to take beta")
        gamma = self.gamma.view(-1, *[1] * (w.dim() - 1))
        return w * gamma, b * self.gamma + self.beta
