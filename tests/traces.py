"""What attaching may leave in a model, written down so that two moments can be compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def snapshot(root: nn.Module) -> dict[str, Any]:
    """Keys, classes, Parameter objects, flags, modes, hooks, attributes and the bits of every tensor of a model."""
    modules = dict(root.named_modules())
    tensors = dict(root.named_parameters(remove_duplicate=False)) | dict(root.named_buffers(remove_duplicate=False))
    return {
        "keys": list(root.state_dict()),
        "modules": {path: (id(m), type(m)) for path, m in modules.items()},
        "training": {path: m.training for path, m in modules.items()},
        "hooks": {path: [len(getattr(m, h)) for h in _HOOKS] for path, m in modules.items()},
        "attributes": {path: _plain(m) for path, m in modules.items()},
        "ids": {name: id(t) for name, t in tensors.items()},
        "flags": {name: t.requires_grad for name, t in tensors.items()},
        "grads": {name: t.grad is None for name, t in tensors.items()},
        "bits": {name: t.detach().clone() for name, t in tensors.items()},
    }


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def _plain(module: nn.Module) -> dict[str, Any]:
    """Attributes that compare by value; their names, for all others."""
    simple = (int, float, str, bool, tuple, type(None))
    found = {k: v for k, v in vars(module).items() if isinstance(v, simple) and k != "training"}
    return {**found, "*": sorted(vars(module))}


def assert_same(before: dict[str, Any], root: nn.Module) -> None:
    """The model is to the bit and to the object what it was."""
    after = snapshot(root)
    for aspect in before:
        if aspect == "bits":
            changed = [n for n, t in before["bits"].items() if not torch.equal(t, after["bits"][n])]
            assert not changed, f"tensors changed: {changed[:5]}"
        else:
            assert after[aspect] == before[aspect], aspect
