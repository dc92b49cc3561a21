r"""SSF, scale and shift of deep features (Lian et al. 2022, arXiv 2210.08823; official code dongzelian/SSF).

    y = gamma * z + beta        on the output z of every operation, per channel

gamma ~ N(1, 0.02), beta ~ N(0, 0.02): not the identity at the start, as in the paper. Sites: patch embedding, norms,
qkv, attention output and both MLP layers: 74 on ViT-B/16. After a norm with weight and bias the two are folded into
them. Merges into weight and bias; refused where there is no bias to take beta, or where the module treats its weight
before use (weight standardisation).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visionpeft.adapter import Adapter, Method, factory
from visionpeft.binding import base_class
from visionpeft.errors import MergeError
from visionpeft.sites import Backbone, Site


@dataclass(frozen=True)
class SSF(Method):
    key: ClassVar[str] = "ssf"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv", "norm"})

    def default_targets(self, backbone: Backbone) -> str:
        """Every Linear, conv and norm: "after every operation"."""
        sites = [site for site in backbone.sites() if site.role != "head"]
        others = {site.role for site in sites if site.kind in ("conv", "norm") and not site.part}
        return " ".join([*{site.kind for site in sites if site.kind == "linear"}, *sorted(others)])

    def build(self, site: Site, module: nn.Module) -> Adapter:
        own = module._parameters
        folds = site.kind == "norm" and own.get("weight") is not None and own.get("bias") is not None
        standardised = "Std" in base_class(module).__name__
        channels_first = site.kind == "norm" and "2d" in base_class(module).__name__
        dims = len(site.shape) - 2 if site.kind == "conv" else 2 if channels_first else 0
        return SSFAdapter(site.shape[0], dims, folds, standardised, **factory(module))


class SSFAdapter(Adapter):
    """gamma, beta (channels); `dims` spatial dimensions follow the channels of the output."""

    def __init__(self, channels: int, dims: int, folds: bool, standardised: bool, **kw: Any) -> None:
        super().__init__()
        self.dims, self.folds, self.standardised = dims, folds, standardised
        self.gamma = nn.Parameter(torch.empty(channels, **kw))
        self.beta = nn.Parameter(torch.empty(channels, **kw))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.gamma, mean=1.0, std=0.02)
        nn.init.normal_(self.beta, mean=0.0, std=0.02)

    @property
    def on_weight(self) -> bool:
        return self.folds

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shape = (-1, *[1] * self.dims)
        return torch.addcmul(self.beta.to(y.dtype).view(shape), y, self.gamma.to(y.dtype).view(shape))

    def weight(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.standardised:
            raise MergeError(f"SSF at {self.label} cannot be merged: the conv standardises its weight, undoing gamma")
        if b is None:
            raise MergeError(f"SSF at {self.label} cannot be merged: there is no bias to take beta")
        gamma = self.gamma.view(-1, *[1] * (w.dim() - 1))
        return w * gamma, b * self.gamma + self.beta
