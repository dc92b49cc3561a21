"""Presets against the published tables, cell by cell where columns could slip."""

import pytest

from visionpeft.data.presets import COMMON, TABLE, preset
from visionpeft.data.vtab import TASKS


def test_the_table_has_every_task_once():
    rows = [line.split() for line in TABLE.strip().splitlines()]
    assert sorted(row[0] for row in rows) == sorted(TASKS) and {len(row) for row in rows} == {20}


@pytest.mark.parametrize("task, lr, decay, drop", [
    ("vtab:caltech101", 1e-3, 5e-2, 0.1), ("cifar100", 5e-3, 5e-5, 0), ("clevr_dist", 5e-2, 5e-2, 0.1),
    ("eurosat", 3e-3, 5e-2, 0.2), ("smallnorb_azi?train=1000", 2e-2, 5e-5, 0.1), ("kitti", 1e-2, 5e-5, 0),
])  # fmt: skip
def test_ssf(task, lr, decay, drop):
    found = preset("ssf", task)
    assert (found["lr"], found["weight_decay"], found["drop_path"]) == (lr, decay, drop)
    assert (found["protocol"], found["warmup_lr"], found["min_lr"], found["fields"]) == ("vtab-half", 1e-7, 1e-8, {})


def test_hydra_sets_training_and_method_apart():
    found = preset("hydra", "smallnorb_azi")
    assert (found["lr"], found["weight_decay"], found["batch"]) == (5e-3, 1e-5, 64)
    assert found["fields"] == {"rank": 2, "scale": 3.0, "dropout": 0.2} and found["drop_path"] == 0.1


@pytest.mark.parametrize("method, task, fields", [
    ("convpass", "dtd", {"hidden": 8, "scale": 0.01, "xavier": True}),
    ("convpass", "cifar", {"hidden": 8, "scale": 0.1, "xavier": False}),
    ("convpass_attn", "resisc45", {"hidden": 8, "attention_only": True, "scale": 100.0, "xavier": True}),
    ("fact_tt", "clevr_dist", {"rank": 4, "scale": 10.0}),
    ("fact_tk", "dsprites_loc", {"rank": 32, "scale": 100.0}),
    ("binary_adaptformer", "caltech101", {"hidden": 32, "scale": 10.0}),
    ("binary_lora", "oxford_iiit_pet", {"rank": 32, "scale": 0.1}),
    ("repadapter", "smallnorb_ele", {"hidden": 8, "groups": 2, "scale": 1.0}),
    ("repadapter", "fewshot:food101", {"hidden": 8, "groups": 2, "scale": 1.0}),
    ("lora", "dtd", {"rank": 8, "alpha": 8, "dropout": 0.1}),
])  # fmt: skip
def test_method_fields(method, task, fields):
    assert preset(method, task)["fields"] == fields


def test_common_recipe():
    found = preset("bitfit", "vtab:svhn")
    assert found == {**COMMON, "fields": {}, "protocol": "vtab-imagenet"}
    assert (COMMON["lr"], COMMON["weight_decay"], COMMON["batch"], COMMON["epochs"]) == (1e-3, 1e-4, 64, 100)
    assert preset("bitfit", "bundled")["protocol"] == "checkpoint"


def test_other_benchmarks():
    few = preset("lora", "fewshot:food101")
    assert (few["lr"], few["mixup"], few["cutmix"], few["label_smoothing"]) == (5e-3, 0.8, 1.0, 0.1)
    assert (few["augment"], few["protocol"]) == ("randaugment", "fewshot")
    assert preset("lora", "fgvc:nabirds")["protocol"] == "fgvc"


def test_a_preset_is_a_copy():
    preset("lora", "dtd")["fields"]["rank"] = 99
    assert preset("lora", "dtd")["fields"]["rank"] == 8
