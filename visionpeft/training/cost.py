"""What a run costs: peak memory and time."""

from __future__ import annotations

import re
from pathlib import Path

import torch


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new measurement of `peak_memory`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        # Linux: sets the high-water mark of the process back to what it uses now.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak_memory(device: torch.device) -> int | None:
    """Largest number of bytes used since `reset_peak_memory`: of the device, on a CPU of the whole process.

    None where the system does not tell (a CPU run outside Linux).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else None
