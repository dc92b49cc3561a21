"""Resumable checkpoints: what learns, the optimiser, the position. Written atomically, read without unpickling.

No random state needs saving: the loop seeds every update from (seed, epoch, step, process).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visionpeft.errors import VisionPEFTError
from visionpeft.training import runs


class CheckpointError(VisionPEFTError):
    """A checkpoint cannot be read, or belongs to another run."""


def learnt(model: nn.Module) -> dict[str, Tensor]:
    """What training changes in `model`: parameters that require grad, and all buffers, by name (not copied)."""
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return state | {name: b for name, b in model.named_buffers()}


def restore(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy the tensors of `learnt` back into `model`.

    Raises:
        CheckpointError: names or shapes differ.
    """
    own = learnt(model)
    wrong = sorted(own.keys() ^ state.keys()) or [n for n in own if own[n].shape != state[n].shape]
    if wrong:
        raise CheckpointError(f"the checkpoint is of another model or method: {', '.join(wrong[:3])} differ")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def write(path: Path, state: dict[str, Any]) -> None:
    """Write `state` so that a crash at any moment leaves the old file or the new one, never half of one."""
    with runs.replacing(path) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> dict[str, Any]:
    """Read what `write` wrote, tensors on the CPU."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} is no readable checkpoint ({error}); delete it to start again") from error
