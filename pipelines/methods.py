"""Methods from the command line: a name, or name:field=value,field=value; and SPT, which a cell makes from its data."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import visionpeft as vp
from visionpeft.errors import VisionPEFTError


class MethodError(VisionPEFTError):
    """A method or one of its settings is unknown or malformed."""


def method_name(text: str) -> str:
    """The name in "lora:rank=8"."""
    return text.partition(":")[0].strip()


def parse_method(text: str, preset: Mapping[str, Any] | None = None) -> Any:
    """The method that "lora:rank=8,targets=query value" describes.

    Args:
        preset: settings that hold where `text` does not say otherwise.

    Raises:
        MethodError: names what is unknown, and what there is.
    """
    name, _, settings = text.partition(":")
    cls = vp.METHODS.get(name.strip())
    if cls is None:
        raise MethodError(f"unknown method {name!r}: one of {', '.join(sorted(vp.METHODS))}; as baselines raw, scratch")
    known = [f.name for f in fields(cls) if f.init]
    values = dict(preset or {}) | dict(_setting(part, text, known) for part in _parts(settings))
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise MethodError(f"{text!r} cannot be made: {error}") from error


def free_fields(text: str) -> list[str]:
    """Fields of the method that "lora:rank=8" does not say; none of a baseline and of spt."""
    name, _, settings = text.partition(":")
    given = {part.partition("=")[0].strip() for part in _parts(settings)}
    cls = None if name.strip() == "spt" else vp.METHODS.get(name.strip())
    return [] if cls is None else [f.name for f in fields(cls) if f.init and f.name not in given]


@dataclass(frozen=True)
class Budget:
    """SPT before it has seen model and data: "spt:budget=400000,method=lora", or without method for sparse entries."""

    budget: int
    method: str | None = None
    """Name of the method that is allocated, with its defaults: lora, linear_adapter or any other."""


def parse_job_method(text: str, preset: Mapping[str, Any] | None = None) -> Any:
    """`parse_method`, or a Budget for spt.

    Raises:
        MethodError: as there; or there is no budget.
    """
    if method_name(text) != "spt":
        return parse_method(text, preset)
    known = [f.name for f in fields(Budget)]
    values = dict(_setting(part, text, known) for part in _parts(text.partition(":")[2]))
    if not isinstance(values.get("budget"), int) or values["budget"] < 1:
        raise MethodError(f"{text!r}: SPT needs the number of scalars to spend: spt:budget=400000,method=lora")
    if values.get("method") is not None:
        parse_method(values["method"])
    return Budget(**values)


def _parts(settings: str) -> list[str]:
    """Split at commas, those within brackets apart."""
    return [part for part in re.split(r",(?![^(]*\))", settings) if part.strip()]


def _setting(part: str, text: str, known: list[str]) -> tuple[str, Any]:
    key, equals, value = part.partition("=")
    key = key.strip()
    if not equals or key not in known:
        raise MethodError(f"{part.strip()!r} in {text!r}: write field=value with a field of {', '.join(known)}")
    return key, literal(value.strip())


def literal(value: str) -> Any:
    """A number, True, False or None where `value` reads as one, else the string itself."""
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(value.lower(), value))
    except (ValueError, SyntaxError):
        return value
