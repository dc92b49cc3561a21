"""Models by name and from local files; what does not fit is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from visionpeft.models import nano
from visionpeft.pipelines.backbone import Backbone, ModelError, build


def test_weights_come_from_the_file_and_the_head_is_new(checkpoint: str) -> None:
    model = build(Backbone("test_vit", checkpoint, 32), num_classes=7)
    stored = load_file(checkpoint)
    assert all(torch.equal(p, stored[name]) for name, p in model.named_parameters() if not name.startswith("head."))
    assert model.head.out_features == 7


def test_pth_is_opened_without_unpickling(checkpoint: str, tmp_path: Path) -> None:
    stored = load_file(checkpoint)
    torch.save(stored, tmp_path / "model.pth")
    model = build(Backbone("test_vit", str(tmp_path / "model.pth"), 32), 10)
    assert torch.equal(model.blocks[0].attn.qkv.weight, stored["blocks.0.attn.qkv.weight"])
    torch.save({"state_dict": stored, "hook": print}, tmp_path / "unsafe.pth")
    with pytest.raises(ModelError, match="weights_only"):
        build(Backbone("test_vit", str(tmp_path / "unsafe.pth"), 32), 10)


def test_original_npz_goes_through_timm(tmp_path: Path) -> None:
    np.savez(tmp_path / "foreign.npz", something=np.zeros(3))
    with pytest.raises((ModelError, ValueError), match="npz|layout"):
        build(Backbone("test_vit", str(tmp_path / "foreign.npz"), 32), 10)


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    save_file({"conv1.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="does not fit"):
        build(Backbone("test_vit", str(tmp_path / "other.safetensors"), 32), 10)


def test_seeds_decide_the_head(checkpoint: str) -> None:
    heads = [build(Backbone("test_vit", checkpoint, 32), 10, seed=seed).head.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_drop_path_reaches_the_blocks(checkpoint: str) -> None:
    model = build(Backbone("test_vit", checkpoint, 32), 10, drop_path=0.3)
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)


def test_convolutional_models_need_no_size() -> None:
    assert build(Backbone("test_resnet", img_size=64), 10, pretrained=False).num_classes == 10


@pytest.mark.parametrize("backbone, what", [
    (Backbone("vit_base_patch16_225"), "vit_base_patch16_224"), (Backbone("test_vit", "nowhere.pth"), "nowhere.pth"),
    (Backbone("nano_vit", img_size=64), "32"), (Backbone("nano_vit", "some.pth"), "bundled")])
def test_bad_names_are_told(backbone: Backbone, what: str) -> None:
    with pytest.raises(ModelError, match=what):
        build(backbone, 10)


def test_drop_path_where_there_is_none_is_refused() -> None:
    with pytest.raises(ModelError, match="drop_path_rate"):
        build(Backbone("vgg11"), 10, pretrained=False, drop_path=0.1)


def test_ten_classes_do_not_start_from_cifar() -> None:
    model = build(Backbone("nano_vit"), 10)
    assert not torch.equal(model.head.weight, nano.create("nano_vit", num_classes=10).head.weight)
