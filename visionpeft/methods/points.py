"""What methods for point transformers have in common: class token, statistics, sites, and heads that take more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionpeft import backbones
from visionpeft.adapter import Adapter, Method
from visionpeft.errors import SiteError
from visionpeft.sites import Backbone, Site, inside
from visionpeft.targets import statistics


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
        if not stages(backbone, "grouping"):
            raise SiteError(
                f"{type(self).__name__} needs a point transformer with its grouping (visionpeft.models."
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
            found += [key for key in statistics(backbone) if not inside(key[0], backbone.heads())]
        return found


def stages(backbone: Backbone, role: str) -> list[Site]:
    """Sites of a stage: "grouping", "tokens" or "pool"."""
    return [site for site in backbone.sites() if site.kind == "stage" and site.role == role]


@dataclass(frozen=True)
class WiderHead(PointMethod):
    """A method whose classifier takes three features: two as before and one more.

    The first weight of the classifier keeps its shape; the columns of the new feature stand beside it, as an adapter.
    In the papers the classifier learns: `train="head"`. A model that tells parts apart has nothing to pool: there the
    prompts act on the patches through the blocks alone.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"block", "branch", "stage", "linear", "norm"})

    def head(self, backbone: Backbone) -> list[Site]:
        """The pooling and the classifier's first Linear.

        Raises:
            SiteError: the model has no class token in front or no classifier.
        """
        front = backbones.prefix_tokens(backbone.roots.get("", nn.Module()))
        if front == 0:
            return []
        if not backbone.heads() or front != 1:
            raise SiteError(f"{type(self).__name__} needs a classifier of the Point-MAE kind: one class token, a head")
        first = f"{backbone.heads()[0]}.0"
        return [*stages(backbone, "pool"), *(s for s in backbone.sites() if s.path == first and not s.part)]


class Slot:
    """What one adapter hands to another within a forward."""

    value: Tensor | None = None

    def take(self) -> Tensor:
        value, self.value = self.value, None
        if value is None:
            raise SiteError("the classifier was called without the pooling before it: call the model as a whole")
        return value


class PoolMore(Adapter):
    """At the pooling: hands one more feature (B, D) of the tokens to the classifier."""

    def __init__(self, slot: Slot) -> None:
        super().__init__()
        self.slot = slot

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens for the pooling, and the feature."""
        raise NotImplementedError

    def before(self, x: Tensor) -> Tensor:
        x, self.slot.value = self.split(x)
        return x


class MoreColumns(Adapter):
    """At the classifier's first Linear: columns weight (out, D) for the feature."""

    def __init__(self, slot: Slot, out: int, width: int, **kw: Any) -> None:
        super().__init__()
        self.slot = slot
        self.columns = nn.Parameter(torch.empty(out, width, **kw))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.columns, std=0.02)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        feature = self.slot.take()
        return y + F.linear(feature, self.columns.to(feature.dtype)).to(y.dtype)
