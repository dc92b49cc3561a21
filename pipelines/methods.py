"""Methods from the command line: a name, or name:field=value,field=value."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import fields
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
    values = dict(preset or {}) | dict(_setting(part, text, known) for part in settings.split(",") if part.strip())
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise MethodError(f"{text!r} cannot be made: {error}") from error


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
