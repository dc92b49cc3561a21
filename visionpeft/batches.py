"""One adapter for each sample of a batch.

    vp.activate(model, ["cat", "ink", "cat", None]);  y = model(x)     # 4 samples, None is the bare model

The model runs once for each distinct adapter on its samples, classifiers included, so that the result equals separate
runs; no sample is computed twice. Outputs come back in the order of the batch; where they differ in shape (classifiers
of different size) as a list with one tensor a sample. Every tensor argument whose first axis has the size of the batch
is taken for one of samples. Call the model itself: its other methods (`forward_features`) do not know of samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from visionpeft import activation, binding
from visionpeft.errors import VisionPEFTError
from visionpeft.sites import Backbone


class BatchSite(binding.Mixin):
    """A root that runs once for each adapter among its samples."""

    layer = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        names = self.peft.samples or ()
        sizes = {t.shape[0] for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()}
        if len(names) not in sizes:
            raise VisionPEFTError(f"{len(names)} samples were given an adapter, and the batch has {sorted(sizes)}")
        outputs, order = [], []
        backbone = self.peft.backbone
        found = activation.registry(backbone)
        assert found is not None
        again = [n for n in names if n is not None and found.tuners[n].memory in ("checkpoint", "reversible")]
        if again and torch.is_grad_enabled():
            raise VisionPEFTError(
                f"{again[0]!r} runs its blocks again in backward (memory={found.tuners[again[0]].memory!r}), where it "
                "would not know which sample is whose: attach with memory=rebuild to learn so"
            )
        try:
            _mix(backbone, False)
            for name in dict.fromkeys(names):
                index = [i for i, n in enumerate(names) if n == name]
                found.order = () if name is None else (name,)
                for tuner in found.tuners.values():
                    tuner.active = tuner.name == name
                activation.refresh(backbone)
                outputs.append(super().forward(*_take(args, index, len(names)), **_take(kwargs, index, len(names))))  # type: ignore[misc]
                order += index
        finally:
            found.order = ()
            for tuner in found.tuners.values():
                tuner.active = False
            activation.refresh(backbone)
            _mix(backbone, True)
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
    if merged := [t.name for t in found.tuners.values() if t.merged is not None]:
        raise VisionPEFTError(f"{merged[0]!r} is merged: unmerge it before samples can differ")
    activation.set_active(backbone, [])
    held = binding.grip(backbone.roots[""], binding.SAMPLES, BatchSite)
    held.samples, held.backbone = tuple(names), backbone
    _mix(backbone, True)


def _mix(backbone: Backbone, mixed: bool) -> None:
    for _, _, held in binding.holders(backbone.roots[""]):
        held.mixed = mixed


def _take(value: Any, index: list[int], size: int) -> Any:
    if isinstance(value, Tensor):
        return value[index] if value.dim() and value.shape[0] == size else value
    if isinstance(value, dict):
        return {k: _take(v, index, size) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return _like(value, [_take(v, index, size) for v in value])
    return value


def _join(outputs: list[Any], order: list[int]) -> Any:
    first = outputs[0]
    if isinstance(first, Tensor) and not first.dim():
        raise VisionPEFTError(
            "one adapter per sample: the model gives a single number, so outputs cannot be told apart"
        )
    if isinstance(first, Tensor):
        back = torch.tensor(order).argsort()
        if all(o.shape[1:] == first.shape[1:] for o in outputs):
            return torch.cat(outputs)[back.to(first.device)]
        rows = [row for output in outputs for row in output]
        return [rows[i] for i in back.tolist()]
    if isinstance(first, dict):
        return type(first)(**{k: _join([o[k] for o in outputs], order) for k in first})
    if isinstance(first, (list, tuple)):
        return _like(first, [_join(list(parts), order) for parts in zip(*outputs, strict=True)])
    return first


def _like(sequence: Any, parts: list[Any]) -> Any:
    """A list, tuple or named tuple as `sequence` is."""
    return type(sequence)(*parts) if hasattr(sequence, "_fields") else type(sequence)(parts)
