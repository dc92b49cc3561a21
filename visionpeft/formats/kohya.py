"""LoRA files of kohya's sd-scripts, which ComfyUI and the WebUIs read.

    lora_unet_<path>.lora_down.weight (r, in)   .lora_up.weight (out, r)   .alpha ()       dots in paths as underscores
    lora_te_<path> on SD 1 and 2, lora_te1_ and lora_te2_ on SDXL
    lora_transformer_<path>     read only: some trainers write so for SD3 and Flux, sd-scripts does not

Written with the scale in lora_up and one alpha for all modules (the most frequent rank), for diffusers takes one for
all of attention whatever a module's own is. Names are those of diffusers' modules on SDXL too, where sd-scripts itself
uses the original ones: the readers above know both, and so does `load`. KronA becomes
the exact LoRA; `visionpeft.formats.lycoris` keeps it.
"""

from __future__ import annotations

import datetime
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visionpeft.binding import base_class
from visionpeft.errors import FormatError
from visionpeft.formats import common
from visionpeft.sites import Backbone
from visionpeft.tuner import Tuner

_SUFFIXES = ("lora_down.weight", "lora_up.weight", "alpha")
_PREFIXES = {"unet": "lora_unet", "transformer": "lora_transformer", "text_encoder": "lora_te"}
_TWO = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2", "text_encoder_3": "lora_te3"}
_BASES = {  # sd-scripts' version and the architecture of the model specification
    "sd1": ("sd_v1", "stable-diffusion-v1/lora"),
    "sd2": ("sd_v2", "stable-diffusion-v2-512/lora"),
    "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
}


def save(tuner: Tuner, path: str | Path) -> None:
    """Write one file for all components, with the header that users' tools show.

    Raises:
        FormatError: the adapter has something that is no change of low rank, or is on another kind of model.
    """
    found = [c for c in common.changes(tuner) if isinstance(c, common.LowRank)]
    common.tell_growth(tuner, found)
    refuse_transformers(tuner.backbone)
    names = flat_names(tuner.backbone)
    alpha = statistics.mode(change.rank for change in found)
    tensors: dict[str, Tensor] = {}
    for change in found:
        name, up = names[change.path], change.up * (change.rank / alpha)
        tensors[f"{name}.lora_down.weight"] = change.down
        tensors[f"{name}.lora_up.weight"] = up.view(*up.shape, *[1] * (change.down.dim() - 2))
        tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    ranks = {change.rank for change in found}
    common.write(path, tensors, header(tuner.backbone, Path(path).stem, "networks.lora", ranks))


def load(model: Any, path: str | Path, name: str | None = None, *, probe: bool = True) -> Tuner:
    """Attach a file of sd-scripts (LoRA, LoCon as far as it is plain) to a pipeline or to its UNet.

    Raises:
        FormatError: it holds something else (DoRA, LoHa, Tucker factors), or is for another model.
    """
    tensors, _ = common.read(path)
    found = common.by_module(tensors, _SUFFIXES, path)
    changes = []
    for module, own in common.located(found, flat_paths(Backbone(model)), path).items():
        parts = found[module]
        if "lora_down.weight" not in parts or "lora_up.weight" not in parts:
            raise FormatError(f"{path}: {module} has {', '.join(parts)} alone")
        down, up = parts["lora_down.weight"], parts["lora_up.weight"]
        changes.append(common.low_rank(own, down, up, _scale(parts, down.shape[0])))
    return common.attach(model, changes, name, path, probe)


def _scale(parts: Mapping[str, Tensor], rank: int) -> float:
    return float(parts["alpha"]) / rank if "alpha" in parts else 1.0


# ---- names ----------------------------------------------------------------------------------------------------------


def refuse_transformers(backbone: Backbone) -> None:
    """Refuse to write for models whose modules sd-scripts calls by names, and cuts in pieces, of its own.

    Raises:
        FormatError: there is a DiT, SD3, Flux, ... among the components.
    """
    for name, root in backbone.roots.items():
        if common.component(root) == "transformer":
            raise FormatError(
                f"{name or 'transformer'}: sd-scripts names and cuts the modules of transformers otherwise, so that "
                "readers would not find these: write formats.diffusers, which ComfyUI reads as well"
            )


def flat_names(backbone: Backbone) -> dict[str, str]:
    """Path of a module -> its name in files.

    Raises:
        FormatError: a component that sd-scripts does not adapt.
    """
    two = "text_encoder_2" in backbone.roots
    found = {}
    for own, (part, rest) in common.names(backbone).items():
        prefix = _PREFIXES.get(part)
        if two:
            prefix = _TWO.get(part, prefix)
        if prefix is not None:
            found[own] = f"{prefix}_{rest.replace('.', '_')}"
    return _Names(found)


class _Names(dict[str, str]):
    def __missing__(self, path: str) -> str:
        raise FormatError(f"{path}: sd-scripts has no name for this component: it knows UNets and CLIP text encoders")


def flat_paths(backbone: Backbone) -> dict[str, str]:
    """Name in files -> path of the module; SDXL's original names are among them."""
    found: dict[str, str] = {}
    for own, name in flat_names(backbone).items():
        for alias in {name, *_original(own, backbone), *([name.replace("_te_", "_te1_")] if "_te_" in name else [])}:
            found[alias] = own
    return found


def _original(own: str, backbone: Backbone) -> list[str]:
    """SDXL: down_blocks.1.attentions.0.<rest> is input_blocks.4.1.<rest> there, each level having its resnets first."""
    root, rest = backbone.split(own)
    parts = rest.split(".")
    if base_class(backbone.roots[root]).__name__ != "UNet2DConditionModel" or "attentions" not in parts[:3]:
        return []
    layers = backbone.roots[root].config.layers_per_block  # type: ignore[union-attr]
    tail = "_".join(parts[parts.index("attentions") + 2 :])
    if parts[0] == "mid_block":
        return [f"lora_unet_middle_block_1_{tail}"]
    level, block = int(parts[1]), int(parts[3])
    if not isinstance(layers, int):
        return []
    if parts[0] == "down_blocks":
        return [f"lora_unet_input_blocks_{level * (layers + 1) + block + 1}_1_{tail}"]
    return [f"lora_unet_output_blocks_{level * (layers + 1) + block}_1_{tail}"]


# ---- header ---------------------------------------------------------------------------------------------------------


def header(backbone: Backbone, title: str, network: str, ranks: set[int]) -> dict[str, str]:
    """What sd-scripts writes of a network (`ss_*`) and Stability's model specification (`modelspec.*`)."""
    dim = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    found = {"ss_network_module": network, "ss_network_dim": dim, "ss_network_alpha": dim,
             "ss_network_args": json.dumps({}), "ss_output_name": title}  # fmt: skip
    now = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)
    found |= {"modelspec.sai_model_spec": "1.0.0", "modelspec.title": title, "modelspec.date": now.isoformat()}
    base = _base(backbone)
    if base is not None:
        version, architecture = _BASES[base]
        found |= {"ss_base_model_version": version, "ss_v2": str(base == "sd2"),
                  "modelspec.architecture": architecture, "modelspec.implementation": "diffusers"}  # fmt: skip
    return found


def _base(backbone: Backbone) -> str | None:
    """Which Stable Diffusion it is, by the width of its text and what else conditions it."""
    unet: nn.Module | None = next((r for r in backbone.roots.values() if common.component(r) == "unet"), None)
    config: Any = getattr(unet, "config", None)
    if config is None:
        return None
    if config.addition_embed_type == "text_time":
        return "sdxl"
    return {768: "sd1", 1024: "sd2"}.get(config.cross_attention_dim)
