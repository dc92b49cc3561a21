"""The accelerate.Accelerator of a run: device, precision, processes, trackers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from visionpeft.errors import VisionPEFTError, require

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def make_accelerator(precision: str = "fp32", trackers: tuple[str, ...] = (), folder: Path | None = None) -> Any:
    """An Accelerator; several may follow one another in a process, each with its own precision.

    Raises:
        VisionPEFTError: unknown precision, fp16 on a CPU, or a tracker that is not installed.
    """
    accelerate = require("accelerate", extra="train")
    if precision not in PRECISIONS:
        raise VisionPEFTError(f"unknown precision {precision!r}: use one of {', '.join(PRECISIONS)}")
    _check_trackers(trackers)
    # accelerate keeps the precision of the first Accelerator for the whole process; the process group stays.
    accelerate.state.AcceleratorState._reset_state()
    try:
        accelerator = accelerate.Accelerator(
            mixed_precision=PRECISIONS[precision], log_with=list(trackers) or None,
            project_dir=None if folder is None else str(folder))
    except ValueError as error:
        raise VisionPEFTError(f"precision {precision} does not work here: {error}") from error
    if trackers:
        accelerator.init_trackers("visionpeft")
    return accelerator


def _check_trackers(trackers: tuple[str, ...]) -> None:
    """accelerate drops a tracker that is not installed without a word."""
    known = [str(t.value if hasattr(t, "value") else t) for t in
             require("accelerate.tracking", extra="train").get_available_trackers()]
    missing = [t for t in trackers if t not in known]
    if missing:
        raise VisionPEFTError(f"tracker {missing[0]!r} is unknown or not installed; available: {known or 'none'}")
