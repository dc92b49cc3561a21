r"""SPT, sensitivity-aware tuning (He et al. 2023, arXiv 2303.08566; official code ziplab/SPT): where a budget goes.

    scores = spt.sensitivity(model, batches)                                     s = sum of squared gradients
    tuner = vp.attach(model, spt.allocate(model, scores, vp.LoRA(rank=8), budget=400_000), train="head")

The tau most sensitive scalars of the network are selected, head, class token, patch and position embeddings apart. A
matrix of which enough are selected, size / alpha, gets the adapter of that size that `method` builds for it; of the
others the selected entries themselves learn, as a sparse delta. A vector (norm weight, any bias) of which 1 / beta are
selected learns whole, in place. The class token always learns. tau is the one whose total is nearest to the budget.

`method` is any of the library that has adapters. One that adapts Linears may have every matrix (query, key and value
apart); one of branches or blocks is given those whose matrices together have enough selected.
What it would learn in place besides (DiffFit) is left to SPT's own choice of vectors. SPT-LoRA is LoRA(rank=8),
SPT-Adapter is LinearAdapter(hidden=8), unstructured SPT is method=None. The positions of the sparse entries are in the
adapter file. Merges if all that it consists of does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionpeft import hosts
from visionpeft.adapter import Adapter, Method, factory
from visionpeft.errors import MethodError, SiteError
from visionpeft.methods import sparse
from visionpeft.sites import Backbone, Site, inside
from visionpeft.targets import APART

ALWAYS = ("cls_token", "class_token", "class_embedding")
PAPERS = range(20_000, 1_580_001, 20_000)
UNRANKED = (*ALWAYS, "pos_embed", "position_embedding", "positional_embedding", "position_embeddings")


@dataclass(frozen=True)
class SPT(Method):
    """An allocation; `allocate` makes it.

    Attributes:
        method: what builds the adapters, or its key and fields as a dict; None for sparse entries only.
        structured: sites of its adapters, as str(site).
        sparse: site -> positions of the entries that learn in its flattened matrix, or how many, before a file is read.
        vectors: names of the tensors that learn whole.
    """

    key: ClassVar[str] = "spt"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv", "branch", "block", "stage"})

    method: Any = None
    structured: Sequence[str] = ()
    sparse: Mapping[str, Any] = field(default_factory=dict)
    vectors: Sequence[str] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.structured or self.sparse or self.vectors):
            raise MethodError("SPT is an allocation: have visionpeft.methods.spt.allocate(model, scores, ...) make it")
        if isinstance(self.method, Mapping):
            from visionpeft.methods import METHODS

            given = dict(self.method)
            object.__setattr__(self, "method", METHODS[given.pop("key")](**given))

    def choose(self, backbone: Backbone) -> list[Site]:
        known = {str(site): site for site in backbone.sites()}
        if gone := [name for name in (*self.structured, *self.sparse) if name not in known]:
            raise SiteError(f"SPT was allocated for another model: there is no {gone[0]} here")
        return [known[name] for name in (*self.structured, *self.sparse)]

    def adapters(self, sites: Sequence[Site], backbone: Backbone) -> dict[Site, Adapter]:
        chosen = [site for site in sites if str(site) in set(self.structured)]
        found = self.method.adapters(chosen, backbone) if chosen else {}
        for site in sites:
            if str(site) in self.sparse:
                found[site] = SparseDelta(self.sparse[str(site)], site.shape, **factory(backbone.module(site.path)))
        return found

    def learns(self, sites: Sequence[Site], backbone: Backbone) -> list[tuple[str, str]]:
        wanted = set(self.vectors)
        return [(p, n) for p, _, n in backbone.named_tensors() if n in ALWAYS or _join(p, n) in wanted]

    def hyper_parameters(self) -> dict[str, Any]:
        inner = None if self.method is None else {"key": self.method.key, **self.method.hyper_parameters()}
        counts = {name: SparseDelta.count(value) for name, value in self.sparse.items()}
        return {"method": inner, "structured": list(self.structured), "sparse": counts, "vectors": list(self.vectors)}

    def summary(self) -> str:
        inner = "no adapters" if self.method is None else self.method.summary()
        entries = sum(SparseDelta.count(value) for value in self.sparse.values())
        return f"SPT({inner} at {len(self.structured)} sites, {entries} entries, {len(self.vectors)} vectors)"


class SparseDelta(Adapter):
    """values (k), what is added to the k entries at index (k), int32, of the flattened matrix."""

    index: Tensor

    def __init__(self, index: Any, shape: tuple[int, ...], **kw: Any) -> None:
        super().__init__()
        self.shape, self.columns = shape, sparse.Columns()
        self.values = nn.Parameter(torch.zeros(self.count(index), **kw))
        known = torch.zeros(index) if isinstance(index, int) else torch.as_tensor(index)
        self.register_buffer("index", known.to(kw["device"], torch.int32))

    @staticmethod
    def count(index: Any) -> int:
        return index if isinstance(index, int) else len(index)

    @property
    def on_weight(self) -> bool:
        return True

    def weight(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return w + sparse.matrix(self.values, self.index, self.shape).view_as(w), b

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return sparse.add(x, y, self.values, self.index, self.shape, self.columns, self.route)


# ---- sensitivity ----------------------------------------------------------------------------------------------------


def sensitivity(model: nn.Module, batches: Iterable[tuple[Any, Any]], loss: Callable[..., Tensor] = F.cross_entropy,
                limit: int = 16) -> dict[str, Tensor]:  # fmt: skip
    """Squared gradient of every parameter by its name, summed over at most `limit` batches, in training mode.

    Args:
        batches: (input, target), on the model's device, in the order in which they are to be used.
        loss: of the model's output and a target.

    Gradients of the whole model are alive meanwhile. Modes, flags, gradients and buffers are afterwards as before.
    """
    named = dict(model.named_parameters())
    before = {name: (p.requires_grad, p.grad) for name, p in named.items()}
    modes, buffers = {m: m.training for m in model.modules()}, [(b, b.clone()) for b in model.buffers()]
    scores = {name: torch.zeros_like(p) for name, p in named.items() if p.is_floating_point()}
    try:
        model.train()
        for name in scores:
            named[name].requires_grad_(True)
        for x, target in islice(batches, limit):
            model.zero_grad(set_to_none=True)
            loss(model(x), target).backward()
            for name, score in scores.items():
                if (grad := named[name].grad) is not None:
                    score.add_(grad.detach().square())
    finally:
        for name, p in named.items():
            p.requires_grad_(before[name][0])
            p.grad = before[name][1]
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
    return scores


# ---- allocation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matrix:
    """A weight, or the rows of one, with its scores and the place of its first entry among all that are ranked."""

    site: Site
    scores: Tensor
    start: int = 0


def allocate(model: Any, scores: Mapping[str, Tensor], method: Method | None = None, *, budget: int, alpha: float = 10,
             beta: float = 5, taus: Iterable[int] | None = None) -> SPT:  # fmt: skip
    """The allocation whose number of learnt scalars, without head, is nearest to the budget.

    Args:
        scores: what `sensitivity` gave for this model.
        alpha, beta: a matrix gets its adapter from 1 / alpha of the adapter's size on, a vector learns from 1 / beta
            of its own on.
        taus: numbers of selected scalars to try; by default the paper's, 20,000, 40,000, ..., 1,580,000, and where none
            of these comes within a tenth of the budget, finer steps around the best.

    Raises:
        MethodError: scores of another model, `method` acts nowhere, or nothing is selected.
    """
    tried = sorted(set(PAPERS if taus is None else taus))
    ranking = Ranking(Backbone(model), scores, method, most=tried[-1])

    def best(tried: Iterable[int]) -> tuple[int, int, SPT]:
        found = [tau for tau in tried if tau < ranking.total] or [ranking.total]
        plans = [(tau, *plan) for tau in found if (plan := ranking.plan(tau, alpha, beta)) is not None]
        if not plans:
            raise MethodError(f"nothing is selected with tau={found[-1]}")
        return min(plans, key=lambda plan: abs(plan[1] - budget))

    tau, learnt, plan = best(tried)
    step = PAPERS.step if taus is None else 1
    while step > 1 and abs(learnt - budget) > budget / 10:
        around, step = step, max(1, step // 50)
        tau, learnt, plan = best(range(max(1, tau - around), tau + around + 1, step))
    if abs(learnt - budget) > budget / 10:
        warnings.warn(f"SPT was given a budget of {budget:,} scalars, and the nearest allocation has {learnt:,}",
                      stacklevel=2)
    return plan


class Ranking:
    """The ranked scalars of a model, in one row: matrices first, vectors after them."""

    def __init__(self, backbone: Backbone, scores: Mapping[str, Tensor], method: Method | None, most: int) -> None:
        self.method = method
        self.matrices = [Matrix(site, _scores_of(site, backbone, scores)) for site in _matrices(backbone)]
        self.vectors = {n: _scored(n, scores) for n in _vectors(backbone)}
        rows = [m.scores.flatten() for m in self.matrices] + list(self.vectors.values())
        sizes = [row.numel() for row in rows]
        self.total = sum(sizes)
        self.starts = torch.tensor([0, *sizes]).cumsum(0)
        self.order = torch.cat(rows).cpu().topk(min(most, self.total)).indices
        self.units: list[Unit] = []
        if method is not None:
            self.units = _units(method, backbone, [m.site for m in self.matrices])
        always = [m._parameters[n] for _, m, n in backbone.named_tensors() if n in ALWAYS]
        self.always = sum(p.numel() for p in always if p is not None)

    def plan(self, tau: int, alpha: float, beta: float) -> tuple[int, SPT] | None:
        """Number of learnt scalars and allocation for the tau most sensitive ones; None where they select nothing."""
        chosen = self.order[:tau]
        place = torch.bucketize(chosen, self.starts, right=True) - 1
        count = torch.bincount(place, minlength=len(self.starts) - 1).tolist()
        selected = {m.site: n for m, n in zip(self.matrices, count, strict=False)}
        units = [unit for unit in self.units if sum(selected[m] for m in unit.of) * alpha >= unit.size]
        taken = {m for unit in units for m in unit.of}
        entries = {}
        for i, matrix in enumerate(self.matrices):
            if count[i] and matrix.site not in taken:
                entries[str(matrix.site)] = (chosen[place == i] - self.starts[i]).sort().values
        vectors = [
            name
            for (name, score), n in zip(self.vectors.items(), count[len(self.matrices) :], strict=True)
            if n and n * beta >= score.numel()
        ]
        shared = {factors: size for unit in units for factors, size in unit.shared.items()}
        learnt = sum(unit.size for unit in units) + sum(shared.values()) + sum(map(len, entries.values())) + self.always
        learnt += sum(self.vectors[name].numel() for name in vectors)
        if not (units or entries or vectors):
            return None
        structured = [str(site) for unit in units for site in unit.sites]
        return learnt, SPT(method=self.method, structured=structured, sparse=entries, vectors=vectors)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _matrices(backbone: Backbone) -> list[Site]:
    """Every weight of a Linear or conv, by its parts where it has parts; not head, projection nor patch embedding."""
    apart = (*APART, "patch_embed")
    sites = [s for s in backbone.sites() if s.kind in ("linear", "conv") and s.role not in apart]
    split = {s.path for s in sites if s.part and not s.host}
    return [s for s in sites if s.part or s.path not in split]


def _vectors(backbone: Backbone) -> list[str]:
    heads = backbone.heads()
    embeddings = [s.path for s in backbone.sites() if s.role == "patch_embed"]
    return [
        _join(path, name)
        for path, module, name in backbone.named_tensors()
        if module._parameters[name].dim() == 1  # type: ignore[union-attr]
        and not inside(path, heads)
        and not inside(path, embeddings)
        and name not in UNRANKED
    ]


def _scored(name: str, scores: Mapping[str, Tensor]) -> Tensor:
    if name not in scores:
        raise MethodError(f"there are no scores of {name}: they are of another model, or adapters were attached since")
    return scores[name]


def _scores_of(site: Site, backbone: Backbone, scores: Mapping[str, Tensor]) -> Tensor:
    if site.host:
        place = hosts.place(backbone.module(site.host_path), site.place)
        path = next(path for path, module in backbone.named_modules() if module is place.module)
        return _scored(_join(path, place.weight), scores)[place.rows]
    whole = _scored(_join(site.path, "weight"), scores)
    return whole[slice(*site.rows)] if site.rows else whole


@dataclass(frozen=True)
class Unit:
    """Sites that get their adapters together or not at all.

    Attributes:
        size: numbers in these adapters.
        of: the matrices that speak for them.
        shared: factors that they use with others, and how many numbers these have.
    """

    sites: list[Site]
    size: int
    of: list[Site]
    shared: dict[Site, int]


def _units(method: Method, backbone: Backbone, matrices: list[Site]) -> list[Unit]:
    """Every place where the method may act; one that adapts Linears by themselves may do so at any of them."""
    anywhere = method.targets is None and "linear" in method.kinds and not method.kinds & {"branch", "block", "stage"}
    sites = _accepted(method, backbone, matrices if anywhere else method.choose(backbone))
    if anywhere:  # RepAdapter takes no rows of a Linear, but the whole of it
        parted = {m.path for m in matrices} - {s.path for s in sites}
        sites += _accepted(method, backbone, [s for s in backbone.sites() if not s.part and s.path in parted])
    adapters = method.adapters(sites, backbone) if sites else {}
    factors = {id(adapter): site for site, adapter in adapters.items() if site.kind == "shared"}
    found = []
    for group in method.together([s for s in sites if s in adapters]):
        own = [adapters[site] for site in group]
        used = {factors[id(a.shared)] for a in own if hasattr(a, "shared")}
        of = [m for m in matrices if any(_speaks(m, site, backbone) for site in group)]
        if of:
            found.append(Unit(group, sum(map(_size, own)), of, {site: _size(adapters[site]) for site in used}))
    if not found:
        raise MethodError(f"{type(method).__name__} can act nowhere in this model, or has no adapters to allocate")
    return found


def _accepted(method: Method, backbone: Backbone, sites: list[Site]) -> list[Site]:
    return [s for s in sites if method.refuses(s, backbone.module(s.path)) is None]


def _size(adapter: Adapter) -> int:
    return sum(p.numel() for p in adapter.parameters())


def _speaks(matrix: Site, site: Site, backbone: Backbone) -> bool:
    """Whether a matrix is the site's own, or lies in its branch or block."""
    if site.kind in ("linear", "conv"):
        return matrix.path == site.path and site.part in ("", matrix.part)
    if site.kind == "branch":
        children = [f"{site.path}.{name}" for name in backbone.module(site.path)._modules]
        first, last = (children.index(end) for end in site.ends)
        return inside(matrix.path, children[first : last + 1])
    return inside(matrix.path, [site.path])
