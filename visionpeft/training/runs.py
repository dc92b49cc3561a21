"""Run folders: what a run was asked to do, whether it is finished, and small files that are never half written."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from visionpeft.errors import VisionPEFTError


class RunError(VisionPEFTError):
    """A run folder holds something else than what is asked for."""


def write_text(path: Path, text: str) -> None:
    """Write a file so that readers see the old content or the new, never a part."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place at the end, or vanishes if writing it fails.

    Raises:
        RunError: the disk is full, read-only, or refuses; what was at `path` is still whole.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        if temporary.exists():
            temporary.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON, or say which file is broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}); delete it to start this run again") from error


def slug(text: str) -> str:
    """`text` as one plain folder name."""
    return re.sub(r"[^A-Za-z0-9._=+-]+", "-", text).strip("-") or "unnamed"


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Make `folder` the home of a run with these settings, or check that it already is.

    Raises:
        RunError: the folder belongs to a run with other settings; the first differences are named.
    """
    # Through JSON and back, so that tuples compare with the lists that a file gives.
    settings = json.loads(json.dumps(settings))
    path = folder / "config.json"
    if not path.exists():
        write_json(path, settings)
        return
    old = read_json(path)
    different = [key for key in sorted(old.keys() | settings.keys()) if old.get(key) != settings.get(key)]
    if different:
        shown = "; ".join(f"{key} is {old.get(key)!r} there and {settings.get(key)!r} here" for key in different[:3])
        raise RunError(f"{folder} holds a run with other settings: {shown}. Choose another --out, or delete the folder")
