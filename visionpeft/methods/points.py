"""What methods for point transformers have in common: class token, statistics, sites, and heads that take more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visionpeft import backbones
from visionpeft.adapter import Adapter, Method
from visionpeft.errors import SiteError
from visionpeft.sites import Backbone, Site, inside


@dataclass(frozen=True)
class PointMethod(Method):
    """A method for the point transformers of this library, whose class token and position learn in place.

    Attributes:
        legacy: let the BatchNorms of the frozen encoder follow the training data, as all official runs of the family
            do; otherwise they stay in eval.
    """

    legacy: bool = False

    @property
    def freezes_statistics(self) -> bool:  # type: ignore[override]
        return not self.legacy

    def choose(self, backbone: Backbone) -> list[Site]:
        if not any(site.kind == "stage" for site in backbone.sites()):
            raise SiteError(
                f"{type(self).__name__} needs a point transformer with its stages (visionpeft.models."
                "point_transformer), whose blocks are given the centres of their tokens"
            )
        return super().choose(backbone)

    def refuses(self, site: Site, module: nn.Module) -> str | None:
        if (reason := super().refuses(site, module)) is not None or site.kind in ("linear", "norm"):
            return reason
        lib = backbones.library(module)
        return None if lib is not None and lib.name == "visionpeft" else "it is not one of a point transformer"

    def learns(self, sites: Sequence[Site], backbone: Backbone) -> list[tuple[str, str]]:
        found = [(path, name) for path, _, name in backbone.named_tensors() if name in ("cls_token", "cls_pos")]
        if self.legacy:
            from visionpeft.attaching import statistics

            found += [key for key in statistics(backbone) if not inside(key[0], backbone.heads())]
        return found


def stages(backbone: Backbone, role: str) -> list[Site]:
    """Sites of a stage: "grouping", "tokens" or "pool"."""
    return [site for site in backbone.sites() if site.kind == "stage" and site.role == role]


@dataclass(frozen=True)
class WiderHead(PointMethod):
    """A method whose classifier takes three features: class token, one more, maximum over the patches.

    The classifier learns with it. The first weight keeps the columns that it has; those of the new feature are drawn.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"block", "branch", "stage", "linear", "norm"})
    trains: ClassVar[str | None] = "head"

    def choose(self, backbone: Backbone) -> list[Site]:
        sites = super().choose(backbone)
        if not backbone.heads() or backbones.prefix_tokens(backbone.roots.get("", nn.Module())) != 1:
            raise SiteError(f"{type(self).__name__} needs a classifier of the Point-MAE kind: one class token and a head")
        return sites

    def learns(self, sites: Sequence[Site], backbone: Backbone) -> list[tuple[str, str]]:
        return [*super().learns(sites, backbone), (f"{backbone.heads()[0]}.0", "weight")]

    def starts(self, backbone: Backbone) -> dict[tuple[str, str], Tensor]:
        path = f"{backbone.heads()[0]}.0"
        old = backbone.module(path).weight
        new = torch.empty_like(old[:, : old.shape[1] // 2])
        nn.init.trunc_normal_(new, std=0.02)
        first, second = old.detach().chunk(2, 1)
        return {(path, "weight"): torch.cat([first, new, second], 1)}


class WiderPool(Adapter):
    """At the pooling: takes what it wants from the tokens, and puts it between the two features."""

    def __init__(self) -> None:
        super().__init__()
        self._more: Tensor | None = None

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens for the pooling, and the feature (B, D) that is put between its two."""
        raise NotImplementedError

    def before(self, x: Tensor) -> Tensor:
        x, self._more = self.split(x)
        return x

    def after(self, y: Any) -> Any:
        more, self._more = self._more, None
        assert more is not None
        return torch.cat([y[:, : more.shape[1]], more, y[:, more.shape[1] :]], 1)
