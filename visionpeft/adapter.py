"""What a method and an adapter are.

A *method* is a frozen dataclass of hyper-parameters: it says which sites it adapts and builds one *adapter* for each.
An *adapter* is the small module at one site. It overrides what it can do, and the binding asks for no more:

    low_rank() -> (A, B, scale)      delta of a Linear's rows, W + scale * B A; merges, and takes the fused path
    scale_shift() -> (gamma, beta, source)   gamma * z + beta on the output z of a Linear; takes the fused path
    weight(w, b) -> (w', b')         the weight and bias of the site, adapted; merges
    forward(x, y) -> y'              input and output of the site; merges only if `weight` says the same
    enter(x) -> x'                   what goes into a Linear, adapters before it included; merges if `weight` says so
    before(x) -> x', after(y) -> y'  what goes into a whole block and what comes out of it (prompts)

Factors that several adapters use are one more adapter, a `Shared`, registered once at the root.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from visionpeft.errors import MergeError, MethodError, SiteError

if TYPE_CHECKING:
    from visionpeft.sites import Backbone, Site
    from visionpeft.targets import Targets


class Forgiving(nn.Module):
    """A module that a base checkpoint need not know of: it loads strictly, and leaves this as it is."""

    kind: str = ""  # kind of the site where it acts; what only waits has none

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):  # type: ignore[no-untyped-def]
        known = len(missing)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if not any(key.startswith(prefix) for key in state_dict):
            del missing[known:]


class Adapter(Forgiving):
    """The learnt part at one site; registered as a child of the module that it adapts.

    Attributes:
        strength: how much of the adapter acts, a plain float; 1 is as trained, 0 is not at all.
        rows: rows (lo, hi) of the site's weight that are adapted, None for all.
        on_weight: act through `weight` even where the output is at hand.
        normed: on a residual branch, be given what its first norm gives and not the residual stream.
        label: path and part of the site, for messages.
    """

    strength: float = 1.0
    whole: bool = False  # acts wholly or not at all
    rows: tuple[int, int] | None = None
    label: str = ""
    route: str = "rebuild"  # as that of the holder, see `Tuner.fused`
    place: str = ""  # part or role of the site, where one module is host to several
    tap: Any = None  # input of the residual branch, set by the binding
    normed: bool = False

    @property
    def on_weight(self) -> bool:
        return not self.overrides("forward")

    def low_rank(self) -> tuple[Tensor, Tensor, float] | None:
        """A (r, in), B (out, r) and the scale of the delta scale * B A, or None if there is no such form now."""
        return None

    def scale_shift(self) -> tuple[Tensor, Tensor, str] | None:
        """gamma (out), beta (out) and the source of `lowrank.Rescale`, or None if that is not what this does."""
        return None

    def weight(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Adapted weight and bias, given those of the adapted rows.

        Raises:
            MergeError: what this adapter does is no change of a weight.
        """
        raise MergeError(f"{type(self).__name__} at {self.label} is not a change of the weight: it cannot be merged")

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Adapted output, given the input x and the output y of the site (of the adapted rows)."""
        raise SiteError(f"{type(self).__name__} at {self.label} does not act on an output")

    def arguments(self, x: Any, *rest: Any) -> tuple[Any, ...]:
        """What a whole block is given instead of all its positional arguments."""
        return (self.before(x), *rest)

    def enter(self, x: Tensor) -> Tensor:
        """What a Linear is given instead of x (..., in)."""
        return x

    def before(self, x: Tensor) -> Tensor:
        """What a whole block is given instead of its tokens x (B, N, D)."""
        return x

    def after(self, y: Tensor) -> Tensor:
        """What stands for the tokens y (B, N', D) that the block gives."""
        return y

    def file_tensors(self) -> dict[str, Tensor]:
        """What an adapter file holds of this adapter."""
        return dict(self.state_dict(keep_vars=True))

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `file_tensors` gave."""
        for name, value in self.state_dict(keep_vars=True).items():
            value.copy_(tensors[name])

    def reloaded(self, weight: Tensor, alone: bool) -> str | None:
        """Called when the site's module loads its weight from a state dict; what is wrong with it, if anything is.

        Args:
            weight: (out, in) or (out, in, *kernel), all rows of the module's.
            alone: the state dict has nothing of adapters there.
        """
        return None

    @classmethod
    def overrides(cls, name: str) -> bool:
        """Whether this kind of adapter says what `name` (forward, weight, ...) does."""
        return getattr(cls, name) is not getattr(Adapter, name)


class Shared(Adapter):
    """Factors that the adapters at several sites use: registered once, at the root, and written once.

    `Method.adapters` puts it under `Shared.site(name)`; those that use it keep it by `refer`, unregistered.
    """

    @staticmethod
    def site(name: str, component: str = "") -> Site:
        """Where it is registered: the root of a component of the model."""
        from visionpeft.sites import Site

        return Site(component, name, kind="shared")

    def weight(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return w, b  # merged with the adapters that use it

    def refer(self, adapter: Adapter) -> None:
        """Let an adapter see this as its `shared` without owning it."""
        object.__setattr__(adapter, "shared", self)


@dataclass(frozen=True)
class Method:
    """Base of all methods.

    Attributes:
        targets: roles, kinds and path globs separated by spaces, or a predicate `(Site) -> bool`;
            None means the paper's, which `default_targets` gives for a backbone; in a diffusion pipeline those in
            the denoiser, unless `within` says otherwise.
        within, exclude: path globs that narrow the choice.
        tower: "image" or "text", for models that have both.
    """

    key: ClassVar[str] = ""
    kinds: ClassVar[frozenset[str]] = frozenset()  # kinds of site where this method can act
    trains: ClassVar[str | None] = None  # what `train=` is where the caller does not say
    freezes_statistics: ClassVar[bool] = True  # BatchNorm stays in eval

    targets: Targets = None
    within: str | None = None
    exclude: str | None = None
    tower: str | None = None

    def __post_init__(self) -> None:
        for name in ("rank", "hidden", "tokens"):
            if getattr(self, name, 1) < 1:
                raise MethodError(f"{name}={getattr(self, name)}: expected at least 1")
        if not 0 <= getattr(self, "dropout", 0.0) < 1:
            raise MethodError(f"dropout={self.dropout}: expected a probability below 1")  # type: ignore[attr-defined]

    def default_targets(self, backbone: Backbone) -> str:
        raise SiteError(f"{type(self).__name__} has no default targets: give targets=")

    def choose(self, backbone: Backbone) -> list[Site]:
        """The sites that this method adapts in a backbone."""
        from visionpeft.targets import choose_among

        sites: Sequence[Site] = backbone.sites(self.tower)
        if self.targets is not None:
            return choose_among(sites, self.targets, self.within, self.exclude, backbone.presets())
        if self.within is None:
            sites = backbone.main(sites)
        return choose_among(sites, self.default_targets(backbone), self.within, self.exclude)

    def refuses(self, site: Site, module: nn.Module) -> str | None:
        """Why this method cannot act at the site, or None if it can."""
        if site.kind not in self.kinds:
            return f"it adapts {', '.join(sorted(self.kinds)) or 'no modules'}, and this is a {site.kind} site"
        return None

    def build(self, site: Site, module: nn.Module) -> Adapter:
        """The adapter for one site; `module` is the module at the site's path."""
        raise SiteError(f"{type(self).__name__} builds no adapters")

    def adapters(self, sites: Sequence[Site], backbone: Backbone) -> dict[Site, Adapter]:
        """One adapter a site; override where adapters depend on one another or on the whole backbone."""
        return {site: self.build(site, backbone.module(site.path)) for site in sites}

    def together(self, sites: Sequence[Site]) -> list[list[Site]]:
        """Sites whose adapters make no sense without one another; each by itself if it does."""
        return [[site] for site in sites]

    def learns(self, sites: Sequence[Site], backbone: Backbone) -> list[tuple[str, str]]:
        """Tensors of the model that learn in place, as (path of the module, name): BitFit, LN-tuning, full."""
        return []

    def shares(self, key: tuple[str, str], backbone: Backbone) -> str | None:
        """Name of the group of tensors that learn as one copy with this one, None for those that are one already."""
        return None

    def summary(self) -> str:
        """The method with the fields that are not at their defaults: LoRA(rank=4)."""
        given = [f"{f.name}={v!r}" for f in fields(self) if (v := getattr(self, f.name)) != f.default]
        return f"{type(self).__name__}({', '.join(given)})"

    def hyper_parameters(self) -> dict[str, Any]:
        """The fields that shape the adapters, as JSON takes them; where these sit is told by the sites."""
        where = ("targets", "within", "exclude", "tower")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in where}


def factory(module: nn.Module) -> dict[str, Any]:
    """Device and dtype for the tensors of an adapter: those of the module's first parameter.

    At least single precision, so that they can learn.
    """
    w = next(module.parameters())
    dtype = w.dtype if w.dtype in (torch.float32, torch.float64) else torch.float32
    return {"device": w.device, "dtype": dtype}
