"""Methods that train tensors of the model itself: the library learns on a copy and sets the original aside.

    BitFit       every bias of the backbone (Ben Zaken et al. 2021, arXiv 2106.10199)
    LNTuning     weight and bias of every norm
    FullFineTuning, LinearProbe    the two baselines: everything, and nothing but the classifier

They act on every call path, add no time, merge at once and detach exactly. `tuner.scale` other than 1 gives the
straight line between the original and the learnt tensors (WiSE-FT, arXiv 2109.01903).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from visionpeft.adapter import Adapter, Method
from visionpeft.errors import SiteError
from visionpeft.sites import Backbone, Site, inside, kind_of
from visionpeft.targets import choose_among


@dataclass(frozen=True)
class InPlace(Method):
    """A site is one tensor of the model: `path` is its module, `part` its name, its kind is "tensor"."""

    lacking: ClassVar[str] = "this model has no parameters outside the classifier"

    def wants(self, module: nn.Module, name: str) -> bool:
        """Whether the parameter `name` of a module outside the classifier learns."""
        return True

    def choose(self, backbone: Backbone) -> list[Site]:
        heads = backbone.heads()
        sites = [
            Site(path, name, kind_of(module) or "", "tensor", tuple(getattr(module, name).shape))
            for path, module, name in backbone.named_tensors()
            if not inside(path, heads) and self.wants(module, name) and not backbone.hidden(path)
        ]
        sites = backbone.in_tower(sites, self.tower)
        if self.targets is None and self.within is None:
            sites = backbone.main(sites)
        if not sites:
            raise SiteError(f"{type(self).__name__}: {self.lacking}")
        return choose_among(sites, self.targets or "*", self.within, self.exclude)

    def refuses(self, site: Site, module: nn.Module) -> str | None:
        return None

    def adapters(self, sites: Sequence[Site], backbone: Backbone) -> dict[Site, Adapter]:
        return {}

    def learns(self, sites: Sequence[Site], backbone: Backbone) -> list[tuple[str, str]]:
        return [(site.path, site.part) for site in sites]


@dataclass(frozen=True)
class BitFit(InPlace):
    """Every parameter whose name ends in `bias`, the classifier's apart: `train="head"` has that."""

    key: ClassVar[str] = "bitfit"
    lacking: ClassVar[str] = "this model has no bias outside the classifier"

    def wants(self, module: nn.Module, name: str) -> bool:
        return name.endswith("bias")


@dataclass(frozen=True)
class LNTuning(InPlace):
    """Weight and bias of every norm; the running statistics of BatchNorms stay frozen."""

    key: ClassVar[str] = "ln_tuning"
    lacking: ClassVar[str] = "this model has no norm with a weight or bias"

    def wants(self, module: nn.Module, name: str) -> bool:
        return kind_of(module) == "norm"


@dataclass(frozen=True)
class FullFineTuning(InPlace):
    """Everything learns, the classifier too, and BatchNorms update their statistics as in ordinary training."""

    key: ClassVar[str] = "full"
    freezes_statistics: ClassVar[bool] = False

    def choose(self, backbone: Backbone) -> list[Site]:
        sites = [
            Site(path, name, kind_of(module) or "", "tensor", tuple(getattr(module, name).shape))
            for path, module, name in backbone.named_tensors(buffers=True)
            if name in module._parameters or isinstance(module, nn.modules.batchnorm._BatchNorm)
        ]
        sites = backbone.in_tower([site for site in sites if not backbone.hidden(site.path)], self.tower)
        if self.targets is None and self.within is None:
            sites = backbone.main(sites)
        return choose_among(sites, self.targets or "*", self.within, self.exclude)


@dataclass(frozen=True)
class LinearProbe(InPlace):
    """Nothing but the classifier."""

    key: ClassVar[str] = "linear"
    trains: ClassVar[str | None] = "head"

    def choose(self, backbone: Backbone) -> list[Site]:
        return []
