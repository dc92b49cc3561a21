"""PEFT folders: adapter_config.json and adapter_model.safetensors.

    base_model.model.<path>.lora_A.weight (r, in)   .lora_B.weight (out, r)      an embedding's: lora_embedding_A, _B
    base_model.model.<path>.lokr_w1 (a1, a2)        .lokr_w2 (b1, b2)

PEFT takes one factor for both sides of a Kronecker product: KronA goes as LoKr where a1 = a2, else as the exact LoRA.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from visionpeft import state
from visionpeft.errors import FormatError
from visionpeft.formats import common
from visionpeft.formats.common import Change, Kron, LowRank
from visionpeft.sites import Backbone
from visionpeft.tuner import Tuner

_PREFIX = "base_model.model."
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save(tuner: Tuner, path: str | Path) -> None:
    """Write a folder that `PeftModel.from_pretrained(model, path)` reads.

    Raises:
        FormatError: the adapter has something that is no change of low rank, or spans several components.
    """
    roots = {tuner.backbone.split(site.path)[0] for site in tuner.sites}
    if len(roots) > 1:
        raise FormatError(f"a PEFT folder is for one module, and {tuner.name!r} is on {', '.join(sorted(roots))}")
    root = roots.pop()
    whole = common.changes(tuner, kron=True, tables=True)
    square = all(c.w1.shape[0] == c.w1.shape[1] for c in whole if isinstance(c, Kron))
    found = whole if square else common.changes(tuner, tables=True)
    if not square:
        common.tell_growth(tuner, found)
    kinds = {type(change) for change in found}
    if len(kinds) > 1:
        found = common.changes(tuner, tables=True)
    own = {tuner.backbone.split(change.path)[1]: change for change in found}
    modules = {rest: tuner.backbone.roots[root].get_submodule(rest) for rest in own}
    config = _lokr(own) if kinds == {Kron} else _lora(own)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value for rest, change in own.items() for key, value in _tensors(rest, change, modules[rest])}
    common.write(folder / _WEIGHTS, tensors, {})
    config |= {"peft_version": "0.21.2", "target_modules": sorted(own), "inference_mode": True, "task_type": None,
               "base_model_name_or_path": None, "bias": "none", "modules_to_save": None}  # fmt: skip
    state._write(folder / _CONFIG, json.dumps(config, indent=2).encode())


def _tensors(rest: str, change: Change, module: nn.Module) -> list[tuple[str, Tensor]]:
    at = _PREFIX + rest
    if isinstance(change, Kron):
        return [(f"{at}.lokr_w1", change.w1), (f"{at}.lokr_w2", change.w2)]
    if isinstance(module, nn.Embedding):  # PEFT adds (B A)^T
        return [(f"{at}.lora_embedding_A", change.up.t()), (f"{at}.lora_embedding_B", change.down.t())]
    up = change.up.view(*change.up.shape, *[1] * (change.down.dim() - 2))
    return [(f"{at}.lora_A.weight", change.down), (f"{at}.lora_B.weight", up)]


def _lora(own: Mapping[str, Change]) -> dict[str, Any]:
    ranks = {rest: c.rank for rest, c in own.items() if isinstance(c, LowRank)}
    most = statistics.mode(ranks.values())
    other = {rest: r for rest, r in ranks.items() if r != most}
    return {"peft_type": "LORA", "r": most, "lora_alpha": most, "rank_pattern": other, "alpha_pattern": other,
            "lora_dropout": 0.0}  # fmt: skip


def _lokr(own: Mapping[str, Change]) -> dict[str, Any]:
    """r is so large that PEFT keeps w2 whole, and alpha as large, for it scales by alpha / r all the same."""
    kron = [c for c in own.values() if isinstance(c, Kron)]
    r = max(max(c.w2.shape) for c in kron)
    return {"peft_type": "LOKR", "r": r, "alpha": r, "decompose_factor": kron[0].w1.shape[0],
            "decompose_both": False}  # fmt: skip


# ---- in -------------------------------------------------------------------------------------------------------------


def load(model: Any, path: str | Path, name: str | None = None, *, probe: bool = True) -> Tuner:
    """Attach a PEFT folder (LoRA, or LoKr without the scale's ambiguities) to the module that it was made for.

    Raises:
        FormatError: another method, DoRA, biases or saved modules; or it is for another model.
    """
    folder = Path(path)
    try:
        config = json.loads((folder / _CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise FormatError(f"{folder}: no readable {_CONFIG} ({error})") from error
    _refuse(config, folder)
    tensors, _ = common.read(folder / _WEIGHTS)
    backbone = Backbone(model)
    plain = {key.removeprefix(_PREFIX): value for key, value in tensors.items()}
    where = common.by_rest(backbone)
    build = {"LORA": _low_rank, "LOKR": _kron}[config["peft_type"]]
    return common.attach(model, build(plain, config, where, folder), name, folder, probe)


def _refuse(config: Mapping[str, Any], path: Path) -> None:
    kind = config.get("peft_type")
    if kind not in ("LORA", "LOKR"):
        raise FormatError(f"{path}: PEFT's {kind} has no counterpart here; LORA and LOKR do")
    wrong = {
        "use_dora": "DoRA scales the columns of the whole weight",
        "lora_bias": "it adds biases",
        "modules_to_save": "it brings whole modules of its own",
        "layer_replication": "it repeats layers",
        "trainable_token_indices": "it brings rows of an embedding",
        "use_bdlora": "it is block-diagonal",
        "alora_invocation_tokens": "it acts on some tokens only",
    }
    for field, why in wrong.items():
        if config.get(field):
            raise FormatError(f"{path}: {field}={config[field]!r}: {why}, which a LoRA here does not")
    _refuse_moved(config, path)
    if config.get("bias", "none") != "none":
        raise FormatError(f"{path}: bias={config['bias']!r}: it brings biases of the model, which a LoRA here does not")


def _refuse_moved(config: Mapping[str, Any], path: str | Path) -> None:
    init = str(config.get("init_lora_weights")).lower()
    if init.startswith(("pissa", "corda", "olora", "loftq", "lora_ga")):
        raise FormatError(
            f"{path}: init_lora_weights={init!r} took a part out of the base's weights, without which these factors "
            "are wrong: save it in PEFT with path_initial_model_for_weight_conversion, or merge it there"
        )


def scaling(config: Mapping[str, Any], module: str, rank: int, path: str | Path) -> float:
    """alpha / r of one module as PEFT finds it, 1 without a config."""
    _refuse_moved(config, path)
    if "lora_alpha" not in config and "alpha" not in config:
        return 1.0
    if config.get("use_dora"):
        raise FormatError(f"{path}: DoRA scales the columns of the whole weight, which a LoRA here does not")
    alpha = config.get("lora_alpha", config.get("alpha"))
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _low_rank(tensors: Mapping[str, Tensor], config: Mapping[str, Any], where: common.Where,
              path: Path) -> Sequence[Change]:  # fmt: skip
    suffixes = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
    found = common.by_module(tensors, suffixes, path)
    changes = []
    for module, own in common.located(found, where, path).items():
        pair = found[module]
        if "lora_embedding_A" in pair:
            down, up = pair["lora_embedding_B"].t().contiguous(), pair["lora_embedding_A"].t().contiguous()
        else:
            down, up = pair["lora_A.weight"], pair["lora_B.weight"]
        changes.append(common.low_rank(own, down, up, scaling(config, module, down.shape[0], path)))
    return changes


def _kron(tensors: Mapping[str, Tensor], config: Mapping[str, Any], where: common.Where,
          path: Path) -> Sequence[Change]:  # fmt: skip
    suffixes = ("lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b")
    found = common.by_module(tensors, suffixes, path)
    changes = []
    for module, own in common.located(found, where, path).items():
        w1, w2 = (_factor(found[module], f"lokr_{w}", module, path) for w in ("w1", "w2"))
        rank = _pattern(config.get("rank_pattern"), module, config["r"])
        changes.append(Kron(own, w1, w2 * scaling(config, module, rank, path)))
    return changes


def _factor(pair: Mapping[str, Tensor], name: str, module: str, path: Path) -> Tensor:
    whole = pair[name] if name in pair else pair[f"{name}_a"] @ pair[f"{name}_b"]
    if whole.dim() != 2:
        raise FormatError(f"{path}: {module} is a LoKr of a conv with a kernel, which KronA does not adapt")
    return whole.float()


def _pattern(patterns: Mapping[str, int] | None, module: str, default: int) -> int:
    return next((v for p, v in (patterns or {}).items() if re.match(rf"(.*\.)?({p})$", module)), default)
