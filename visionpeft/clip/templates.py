"""Prompt templates: open_clip's sets, the single templates of CoOp, files of one's own.

    read_templates("openai")                      80 templates, open_clip's OPENAI_IMAGENET_TEMPLATES
    read_templates("simple")                      7, SIMPLE_IMAGENET_TEMPLATES
    read_templates("coop:eurosat")                the one of CoOp, Tip-Adapter, GDA and CLIP-Adapter for that set
    read_templates("a photo of a {}.")            itself
    read_templates("mine.json")                   a JSON list; or mine.json:cifar10, one list of a JSON object

A template has one place for the class name, `{}` or `{c}` as in CLIP_benchmark.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from visionpeft.clip.errors import ClipError
from visionpeft.errors import require

Template = str | Callable[[str], str]

PHOTO = "a photo of a {}."

# Kaiyang Zhou et al., CoOp (arXiv 2109.01134): one prompt for each data set.
COOP = {
    "imagenet": PHOTO, "caltech101": PHOTO, "stanford_cars": PHOTO, "sun397": PHOTO,
    "oxford_pets": "a photo of a {}, a type of pet.",
    "oxford_flowers": "a photo of a {}, a type of flower.",
    "fgvc_aircraft": "a photo of a {}, a type of aircraft.",
    "food101": "a photo of {}, a type of food.",
    "dtd": "{} texture.",
    "eurosat": "a centered satellite photo of {}.",
    "ucf101": "a photo of a person doing {}.",
}  # fmt: skip


def read_templates(spec: str | Sequence[Template]) -> list[Template]:
    """The templates that `spec` names, or is.

    Raises:
        ClipError: unknown name, unreadable file, or a template without exactly one place for the class name.
    """
    if not isinstance(spec, str):
        found: list[Template] = list(spec)
    elif spec in ("openai", "simple"):
        sets = require("open_clip", extra="clip")
        found = list(getattr(sets, f"{spec.upper()}_IMAGENET_TEMPLATES"))
    elif spec.startswith("coop:"):
        found = [_coop(spec.removeprefix("coop:"))]
    elif ".json" in spec:
        found = _from_json(spec)
    else:
        found = [spec]
    if not found:
        raise ClipError(f"templates {spec!r}: the list is empty")
    for template in found:
        _check(template, spec)
    return found


def fill(template: Template, name: str) -> str:
    """The prompt of a class; underscores of its name become spaces."""
    name = name.replace("_", " ")
    if callable(template):
        return template(name)
    return template.replace("{c}" if "{c}" in template else "{}", name)


def _coop(name: str) -> Template:
    if name not in COOP:
        raise ClipError(f"templates coop:{name}: CoOp has none for it; it has {', '.join(COOP)}")
    return COOP[name]


def _from_json(spec: str) -> list[Template]:
    file, _, key = spec.partition(".json:")
    path = Path(file if file.endswith(".json") else f"{file}.json").expanduser()
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ClipError(f"templates {path}: cannot be read ({error})") from error
    if isinstance(data, dict):
        if key not in data:
            raise ClipError(f"templates {path}: write {path}:<name> with one of {', '.join(data)}")
        data = data[key]
    if not isinstance(data, list) or not all(isinstance(t, str) for t in data):
        raise ClipError(f"templates {path}: expected a JSON list of strings, or an object of such lists")
    return data


def _check(template: Template, spec: object) -> None:
    if callable(template):
        return
    if template.count("{}") + template.count("{c}") != 1:
        raise ClipError(
            f"template {template!r} of {spec!r}: write {{}} or {{c}} once, where the class name goes; the named sets "
            "are openai, simple, coop:<data set>"
        )
