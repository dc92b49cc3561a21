"""What every adapter makes a model keep alive between forward and backward: `tuner.memory_report(example)`.

Each adapter is taken out in turn and the bytes alive after forward are counted again (`memory.live_bytes`), so the
account holds for any method and for whatever stands around it. It takes as many forwards as there are adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from visionpeft import probing
from visionpeft.errors import VisionPEFTError
from visionpeft.memory import live_bytes

if TYPE_CHECKING:
    from visionpeft.sites import Site
    from visionpeft.tuner import Tuner


class Entry(NamedTuple):
    """Bytes alive with everything, less those alive without the adapter of this site; None if it cannot be missed."""

    site: Site
    kept: int | None


class MemoryReport(list[Entry]):
    """Entries, one a site; prints as a table.

    Attributes:
        frozen: bytes alive after the forward without this tuner, the input taking a gradient.
        adapted: bytes alive with it.
    """

    def __init__(self, entries: list[Entry], frozen: int, adapted: int) -> None:
        super().__init__(entries)
        self.frozen, self.adapted = frozen, adapted

    def __repr__(self) -> str:
        width = max((len(str(e.site)) for e in self), default=0)
        lines = [f"{str(e.site):{width}}  {_mib(e.kept):>10}" for e in self]
        ratio = f" ({self.adapted / self.frozen:.3f})" if self.frozen else ""
        total = f"frozen {_mib(self.frozen)}, adapted {_mib(self.adapted)}{ratio}"
        return "\n".join([*lines, f"alive after forward: {total}"])

    __str__ = __repr__


def _mib(size: int | None) -> str:
    return "together" if size is None else f"{size / 2**20:.2f} MiB"


@torch.enable_grad()
def memory_report(tuner: Tuner, example: tuple[Any, ...]) -> MemoryReport:
    """The account of a tuner on an example, in train mode; nothing changes by it.

    Raises:
        VisionPEFTError: the adapter rests or is merged, and so keeps nothing.
    """
    if not tuner.active or tuner.merged is not None:
        raise VisionPEFTError(f"{tuner.name!r} does not act now: activate or unmerge it before it can be measured")
    example = tuple(map(_wanting, example))
    device = next(iter(tuner.parameters())).device

    def alive() -> int:
        return live_bytes(lambda: probing._run(tuner, example), device)

    with probing._untouched(tuner):
        probing._train(tuner, True)
        probing._run(tuner, example)  # what is made once is not counted
        adapted = alive()
        with tuner.disabled():
            frozen = alive()
        sites = [site for site in tuner.adapters if site.kind != "shared"]
        entries = [Entry(site, _missed(alive, tuner, site, adapted)) for site in sites]
        for path, name in tuner.in_place:
            entries += _copied(alive, tuner, path, name, adapted)
    return MemoryReport(entries, frozen, adapted)


def _wanting(value: Any) -> Any:
    """Floating tensors that ask for a gradient: the frozen model is compared where gradients pass through it."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.is_floating_point())
    if isinstance(value, (list, tuple)):
        return type(value)(map(_wanting, value))
    return {k: _wanting(v) for k, v in value.items()} if isinstance(value, dict) else value


def _missed(alive: Callable[[], int], tuner: Tuner, site: Site, adapted: int) -> int | None:
    with _resting(tuner.adapters[site]):
        try:
            return adapted - alive()
        except torch.OutOfMemoryError:
            raise
        except (VisionPEFTError, RuntimeError):  # prompts, which change the number of tokens for all that follow
            return None


@contextmanager
def _resting(adapter: Any) -> Iterator[None]:
    """One adapter left out: the binding asks by the kind of site."""
    kind, adapter.kind = adapter.kind, ""
    try:
        yield
    finally:
        adapter.kind = kind


def _copied(alive: Callable[[], int], tuner: Tuner, path: str, name: str, adapted: int) -> list[Entry]:
    """What a tensor that learns in place costs: frozen for a while."""
    from visionpeft.sites import Site

    tensor = tuner.learnt(path, name)
    if not tensor.requires_grad:
        return []
    tensor.requires_grad_(False)
    try:
        return [Entry(Site(path, name, kind="tensor"), adapted - alive())]
    finally:
        tensor.requires_grad_(True)
