"""The handle that `attach` returns: everything one can do with an adapter afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from visionpeft import activation, binding
from visionpeft.adapter import Adapter, Method
from visionpeft.errors import VisionPEFTError
from visionpeft.sites import Backbone, Site

if TYPE_CHECKING:
    from pathlib import Path

    from visionpeft.account import MemoryReport


class Tuner:
    """One adapter in one model.

    Attributes:
        name: its name in the model.
        memory: what is kept for backward, see `visionpeft.levers`.
        method: the frozen hyper-parameters.
        sites: where it acts.
        adapters: the module at each site.
        in_place: tensors of the model that learn as copies, (path, name): the method's and those of `train=`.
        bindings: the modules that were dressed for it, and how.
        trained: those of `train=` among them; they ignore `scale`.
        active, merged: whether it acts, and whether its deltas are in the weights.
    """

    def __init__(self, backbone: Backbone, method: Method, name: str, sites: list[Site],
                 memory: str = "rebuild") -> None:  # fmt: skip
        self.backbone = backbone
        self.method = method
        self.name = name
        self.memory = memory
        self.sites = sites
        self.adapters: dict[Site, Adapter] = {}
        self.in_place: list[tuple[str, str]] = []
        self.trained: list[tuple[str, str]] = []
        self.active = True
        self.merged: list[Any] | None = None
        self.kept: Any = None  # merged weights that wait to be put in again
        self.bindings: list[tuple[nn.Module, tuple[type[binding.Mixin], ...]]] = []
        self.written: Any = None  # what stood in the weights where `shira.switch` put this adapter
        self._scale = 1.0

    @property
    def model(self) -> Any:
        """The user's model, without wrappers of torch.compile or DDP."""
        return self.backbone.model

    def __repr__(self) -> str:
        state = "merged" if self.merged is not None else "active" if self.active else "resting"
        size = f"{len(self.sites)} sites, {self.num_parameters:,} parameters"
        return f"Tuner({self.name!r}, {self.method.summary()}, {size}, {state})"

    # ---- parameters

    def parameters(self) -> Iterator[nn.Parameter]:
        """What the optimiser needs: the adapters' parameters and the copies that learn in place, each once."""
        seen: set[int] = set()
        for _, tensor in self._named():
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor

    @property
    def num_parameters(self) -> int:
        """Scalars of the method itself, shared ones once, without `train=`; for full fine-tuning all of the base."""
        own: list[Tensor] = [p for adapter in self.adapters.values() for p in adapter.parameters()]
        own += [self.learnt(*key) for key in self.in_place if self._counts(key)]
        return sum({id(t): t.numel() for t in own if isinstance(t, nn.Parameter)}.values())

    def _counts(self, key: tuple[str, str]) -> bool:
        return key not in self.trained or any((s.path, s.part) == key and s.kind == "tensor" for s in self.sites)

    def learnt(self, path: str, name: str) -> Tensor:
        """This adapter's copy of a tensor of the model, wherever it stands now."""
        module = self.backbone.module(path)
        held = binding.holder(module)
        if held is None or self.name not in held.users:
            raise VisionPEFTError(
                f"{self.name!r} is detached, or {path or 'the root'} was replaced since it was attached"
            )
        if self.merged is not None and f"{self.name}.{name}" in held.aside:  # merged with adapters of ours at its site
            if held.live.get(name) == self.name:
                return held.aside[f"{self.name}.{name}"]  # type: ignore[return-value]
        elif held.live.get(name) == self.name:
            return binding.get_tensor(module, name)  # type: ignore[return-value]
        return activation.waiting(held, self.name, name)

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for site, adapter in self.adapters.items():
            yield from ((f"{site}.{key}", value) for key, value in adapter.state_dict(keep_vars=True).items())
        for path, name in self.in_place:
            yield f"{path}.{name}" if path else name, self.learnt(path, name)

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor of the adapter as `site.tensor`, and every copy that learns in place by its name."""
        return {key: value.detach() for key, value in self._named()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy the tensors in.

        Raises:
            VisionPEFTError: keys or shapes differ, with the first of them; nothing was changed.
        """
        own = dict(self._named())
        missing, foreign = [k for k in own if k not in state], [k for k in state if k not in own]
        unlike = [k for k in own if k in state and own[k].shape != state[k].shape]
        if missing or foreign or unlike:
            what = (("missing", missing), ("unknown", foreign), ("of another shape", unlike))
            raise VisionPEFTError(f"{self.name!r}: " + "; ".join(f"{len(k)} {w}: {k[:3]}" for w, k in what if k))
        if self.merged is not None:
            raise VisionPEFTError(f"{self.name!r} is merged: unmerge it before loading other tensors")
        activation.check_offloaded(self.backbone)
        for key, value in own.items():
            value.copy_(state[key])
        activation.settle(self.backbone)

    # ---- how it acts

    @property
    def scale(self) -> float:
        """How strongly the adapter acts: 1 as trained, 0 not at all. `train=` tensors are taken whole."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        if self.merged is not None:
            raise VisionPEFTError(f"{self.name!r} is merged: unmerge it before its scale can change")
        self.check_strength(float(value))
        activation.check_offloaded(self.backbone)
        self.set_strength(float(value))
        activation.settle(self.backbone)

    def check_strength(self, value: float) -> None:
        """Refuse strengths that mean nothing here."""
        self._check_not_written()
        if not math.isfinite(value):
            raise VisionPEFTError(f"{self.name!r}: a scale must be a finite number, not {value}")
        acts = ("arguments", "before", "after")
        whole = next((a for a in self.adapters.values() if a.whole or any(map(a.overrides, acts))), None)
        if value != 1 and self.memory == "reversible":
            raise VisionPEFTError(f"{self.name!r}: memory=\"reversible\" acts wholly or not at all: no scale {value}")
        if value != 1 and whole is not None:
            raise VisionPEFTError(f"{type(self.method).__name__} acts wholly or not at all: it has no scale {value}")

    def set_strength(self, value: float) -> None:
        self._scale = value
        for adapter in self.adapters.values():
            adapter.strength = value

    @property
    def fused(self) -> bool:
        """Whether Linears use the fused function; False means plain torch (double backward needs it).

        One setting for the whole model, other adapters included: they share the function.
        """
        found = activation.registry(self.backbone)
        return found is None or found.fused

    @fused.setter
    def fused(self, value: bool) -> None:
        if (found := activation.registry(self.backbone)) is not None:
            found.fused = value
            activation.refresh(self.backbone)

    def _holders(self) -> Iterator[binding.Holder]:
        for root in self.backbone.roots.values():
            yield from (held for _, _, held in binding.holders(root))

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model without this adapter; re-entrant, and afterwards it acts as before, also after an exception.

        Raises:
            VisionPEFTError: each sample has its own adapter at present.
        """
        self._check_not_written()
        if any(held.mixed for held in self._holders()):
            raise VisionPEFTError("each sample has its own adapter: use None for a sample that should have none")
        if not self.active:
            yield
            return
        merged = self.merged is not None
        if merged:
            self.unmerge()
        place = self._others(lambda names: names.index(self.name), add=False)
        try:
            yield
        finally:
            found = activation.registry(self.backbone)
            if found is not None and found.tuners.get(self.name) is self:
                self._others(lambda names: min(place, len(names)), add=True)
                if merged:
                    self.merge(keep=self.kept is not None)

    def _others(self, place: Callable[[list[str]], int], add: bool) -> int:
        """Leave the other active adapters as they are, with this one put in at a place or taken out of it."""
        found = activation.registry(self.backbone)
        names = list(found.order) if found else []
        at = place(names)
        names = [n for n in names if n != self.name]
        if add:
            names.insert(at, self.name)
        assert found is not None
        activation.set_active(self.backbone, [(found.tuners[n], found.tuners[n].scale) for n in names])
        return at

    # ---- what becomes of it

    def check_wrappers(self) -> None:
        """Refuse to undress modules whose adapted forward somebody has wrapped since (accelerate, LyCORIS)."""
        self._check_not_written()
        for module, mixins in self.bindings:
            if binding.changed(module):
                raise VisionPEFTError(
                    f"the class of a {type(module).__name__} was changed after {self.name!r} was attached "
                    "(parametrize, weight_norm, FSDP2, SyncBatchNorm): undo that first"
                )
            binding.drop_leftover(module)
            if binding.shadowed(module, mixins):
                raise VisionPEFTError(
                    f"a {type(module).__name__} got an instance-level `forward` after {self.name!r} came, which "
                    "holds the adapted one: remove that wrapper first"
                )

    def _check_not_written(self) -> None:
        if self.written is not None:
            raise VisionPEFTError(f"{self.name!r} was put into the weights by shira.switch: take it out first")

    def merge(self, keep: bool = False) -> None:
        """Write the adapter into the weights. The model then runs as fast as without it and emits no adapter keys.

        Args:
            keep: hold on to the merged weights after `unmerge`, as many bytes again as the weights that they replace,
                so that the next `merge(keep=True)` changes pointers only. Where the adapter, its scale or the weights
                have changed since, they are computed anew. `detach`, or a `merge` without it, lets them go.

        Raises:
            MergeError: a site cannot merge, by name; nothing was changed.
        """
        from visionpeft.merging import merge

        merge(self, keep)

    def unmerge(self) -> None:
        """Undo `merge`, to the bit.

        Raises:
            MergeError: a merged weight was written or replaced meanwhile.
        """
        from visionpeft.merging import unmerge

        unmerge(self)

    def detach(self) -> None:
        """Leave the model exactly as it was before `attach`."""
        from visionpeft.attaching import detach

        detach(self)

    def probe(self, *example: Any) -> None:
        """Run an example through the model, in train with gradients and in eval without; nothing changes by it.

        Raises:
            DeadAdapterError: adapters that never act, by name.
        """
        from visionpeft.probing import probe

        probe(self, example)

    def memory_report(self, *example: Any) -> MemoryReport:
        """What each adapter makes the model keep between forward and backward, in bytes; prints as a table.

        Raises:
            VisionPEFTError: the adapter does not act at present.
        """
        from visionpeft.account import memory_report

        return memory_report(self, example)

    def save(self, path: str | Path, **metadata: Any) -> None:
        """Write one `.safetensors` file; `metadata` is anything that JSON takes. If it fails, the old file stays."""
        from visionpeft.state import save

        save(self, path, metadata)
