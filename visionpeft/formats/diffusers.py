"""LoRA files of diffusers: `pipe.load_lora_weights`, `unet.load_lora_adapter`.

    unet.<path>.lora_A.weight (r, in)   unet.<path>.lora_B.weight (out, r)      text_encoder.text_model.<path>...

Written with the scale in lora_B and alpha = r, so that readers with and without the header field
`lora_adapter_metadata` agree. Read: those keys, the older `.lora.down.weight`, and alphas from the field.
KronA becomes the exact LoRA: `pipe.load_lora_weights` reads no LoKr on Stable Diffusion.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from torch import Tensor

from visionpeft.errors import FormatError
from visionpeft.formats import common, peft
from visionpeft.sites import Backbone
from visionpeft.tuner import Tuner

_SUFFIXES = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
}


def save(tuner: Tuner, path: str | Path) -> None:
    """Write one file for all components, usually called `pytorch_lora_weights.safetensors`.

    Raises:
        FormatError: the adapter has something that is no change of low rank.
    """
    found = [c for c in common.changes(tuner) if isinstance(c, common.LowRank)]
    common.tell_growth(tuner, found)
    names = common.names(tuner.backbone)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, dict[str, int]] = {}
    for change in found:
        part, rest = names[change.path]
        if not part:
            raise FormatError(f"{change.path}: a diffusion pipeline has no component for this model; try peft")
        up = change.up.view(*change.up.shape, *[1] * (change.down.dim() - 2))
        tensors[f"{part}.{rest}.lora_A.weight"], tensors[f"{part}.{rest}.lora_B.weight"] = change.down, up
        ranks.setdefault(part, {})[rest.removeprefix("text_model.")] = change.rank  # matched by its end
    common.write(path, tensors, {"lora_adapter_metadata": json.dumps(_metadata(ranks))})


def _metadata(ranks: dict[str, dict[str, int]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part, own in ranks.items():
        most = statistics.mode(own.values())
        other = {path: r for path, r in own.items() if r != most}
        fields = {"r": most, "lora_alpha": most, "rank_pattern": other, "alpha_pattern": other,
                  "target_modules": sorted(own), "lora_dropout": 0.0, "bias": "none"}  # fmt: skip
        found |= {f"{part}.{key}": value for key, value in fields.items()}
    return found


def load(model: Any, path: str | Path, name: str | None = None, *, probe: bool = True) -> Tuner:
    """Attach a LoRA file of diffusers to a pipeline, or to the component that it is for.

    Raises:
        FormatError: it holds something else, or is for another model.
    """
    tensors, header = common.read(path)
    try:
        metadata = json.loads(header.get("lora_adapter_metadata", "{}"))
    except ValueError as error:
        raise FormatError(f"{path}: lora_adapter_metadata is damaged: {error}") from error
    found = common.by_module(tensors, list(_SUFFIXES), path)
    where = {".".join(names): own for own, names in common.names(Backbone(model)).items()}
    where |= {name.replace(".text_model.", "."): own for name, own in where.items()}
    changes = []
    for module, own in common.located(found, where, path).items():
        pair = {_SUFFIXES[suffix]: value for suffix, value in found[module].items()}
        if len(pair) != 2:
            raise FormatError(f"{path}: {module} has {', '.join(found[module])} alone")
        part, _, rest = module.partition(".")
        config = {k.removeprefix(f"{part}."): v for k, v in metadata.items() if k.startswith(f"{part}.")}
        scale = peft.scaling(config, rest, pair["down"].shape[0], path)
        changes.append(common.low_rank(own, pair["down"], pair["up"], scale))
    return common.attach(model, changes, name, path, probe)
