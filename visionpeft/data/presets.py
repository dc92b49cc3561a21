"""Published hyper-parameters, per method and task.

Sources: the scripts and yaml files of dongzelian/SSF, JieShibo/PETL-ViT (Convpass, FacT, 1-bit adapters),
luogen1996/RepAdapter, extremebird/Hydra, Theia-4869/MoSA and ZhangYuanhan-AI/NOAH. What has no published setting gets
NOAH's common recipe, which is also what Convpass, FacT, RepAdapter, the 1-bit adapters and SPT use.

The papers report the best test epoch of such a run; train on `train_val`, report the last epoch, and expect 0.1 to 1
point less.
"""

from __future__ import annotations

from typing import Any

from visionpeft.data.vtab import ALIASES, TASKS

# lr peaks after `warmup` epochs, counted from `warmup_lr`, and falls to `min_lr` along a cosine. Batches: drop_last.
COMMON: dict[str, Any] = {
    "lr": 1e-3, "weight_decay": 1e-4, "drop_path": 0.1, "epochs": 100, "batch": 64,
    "warmup": 10, "warmup_lr": 1e-6, "min_lr": 1e-5,
    "label_smoothing": 0.0, "mixup": 0.0, "cutmix": 0.0, "augment": None,
}  # fmt: skip
FEWSHOT = {"lr": 5e-3, "label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0, "augment": "randaugment"}

# What a method changes on every task. Full fine-tuning and the probe are searched by their papers: these are ours.
RECIPES: dict[str, dict[str, Any]] = {
    "ssf": {"lr": 5e-3, "weight_decay": 5e-5, "drop_path": 0.0, "warmup_lr": 1e-7, "min_lr": 1e-8},
    "mosa": {"lr": 5e-3, "weight_decay": 0.01, "batch": 128, "drop_path": 0.0},
    "full": {"lr": 1e-4},
    "linear": {"drop_path": 0.0},
}
FIELDS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 8, "alpha": 8, "dropout": 0.1},
    "adaptformer": {"hidden": 8},
    "houlsby": {"hidden": 8},
    "pfeiffer": {"hidden": 8},
    "convpass": {"hidden": 8},
    "convpass_attn": {"hidden": 8, "attention_only": True},
    "repadapter": {"hidden": 8, "groups": 2},
    "hydra": {"rank": 2},
    "mosa": {"hidden": 16},
    "binary_adaptformer": {"hidden": 32},
    "binary_lora": {"rank": 32},
}
# SSF and NOAH's VPT normalise with 0.5, the 1-bit adapters not at all, all others with ImageNet's statistics.
VTAB_PROTOCOL = {"ssf": "vtab-half", "vpt": "vtab-half", "binary_adaptformer": "vtab-raw", "binary_lora": "vtab-raw"}

# Convpass s and init of its 3x3 (X xavier, 0 identity); the same for attention only; FacT-TT r s; FacT-TK r s;
# s of Bi-AdaptFormer-32, Bi-LoRA-32 and RepAdapter; Hydra lr wd s dropout batch; SSF lr wd drop-path.
COLUMNS = {
    "convpass": ("scale", "xavier"), "convpass_attn": ("scale", "xavier"),
    "fact_tt": ("rank", "scale"), "fact_tk": ("rank", "scale"),
    "binary_adaptformer": ("scale",), "binary_lora": ("scale",), "repadapter": ("scale",),
    "hydra": ("lr", "weight_decay", "scale", "dropout", "batch"),
    "ssf": ("lr", "weight_decay", "drop_path"),
}  # fmt: skip
TABLE = """
cifar                0.1  0 0.1 X 8  1    32 0.1  0.1  0.1  0.1 0.0005 0.0001 0.1 0.2 16 0.005 5e-05 0
caltech101           1    0 100 X 16 10   32 10   10   10   5   0.001  0.0001 4   0.1 32 0.001 0.05  0.1
dtd                  0.01 X 0.1 X 8  0.01 16 0.01 0.01 0.01 1   0.001  0.0001 0.1 0.2 32 0.005 5e-05 0
oxford_flowers102    0.1  X 1   X 16 1    32 1    1    1    0.5 0.005  0.0001 0.1 0   64 0.005 5e-05 0
oxford_iiit_pet      1    X 1   X 8  1    16 10   0.01 0.1  0.1 0.001  0.0001 0.1 0   32 0.005 5e-05 0
svhn                 100  X 100 X 16 100  32 100  10   10   10  0.001  0.0001 3   0   16 0.01  5e-05 0
sun397               0.1  0 0.1 X 8  1    16 1    0.1  0.1  0.1 0.001  0.0001 0.1 0.2 64 0.005 5e-05 0
patch_camelyon       10   0 10  X 8  10   32 10   1    10   1   0.005  0.0001 0.1 0.2 64 0.005 5e-05 0
eurosat              10   0 10  X 8  100  32 100  1    10   1   0.0005 0.0001 0.1 0.2 64 0.003 0.05  0.2
resisc45             10   0 100 X 8  0.1  32 10   10   10   5   0.005  0.0001 0.1 0.2 64 0.002 5e-05 0.1
diabetic_retinopathy 1    0 0.1 X 8  1    16 1    1    10   0.1 0.0005 0.0001 4.5 0.2 64 0.005 5e-05 0.2
clevr_count          1    0 10  X 16 1    32 10   1    1    0.5 0.0005 0.0001 1.5 0.2 64 0.002 0.05  0.1
clevr_dist           0.1  X 1   X 4  10   16 10   0.1  0.1  0.1 0.0005 0.0001 0.1 0   16 0.05  0.05  0.1
dmlab                10   0 10  X 16 10   32 10   1    10   5   0.001  0.0001 4.5 0.2 64 0.005 5e-05 0.1
kitti                10   X 10  X 16 10   32 10   1    10   5   0.0005 0.0001 4.5 0.2 64 0.01  5e-05 0
dsprites_loc         100  X 10  X 16 100  32 100  1    1    5   0.001  0.0001 4.5 0.2 16 0.01  5e-05 0
dsprites_ori         0.1  X 1   X 16 1    32 1    0.1  0.1  0.1 0.001  0.0001 2.5 0.2 64 0.005 5e-05 0.2
smallnorb_azi        100  X 100 X 16 100  32 100  1    10   10  0.005  1e-05  3   0.2 64 0.02  5e-05 0.1
smallnorb_ele        1    X 1   X 8  10   16 10   1    1    1   0.0005 0.0001 1   0.2 64 0.005 0.05  0.2
"""


def preset(method: str, task: str) -> dict[str, Any]:
    """The recipe of `method` (a key of METHODS) for `task` (a data spec, or the bare name of a VTAB task).

    Keys: those of COMMON, `fields` (arguments of the method), and `protocol`, a name for `data.preprocessing`.
    """
    family, _, name = task.partition("?")[0].rpartition(":")
    name = ALIASES.get(name, name)
    is_vtab = name in TASKS and family in ("", "vtab")
    recipe = {**COMMON, **RECIPES.get(method, {}), "fields": dict(FIELDS.get(method, {}))}
    recipe |= {"protocol": VTAB_PROTOCOL.get(method, "vtab-imagenet") if is_vtab else "checkpoint"}
    if is_vtab:
        _set_columns(recipe, method, name)
    elif family == "fewshot":
        recipe |= {**FEWSHOT, "protocol": "fewshot"}
        recipe["fields"] |= {"scale": 1.0} if method == "repadapter" else {}
    elif family == "fgvc":
        recipe |= {"augment": "crop", "protocol": "fgvc"}
    return recipe


def _set_columns(recipe: dict[str, Any], method: str, task: str) -> None:
    """Put the table's values for one task into `recipe`, or into its `fields` if they are the method's own."""
    rows = {name: cells for name, *cells in (line.split() for line in TABLE.strip().splitlines())}
    start = 0
    for key, columns in COLUMNS.items():
        cells = rows[task][start : start + len(columns)]
        start += len(columns)
        if key == method:
            for column, cell in zip(columns, cells, strict=True):
                (recipe if column in COMMON else recipe["fields"])[column] = _value(column, cell)


def _value(column: str, cell: str) -> Any:
    if column == "xavier":
        return cell == "X"
    return int(cell) if column in ("rank", "batch") else float(cell)
