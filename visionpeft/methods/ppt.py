r"""PPT, positional prompts (Zhang et al. 2024, arXiv 2408.11567; official code zsc000722/PPT).

A second set of groups, cut from the same points about P farthest-point centres, is encoded as the first and joins the
sequence [class, G patches, P prompts]. Three MLPs, D - 256 - D with GELU, are shared by all blocks:

    x + positions, then patches + mlp_1(patches), prompts + mlp_2(prompts)      before every block
    mlp_3(x)                                                                    beside every MLP, from the stream

The small PointNet's first stage and the positions learn too. The classifier takes class token, mean patch and mean
prompt. Not the identity at the start; does not merge. The official classifier has GELU where this family has ReLU:
here it keeps what the model has. The official BatchNorms drift: `legacy=True`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionpeft.adapter import Adapter, Shared, factory
from visionpeft.methods.points import MoreColumns, PoolMore, Slot, WiderHead, stages
from visionpeft.models.point_ops import group
from visionpeft.models.point_transformer import add_positions
from visionpeft.sites import Backbone, Site, inside


@dataclass(frozen=True)
class PPT(WiderHead):
    """
    Attributes:
        tokens: positional prompts P.
        hidden: width of the three MLPs.
    """

    key: ClassVar[str] = "ppt"

    tokens: int = 128
    hidden: int = 256

    def default_targets(self, backbone: Backbone) -> str:
        return "block"

    def choose(self, backbone: Backbone) -> list[Site]:
        blocks = [site.path for site in super().choose(backbone)]
        inner = [s for s in backbone.sites() if s.path in blocks and s.role in ("block", "mlp")]
        return [*stages(backbone, "grouping"), *inner, *self.head(backbone)]

    def learns(self, sites: Sequence[Site], backbone: Backbone) -> list[tuple[str, str]]:
        more = [
            (path, name)
            for path, _, name in backbone.named_tensors()
            if inside(path, ("encoder.first_conv", "pos_embed"))
        ]
        return [*super().learns(sites, backbone), *more]

    def adapters(self, sites: Sequence[Site], backbone: Backbone) -> dict[Site, Adapter]:
        width = next(site.shape[0] for site in sites if site.kind == "block")
        kw, slot = factory(backbone.module("blocks")), Slot()
        mlps = PromptMLPs(width, self.hidden, **kw)
        found: dict[Site, Adapter] = {Shared.site("mlps"): mlps}
        for site in sites:
            if site.kind == "stage":
                found[site] = SecondGroups(self.tokens) if site.role == "grouping" else MeansPool(slot, self.tokens)
                continue
            if site.role == "head":
                found[site] = MoreColumns(slot, site.shape[0], width, **kw)
                continue
            found[site] = BesideMLP() if site.kind == "branch" else BeforeBlock(self.tokens)
            mlps.refer(found[site])
        return found


class PromptMLPs(Shared):
    """weight_in (3, hidden, D), bias_in (3, hidden), weight_out (3, D, hidden), bias_out (3, D)."""

    def __init__(self, width: int, hidden: int, **kw: Any) -> None:
        super().__init__()
        self.weight_in = nn.Parameter(torch.empty(3, hidden, width, **kw))
        self.weight_out = nn.Parameter(torch.empty(3, width, hidden, **kw))
        self.bias_in = nn.Parameter(torch.zeros(3, hidden, **kw))
        self.bias_out = nn.Parameter(torch.zeros(3, width, **kw))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.weight_in, self.weight_out):
            nn.init.trunc_normal_(weight, std=0.02)

    def run(self, i: int, x: Tensor) -> Tensor:
        """The i-th MLP on x (..., D)."""
        h = F.gelu(F.linear(x, self.weight_in[i].to(x.dtype), self.bias_in[i].to(x.dtype)))
        return F.linear(h, self.weight_out[i].to(h.dtype), self.bias_out[i].to(h.dtype)).to(x.dtype)


class SecondGroups(Adapter):
    """At the grouping: groups about P more centres behind the G first."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self._points: Tensor | None = None

    def before(self, x: Tensor) -> Tensor:
        self._points = x
        return x

    def after(self, y: Any) -> Any:
        points, self._points = self._points, None
        assert points is not None
        around, centres = y
        more = group(points, self.tokens, around.shape[2])
        return torch.cat([around, more[0]], 1), torch.cat([centres, more[1]], 1)


class BeforeBlock(Adapter):
    """Adds positions and what the first two MLPs make of patches and prompts."""

    shared: PromptMLPs

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens

    def arguments(self, x: Tensor, *rest: Any) -> tuple[Any, ...]:
        positions, centres = rest
        x = add_positions(x, positions)
        at = x.shape[1] - centres.shape[1]
        front, patches, prompts = x[:, :at], x[:, at : -self.tokens], x[:, -self.tokens :]
        patches, prompts = patches + self.shared.run(0, patches), prompts + self.shared.run(1, prompts)
        return torch.cat([front, patches, prompts], 1), None, centres


class BesideMLP(Adapter):
    """Adds what the third MLP makes of the stream."""

    shared: PromptMLPs

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.shared.run(2, x).to(y.dtype)


class MeansPool(PoolMore):
    """Class token and mean patch; the mean prompt is the feature."""

    def __init__(self, slot: Slot, tokens: int) -> None:
        super().__init__(slot)
        self.tokens = tokens
        self._pooled: Tensor | None = None

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._pooled = torch.cat([x[:, 0], x[:, 1 : -self.tokens].mean(1)], 1)
        return x, x[:, -self.tokens :].mean(1)

    def after(self, y: Tensor) -> Tensor:
        pooled, self._pooled = self._pooled, None
        assert pooled is not None
        return pooled
