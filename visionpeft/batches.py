"""One adapter for each sample of a batch.

    vp.activate(model, ["cat", "ink", "cat", None]);  y = model(x)     # 4 samples, None is the bare model

The model runs once for each distinct adapter on its samples, classifiers included, so that the result equals separate
runs; no sample is computed twice. Outputs come back in the order of the batch; where they differ in shape (classifiers
of different size) as a list with one tensor a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from visionpeft import activation, binding
from visionpeft.errors import VisionPEFTError
from visionpeft.sites import Backbone

if TYPE_CHECKING:
    from visionpeft.activation import Registry

_USER = "*"  # user name under which the root is dressed


class BatchSite(binding.Mixin):
    """A root that runs once for each adapter among its samples."""

    layer = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        names = self.peft.samples or ()
        sizes = {t.shape[0] for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()}
        if len(names) not in sizes:
            raise VisionPEFTError(f"{len(names)} samples were given an adapter, and the batch has {sorted(sizes)}")
        outputs, order = [], []
        backbone, registry = self.peft.backbone, self.peft.registry
        try:
            for name in dict.fromkeys(names):
                index = [i for i, n in enumerate(names) if n == name]
                _only(backbone, registry, name)
                outputs.append(super().forward(*_take(args, index, len(names)), **_take(kwargs, index, len(names))))  # type: ignore[misc]
                order += index
        finally:
            _nobody(backbone)
        return _join(outputs, order)


def activate_samples(backbone: Backbone, names: Sequence[str | None]) -> None:
    """Give each sample of the next batches an adapter, None for the bare model.

    Raises:
        VisionPEFTError: an unknown name, a merged adapter, or a model of several components.
    """
    found = activation.registry(backbone)
    if found is None or set(backbone.roots) != {""}:
        raise VisionPEFTError("one adapter per sample needs a single module with adapters attached")
    for name in {n for n in names if n is not None}:
        if name not in found.tuners:
            raise VisionPEFTError(f"no adapter named {name!r}; there are: {', '.join(found.tuners)}")
    held = binding.grip(backbone.roots[""], _USER, BatchSite)
    held.samples, held.backbone = tuple(names), backbone
    _nobody(backbone)


def release_samples(backbone: Backbone) -> None:
    """Back to the same adapters for all samples."""
    for root in backbone.roots.values():
        held = binding.holder(root)
        if held is not None and held.samples is not None:
            held.samples = held.backbone = None
            binding.release(root, _USER)
        for _, _, held in binding.holders(root):
            held.mixed = False


def _only(backbone: Backbone, registry: Registry, name: str | None) -> None:
    for _, _, held in binding.holders(backbone.roots[""]):
        held.mixed = False
    tuner = None if name is None else registry.tuners[name]
    activation.set_active(backbone, [] if tuner is None else [(tuner, tuner.scale)])


def _nobody(backbone: Backbone) -> None:
    activation.set_active(backbone, [])
    for _, _, held in binding.holders(backbone.roots[""]):
        held.mixed = True


def _take(value: Any, index: list[int], size: int) -> Any:
    if isinstance(value, Tensor):
        return value[index] if value.dim() and value.shape[0] == size else value
    if isinstance(value, dict):
        return {k: _take(v, index, size) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_take(v, index, size) for v in value)
    return value


def _join(outputs: list[Any], order: list[int]) -> Any:
    first = outputs[0]
    if isinstance(first, Tensor):
        back = torch.tensor(order).argsort()
        if all(o.shape[1:] == first.shape[1:] for o in outputs):
            return torch.cat(outputs)[back.to(first.device)]
        rows = [row for output in outputs for row in output]
        return [rows[i] for i in back.tolist()]
    if isinstance(first, dict):
        return type(first)(**{k: _join([o[k] for o in outputs], order) for k in first})
    if isinstance(first, (list, tuple)):
        return type(first)(_join(list(parts), order) for parts in zip(*outputs, strict=True))
    return first
