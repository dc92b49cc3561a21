r"""PointGST: adapters in the graph spectrum of a point cloud (Liang et al. 2024, arXiv 2410.08114; official code
jerryfeng2003/PointGST).

Beside the MLP branch of every block, with x (B, T, D) the residual stream before its norm, G of the T tokens patches:

    h = W_d x,  s = h of the patches                            W_d (r, D) drawn, with bias
    u(z) = z + SiLU(T LN(z))                                    T (r, r) zero, shared by global and local
    g = U u_1(U^T s)                                            U: spectrum of all centres
    l = P^-1 U_i u_2(U_i^T P s)                                 U_i: of groups of k centres along a Morton curve P
    x + mlp(x) + W_u (SiLU(h) + [g + l on the patches])         W_u (D, r) zero, with bias: identity at the start

29,544 parameters a block of width 384. The spectra are computed once a forward and shared by all blocks. The class
token and its position learn too, and so should the classifier: `train="head"`. Does not merge.

Departures of the released code are mended, see `visionpeft.models.point_spectrum`; `legacy=True` keeps them, and lets
the BatchNorms of the frozen encoder drift in training as all official runs of this family do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionpeft.adapter import Adapter, factory
from visionpeft.errors import SiteError
from visionpeft.methods.points import PointMethod
from visionpeft.models.point_ops import take
from visionpeft.models.point_spectrum import Spectra, Spectrum
from visionpeft.sites import Backbone, Site

if TYPE_CHECKING:
    from visionpeft.tuner import Tuner


@dataclass(frozen=True)
class PointGST(PointMethod):
    """
    Attributes:
        rank: width r of the adapters.
        local: centres k in a group; all of them where there are fewer.
        legacy: the released numbers, see above.
    """

    key: ClassVar[str] = "pointgst"
    kinds: ClassVar[frozenset[str]] = frozenset({"branch"})

    rank: int = 36
    local: int = 32

    def default_targets(self, backbone: Backbone) -> str:
        return "mlp"

    def adapters(self, sites: Sequence[Site], backbone: Backbone) -> dict[Site, Adapter]:
        spectra = Spectra(self.local, self.legacy)
        return {
            site: SpectralAdapter(self, spectra, site.shape[0], **factory(backbone.module(site.path))) for site in sites
        }


def keep_spectra(tuner: Tuner, clouds: int) -> None:
    """Keep the spectra of so many clouds: what sees the same clouds again (no augmentation) decomposes each once.

    The numbers stay the same to the bit. 128 centres take 85 kB a cloud, 32 take 9 kB.

    Raises:
        SiteError: the method is not PointGST, or legacy, whose spectra depend on the other clouds of a batch.
    """
    adapters = [adapter for adapter in tuner.adapters.values() if isinstance(adapter, SpectralAdapter)]
    if not adapters or adapters[0].legacy:
        raise SiteError(f"{tuner.method.summary()} has no spectra that could be kept: PointGST without legacy has")
    adapters[0].spectra.keep = clouds


class SpectralAdapter(Adapter):
    """down (r, D), up (D, r), turn (r, r), each with its bias; weights and biases (r) of the two norms."""

    down_weight: nn.Parameter
    down_bias: nn.Parameter
    up_weight: nn.Parameter
    up_bias: nn.Parameter
    turn_weight: nn.Parameter
    turn_bias: nn.Parameter

    def __init__(self, method: PointGST, spectra: Spectra, width: int, **kw: Any) -> None:
        super().__init__()
        r = method.rank
        self.spectra, self.legacy = spectra, method.legacy
        shapes = {"down": (r, width), "up": (width, r), "turn": (r, r)}
        for name, shape in shapes.items():
            setattr(self, f"{name}_weight", nn.Parameter(torch.empty(shape, **kw)))
            setattr(self, f"{name}_bias", nn.Parameter(torch.empty(shape[0], **kw)))
        for name in ("whole", "part"):
            setattr(self, f"{name}_norm_weight", nn.Parameter(torch.empty(r, **kw)))
            setattr(self, f"{name}_norm_bias", nn.Parameter(torch.empty(r, **kw)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.down_weight)
        bound = self.down_weight.shape[1] ** -0.5
        nn.init.uniform_(self.down_bias, -bound, bound)
        for zero in (self.up_weight, self.up_bias, self.turn_weight, self.turn_bias):
            nn.init.zeros_(zero)
        for name in ("whole", "part"):
            nn.init.ones_(getattr(self, f"{name}_norm_weight"))
            nn.init.zeros_(getattr(self, f"{name}_norm_bias"))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.branch(x, self._spectrum()).to(y.dtype)

    def _spectrum(self) -> Spectrum:
        centres = self.tap.rest[-1] if self.tap.rest else None
        if centres is None:
            raise SiteError(f"{self.label}: the block was called without the centres of its tokens")
        return self.spectra(centres)

    def branch(self, x: Tensor, s: Spectrum) -> Tensor:
        """What is added for the stream x (B, T, D), whose last G tokens are patches."""
        dtype = x.dtype
        h = F.linear(x, self.down_weight.to(dtype), self.down_bias.to(dtype))
        both = self.spectral(h[:, -s.whole.shape[1] :], s)
        a = F.silu(h)
        a = torch.cat([a[:, : -both.shape[1]], a[:, -both.shape[1] :] + both], 1)
        return F.linear(a, self.up_weight.to(a.dtype), self.up_bias.to(a.dtype))

    def spectral(self, patches: Tensor, s: Spectrum) -> Tensor:
        """g + l of the patches (B, G, r)."""
        return self.filtered(patches, s.whole, "whole") + self._local(patches, s)

    @torch.no_grad()
    def watched(self, model: nn.Module, points: Tensor) -> tuple[Tensor, Tensor]:
        """Centres (B, G, 3) of clouds, and the norms (B, G) of what the spectral part adds to their tokens here."""
        seen: list[tuple[Tensor, Tensor]] = []
        handle = self.register_forward_pre_hook(lambda own, args: seen.append((args[0], own.tap.rest[-1])))
        try:
            model(points)
        finally:
            handle.remove()
        x, centres = seen[0]
        h = F.linear(x[:, -centres.shape[1] :], self.down_weight, self.down_bias)
        return centres, F.linear(self.spectral(h, self.spectra(centres)), self.up_weight).norm(dim=-1)

    def _local(self, patches: Tensor, s: Spectrum) -> Tensor:
        groups = take(patches, s.order).view(*s.parts.shape[:3], -1)
        return take(self.filtered(groups, s.parts, "part").flatten(1, 2), s.back)

    def filtered(self, x: Tensor, basis: Tensor, name: str) -> Tensor:
        """U u(U^T x) for x (..., G, r) and a basis U (..., G, G)."""
        basis = basis.to(x.dtype)
        there, home = (basis, basis.mT) if self.legacy else (basis.mT, basis)
        z = there @ x
        weight, bias = (getattr(self, f"{name}_norm_{part}") for part in ("weight", "bias"))
        turned = F.layer_norm(z, weight.shape, weight.to(z.dtype), bias.to(z.dtype))
        turned = F.linear(turned, self.turn_weight.to(z.dtype), self.turn_bias.to(z.dtype))
        return home @ (z + F.silu(turned).to(z.dtype))
