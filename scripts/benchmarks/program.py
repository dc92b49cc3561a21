"""What the benchmarks share: the machine, figures that stay beside new ones, a command of several cases."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from benchmarks.measure import Row

import visionpeft as vp

DOCS = Path(__file__).resolve().parents[2] / "docs"
Case = Callable[[bool, int, str], list[Row]]  # whether quick, rounds, device


def device() -> str:
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return here.type if here else "cpu"


def machine(device: str) -> dict[str, Any]:
    versions = {"torch": torch.__version__, "visionpeft": vp.__version__}
    for name in ("timm", "open_clip_torch", "diffusers", "transformers", "peft", "lycoris-lora"):
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown")
    threads = {"threads": torch.get_num_threads(), "cores": os.cpu_count()}
    return {"device": device, "processor": name, "cpu": cpu, **threads, **versions}


def known(file: Path, here: dict[str, Any]) -> dict[str, Any]:
    """What was measured before on this machine, from the .json beside a page.

    Raises:
        SystemExit: it was another machine.
    """
    old = file.with_suffix(".json")
    found = json.loads(old.read_text(encoding="utf-8")) if old.exists() else {}
    if any(found.get("machine", here)[key] != here[key] for key in ("device", "processor")):
        raise SystemExit(f"{old} holds figures of another machine: choose another --out")
    return found | {"machine": here}


def program(doc: str | None, cases: Mapping[str, Case], markdown: Callable[[dict[str, Any]], str], out: Path,
            arguments: list[str] | None = None) -> int:  # fmt: skip
    """Measure the cases that are asked for; their rows replace those of before, and are written at once."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(cases), default=list(cases))
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds")
    parser.add_argument("--quick", action="store_true", help="small models, two rounds; writes no file")
    parser.add_argument("--device", default=device())
    parser.add_argument("--out", type=Path, default=out)
    given = parser.parse_args(arguments)
    if given.device == "cpu":
        torch.set_num_threads(1)
    here = machine(given.device)
    found = {"machine": {"models": "small, no figure counts"} | here} if given.quick else known(given.out, here)
    found.setdefault("rows", [])
    for name in given.only:
        new = cases[name](given.quick, 2 if given.quick else given.rounds, given.device)
        found["rows"] = [r for r in found["rows"] if r["case"] != name] + new
        found["rows"].sort(key=lambda r: list(cases).index(r["case"]))
        if not given.quick:
            given.out.write_text(markdown(found), encoding="utf-8")
            given.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(markdown(found))
    return 0
