r"""SHiRA, sparse high-rank adapters (Bhardwaj et al. 2024, arXiv 2406.13175).

    W' = W + S,   S zero but at a fixed few places, which learn from zero

rank * (out + in) places a matrix, as many numbers as a LoRA of that rank. Masks: "random", "magnitude" (the largest
|W|, the paper's WM) and "struct" (rows and columns at even distances, then the diagonal). The paper's masks by gradient
need data, and are not here. The file holds places and values. Merges; `switch` writes into the weights in place, a
scatter instead of a product of factors, and puts back what was there to the bit.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visionpeft import activation, binding
from visionpeft.adapter import Adapter, Method, factory
from visionpeft.backbones.diffusers import reads_copy
from visionpeft.errors import MergeError, MethodError, SiteError
from visionpeft.methods import sparse
from visionpeft.methods.roles import attention_first
from visionpeft.sites import Backbone, Site
from visionpeft.tuner import Tuner

MASKS = ("random", "magnitude", "struct")


@dataclass(frozen=True)
class SHiRA(Method):
    """
    Attributes:
        rank: as many places as a LoRA of this rank has numbers, at most all.
        seed: of the random places; each site has its own.
        mask: "random", "magnitude" or "struct".
    """

    key: ClassVar[str] = "shira"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    rank: int = 8
    seed: int = 0
    mask: str = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask not in MASKS:
            raise MethodError(f"mask={self.mask!r}: expected one of {', '.join(MASKS)}")

    def default_targets(self, backbone: Backbone) -> str:
        return attention_first(backbone)

    def refuses(self, site: Site, module: nn.Module) -> str | None:
        if (reason := super().refuses(site, module)) is not None:
            return reason
        inside = self.mask == "magnitude" and site.host
        return "its weight is inside another module's: take mask='random'" if inside else None

    def build(self, site: Site, module: nn.Module) -> Adapter:
        kw = factory(module)
        count = min(self.rank * (site.shape[0] + site.shape[1]), math.prod(site.shape))
        return SHiRAAdapter(site.shape, self._places(site, module, count).to(kw["device"]), **kw)

    def _places(self, site: Site, module: nn.Module, count: int) -> Tensor:
        """Flat indices (count) into the matrix, rising."""
        out, width = site.shape
        if next(module.parameters()).is_meta:
            return torch.arange(count)
        if self.mask == "magnitude":
            weight = binding.original(module, "weight")
            if weight is None:
                raise SiteError(f"SHiRA at {site}: the module has no weight to look at")
            rows = slice(*site.rows) if site.rows else slice(None)
            return weight.detach()[rows].abs().flatten().topk(count).indices.sort().values
        if self.mask == "struct":
            return _struct(out, width, count)
        generator = torch.Generator().manual_seed(self.seed + zlib.crc32(str(site).encode()))
        return torch.randperm(out * width, generator=generator)[:count].sort().values


def _struct(out: int, width: int, count: int) -> Tensor:
    """Diagonal, and whole rows and columns at even distances until `count` places are taken."""
    places = torch.arange(out * width).view(out, width)
    lines = max(1, round(count / (out + width)))
    rows = torch.linspace(0, out - 1, lines).long()
    columns = torch.linspace(0, width - 1, lines).long()
    wanted = torch.cat([places.diagonal(), places[rows].flatten(), places[:, columns].flatten()])
    unique = torch.from_numpy(_first_seen(wanted))
    rest = places.flatten()[~torch.isin(places.flatten(), unique)]
    return torch.cat([unique, rest])[:count].sort().values


def _first_seen(indices: Tensor) -> Any:
    """Each index once, in the order of its first place."""
    import numpy as np

    array = indices.numpy()
    return array[np.sort(np.unique(array, return_index=True)[1])]


class SHiRAAdapter(Adapter):
    """values (n) learn; places (n), a buffer, are flat indices into the matrix (out, in)."""

    places: Tensor

    def __init__(self, shape: tuple[int, ...], places: Tensor, **kw: Any) -> None:
        super().__init__()
        self.shape, self.columns = shape, sparse.Columns()
        self.register_buffer("places", places)
        self.values = nn.Parameter(torch.zeros(len(places), **kw))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return sparse.add(x, y, self.values, self.places, self.shape, self.columns, self.route)

    def weight(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return w.flatten().scatter_add(0, self.places, self.values.to(w.dtype)).view(w.shape), b


# ---- switching ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def switch(take: Tuner | None, put: Tuner | None) -> None:
    """Take one adapter out of the weights in place and put another in, each at its strength; all of it by scatter.

    What was written cannot act besides, so that it rests until it is taken out. Weights are changed in place: nobody
    else may write to them meanwhile. `take` gives back the very bits that `put` found.

    Places differ from one another, so that they are copied by `index_copy_`, seven times faster here than indexing.

    Raises:
        MergeError: `take` is not in, or `put` or another is in; something is merged; a weight is shared by sites or
            computed from others; or diffusers' projections are fused, in a copy that would not change.
    """
    if put is not None:
        _check(put)
    if take is not None and take.written is None:
        raise MergeError(f"{take.name!r} was not put into the weights by `switch`")
    for tuner in (take, put):
        if tuner is not None:
            _check_others(tuner, take)
    if take is not None:
        written: list[tuple[nn.Module, SHiRAAdapter, Tensor]] = take.written
        take.written = None
        for module, own, before in written:
            flat = _flat(module)
            flat.index_copy_(0, own.places, before.to(flat))
        _mark(take, False)
    if put is None:
        return
    if put.active:
        _rest(put)
    put.written = []
    for site, adapter in put.adapters.items():
        assert isinstance(adapter, SHiRAAdapter)
        module = put.backbone.module(site.path)
        flat, places = _flat(module), adapter.places
        before = flat.index_select(0, places)
        flat.index_copy_(0, places, torch.add(before, adapter.values, alpha=put.scale).to(flat.dtype))
        put.written.append((module, adapter, before))
    _mark(put, True)


def _flat(module: nn.Module) -> Tensor:
    """The weight in one row, by storage and version the parameter itself; looked up anew, for `.to` may replace it."""
    weight = module._parameters["weight"]
    assert weight is not None
    return weight.detach().view(-1)


def _check(put: Tuner) -> None:
    if put.written is not None or put.merged is not None:
        raise MergeError(f"{put.name!r} is in the weights already")
    weights: dict[int, Site] = {}
    for site, adapter in put.adapters.items():
        if not isinstance(adapter, SHiRAAdapter) or site.host or site.rows:
            raise MergeError(f"{site}: switching is for SHiRA on whole Linears")
        owner = site.path.rpartition(".")[0]
        if owner and reads_copy(put.backbone.module(owner)):
            raise MergeError(f"{site} is fused with its neighbours in a copy: unfuse_qkv_projections to switch")
        weight = put.backbone.module(site.path)._parameters.get("weight")
        if weight is None:
            raise MergeError(f"{site}: the weight is computed from others (parametrize, weight_norm)")
        if (other := weights.setdefault(id(weight), site)) is not site:
            raise MergeError(f"{site} and {other} share one weight, which would get what both add")


def _check_others(tuner: Tuner, take: Tuner | None) -> None:
    """Nobody else may be in the weights, who would put back what stood there before."""
    found = activation.registry(tuner.backbone)
    for other in found.tuners.values() if found else ():
        if other.merged is not None:
            raise MergeError(f"{other.name!r} is merged: unmerge it to switch")
        if other.written is not None and other not in (tuner, take):
            raise MergeError(f"{other.name!r} is in the weights: take that out first")


def _mark(tuner: Tuner, written: bool) -> None:
    """Say at the modules whether something is written into them, so that nobody copies it."""
    for site in tuner.adapters:
        held = binding.holder(tuner.backbone.module(site.path))
        assert held is not None
        held.written = written


def _rest(tuner: Tuner) -> None:
    found = activation.registry(tuner.backbone)
    assert found is not None
    others = [found.tuners[n] for n in found.order if n != tuner.name]
    activation.set_active(tuner.backbone, [(t, t.scale) for t in others])
