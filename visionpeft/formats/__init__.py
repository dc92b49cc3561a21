"""Adapter files of other tools, both ways.

    visionpeft.formats.diffusers.save(tuner, "cat.safetensors")      tuner = visionpeft.formats.kohya.load(pipe, file)

`diffusers`, `kohya`, `peft`, `lycoris` and `cloneofsimo` each have `save(tuner, path)` and `load(model, path, name)`.
LoRA and all that is low rank goes everywhere; KronA goes to LyCORIS and PEFT as LoKr where they can read its shape,
and elsewhere as the exact LoRA, whose growth is told. `save(tuner, path, "diffusers-lokr")` and `"comfyui"` write LoKr
for `load_lora_adapter` (a1 = a2) and for readers that take any shape. What a format cannot say is refused with the
reason.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from visionpeft.errors import FormatError
from visionpeft.tuner import Tuner

FORMATS = ("diffusers", "kohya", "peft", "lycoris", "cloneofsimo")
VARIANTS: dict[str, tuple[str, dict[str, bool]]] = {  # LoKr for readers other than LyCORIS
    "diffusers-lokr": ("lycoris", {"as_diffusers": True}),
    "comfyui": ("lycoris", {"any_shape": True}),
}


def format_of(path: str | Path) -> str:
    """Which tool wrote a file: one of FORMATS, or "visionpeft".

    Raises:
        FormatError: nothing here reads it.
    """
    import safetensors

    path = Path(path)
    if path.is_dir():
        if (path / "adapter_config.json").exists():
            return "peft"
        raise FormatError(f"{path}: a folder without adapter_config.json is no PEFT adapter")
    if path.suffix in (".pt", ".pth", ".bin"):
        return "cloneofsimo"
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            header, keys = file.metadata() or {}, list(file.keys())
    except (OSError, safetensors.SafetensorError) as error:
        raise FormatError(f"{path}: no readable safetensors file ({error})") from error
    return "visionpeft" if "visionpeft" in header else _by_keys(path, keys)


def _by_keys(path: Path, keys: list[str]) -> str:
    if any(".lokr_" in k or k.startswith("lycoris_") for k in keys):
        return "lycoris"
    if any(".lora_down.weight" in k and k.startswith("lora_") for k in keys):
        return "kohya"
    if any(k.startswith("base_model.model.") for k in keys):
        raise FormatError(f"{path}: tensors of a PEFT folder: give the folder, whose adapter_config.json has the scale")
    if any(".lora_A." in k or ".lora.down." in k for k in keys):
        return "diffusers"
    raise FormatError(f"{path}: not a format that is known here; keys look like {', '.join(keys[:3])}")


def module(name: str) -> ModuleType:
    """The module of a format, or of a variant."""
    name, _ = VARIANTS.get(name, (name, {}))
    if name not in FORMATS:
        raise FormatError(f"no format {name!r}; there are: visionpeft, {', '.join((*FORMATS, *VARIANTS))}")
    return importlib.import_module(f"visionpeft.formats.{name}")


def __getattr__(name: str) -> ModuleType:
    if name in FORMATS:
        return module(name)
    raise AttributeError(f"visionpeft.formats has no {name!r}; there are: {', '.join(FORMATS)}")


def load(model: Any, path: str | Path, name: str | None = None, *, probe: bool = True) -> Tuner:
    """Attach an adapter file, whichever tool wrote it."""
    kind = format_of(path)
    if kind == "visionpeft":
        from visionpeft.state import load as load_native

        return load_native(model, path, name, probe=probe)
    tuner: Tuner = module(kind).load(model, path, name, probe=probe)
    return tuner


def save(tuner: Tuner, path: str | Path, format: str) -> None:
    """Write an adapter for another tool (one of FORMATS or VARIANTS), or for this library ("visionpeft")."""
    if format == "visionpeft":
        return tuner.save(path)
    _, options = VARIANTS.get(format, ("", {}))
    module(format).save(tuner, path, **options)
