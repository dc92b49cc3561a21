"""Preprocessing: read off models of three libraries, the protocols, and the pixels that come out."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from visionpeft.data import Preprocessing, preprocessing
from visionpeft.data.preprocessing import AUGMENTATIONS, PROTOCOLS
from visionpeft.errors import DataError

timm = pytest.importorskip("timm")


def vit(**options):
    return timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=24, num_heads=3, num_classes=0, **options)


def noise(width=300, height=260):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18.a1_in1k", "vit_base_patch16_clip_224.openai"])
def test_checkpoint_gives_the_same_pixels_as_timm(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    config = timm.data.resolve_model_data_config(model)
    expected = timm.data.create_transform(**config)(noise())
    found = preprocessing(model).transform()(noise())
    assert type(found) is torch.Tensor
    assert torch.allclose(found, expected, atol=1e-6)


def test_squashed_checkpoint_gives_the_same_pixels_as_timm():
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224")
    model.pretrained_cfg = {**model.pretrained_cfg, "crop_mode": "squash", "crop_pct": 0.9}
    spec = preprocessing(model)
    assert spec.resize == "squash"
    expected = timm.data.create_transform(**timm.data.resolve_model_data_config(model))(noise())
    assert torch.allclose(spec.transform()(noise()), expected, atol=1e-6)


@pytest.mark.parametrize("name, mean, std", [
    ("vtab-imagenet", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), ("vtab-half", [0.5] * 3, [0.5] * 3),
    ("vtab-raw", [0.0] * 3, [1.0] * 3),
])  # fmt: skip
def test_vtab_protocols_squash_to_224_bicubic(name, mean, std):
    found = preprocessing(vit(), name).transform()(noise())
    pixels = np.asarray(noise().resize((224, 224), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    expected = (pixels - np.float32(mean)) / np.float32(std)
    assert np.allclose(found.permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_fgvc_and_fewshot_protocols_crop_224_out_of_256():
    seen = PROTOCOLS["fewshot"].transform()(noise())
    pixels = np.asarray(noise().resize((256, 256), Image.Resampling.BICUBIC), dtype=np.float32)[16:240, 16:240] / 255
    expected = (pixels - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    assert np.allclose(seen.permute(1, 2, 0).numpy(), expected, atol=1e-5)
    assert PROTOCOLS["fgvc"].transform("crop")(noise()).shape == (3, 224, 224)


def test_json_round_trip():
    for spec in PROTOCOLS.values():
        assert Preprocessing.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    for wrong in ({}, {**spec.to_dict(), "more": 1}):
        with pytest.raises(DataError, match="preprocessing has the fields"):
            Preprocessing.from_dict(wrong)
    with pytest.raises(DataError, match="resize='pad'"):
        Preprocessing.from_dict({**spec.to_dict(), "resize": "pad"})
    with pytest.raises(DataError, match="crop_pct=0"):
        Preprocessing.from_dict({**spec.to_dict(), "crop_pct": 0})


def test_size_follows_the_model():
    assert preprocessing(vit(img_size=96)).size == (96, 96)
    dynamic = vit(dynamic_img_size=True)
    assert preprocessing(dynamic).size == (224, 224) and preprocessing(dynamic, size=48).size == (48, 48)
    assert preprocessing(dynamic, size=(32, 64)).transform()(noise()).shape == (3, 32, 64)
    with pytest.raises(DataError, match="100x100 is not a multiple of the patch size 16x16: use 96 or 112"):
        preprocessing(dynamic, size=100)
    with pytest.raises(DataError, match="takes images of 224x224 only, not 96x96.*img_size=96"):
        preprocessing(vit(), size=96)
    with pytest.raises(DataError, match="takes images of 96x96 only, not 224x224"):
        preprocessing(vit(img_size=96), "vtab-half")


def test_a_model_that_does_not_say():
    with pytest.raises(DataError, match="Sequential does not say how its images were prepared"):
        preprocessing(nn.Sequential())
    assert preprocessing(nn.Sequential(), "vtab-raw").size == (224, 224)
    with pytest.raises(DataError, match="unknown preprocessing protocol 'vtab'"):
        preprocessing(nn.Sequential(), "vtab")
    model = vit()
    model.pretrained_cfg = {**model.pretrained_cfg, "crop_mode": "border"}
    with pytest.raises(DataError, match="crop_mode 'border'"):
        preprocessing(model)


def test_open_clip():
    open_clip = pytest.importorskip("open_clip")
    from open_clip.transform import PreprocessCfg, image_transform_v2

    vision = open_clip.CLIPVisionCfg(layers=1, width=64, patch_size=32)
    model = open_clip.CLIP(8, vision, open_clip.CLIPTextCfg(vocab_size=9, layers=1))
    open_clip.model.set_model_preprocess_cfg(model, asdict(PreprocessCfg()))
    spec = preprocessing(model)
    assert spec.size == (224, 224) and spec.resize == "short_side_crop" and spec.mean[0] == pytest.approx(0.48145466)
    expected = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    assert torch.allclose(spec.transform()(noise()), expected(noise()), atol=1e-6)
    with pytest.raises(DataError, match="patch size 32x32"):
        preprocessing(model, size=200)


@pytest.mark.parametrize("config, expected", [
    ({"size": {"height": 64, "width": 64}, "resample": 2},
     Preprocessing((0.1,) * 3, (0.2,) * 3, (64, 64), "bilinear", "squash", 1.0)),
    ({"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224},
      "resample": 3}, Preprocessing((0.1,) * 3, (0.2,) * 3, (224, 224), "bicubic", "short_side_crop", 0.875)),
    ({"size": 64, "resample": 3, "do_normalize": False},
     Preprocessing((0.0,) * 3, (1.0,) * 3, (64, 64), "bicubic", "squash", 1.0)),
])  # fmt: skip
def test_hugging_face_folder(tmp_path, config, expected):
    text = json.dumps({**config, "image_mean": [0.1] * 3, "image_std": [0.2] * 3})
    (tmp_path / "preprocessor_config.json").write_text(text)
    model = nn.Module()
    model.config = SimpleNamespace(_name_or_path=str(tmp_path), patch_size=16)
    assert preprocessing(model) == expected


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_augmentations_keep_the_shape_and_follow_the_seed(augment):
    transform = Preprocessing(*[(0.5,) * 3] * 2, (32, 32), "bicubic", "short_side_crop", 0.9).transform(augment)
    torch.manual_seed(0)
    first = [transform(noise()) for _ in range(4)]
    torch.manual_seed(0)
    second = [transform(noise()) for _ in range(4)]
    assert all(torch.equal(a, b) and a.shape == (3, 32, 32) for a, b in zip(first, second, strict=True))
    assert any(not torch.equal(first[0], other) for other in first[1:])


def test_crop_takes_another_window_and_flip_only_mirrors():
    spec = Preprocessing(*[(0.5,) * 3] * 2, (24, 24), "bicubic", "squash", 0.75)
    plain = spec.transform()(noise())
    torch.manual_seed(0)
    for augment, known in (("flip", True), ("crop", False)):
        seen = [spec.transform(augment)(noise()) for _ in range(8)]
        is_known = [torch.equal(x, plain) or torch.equal(x, plain.flip(-1)) for x in seen]
        assert all(is_known) if known else not all(is_known)


def test_unknown_augmentation():
    with pytest.raises(DataError, match="unknown augmentation 'mirror'"):
        PROTOCOLS["vtab-half"].transform("mirror")


def test_nano_vit_takes_32_pixels():
    nano = pytest.importorskip("visionpeft.models.nano")
    spec = preprocessing(nano.create("nano_vit", pretrained=False, num_classes=10))
    assert spec.size == (32, 32)
    assert spec.transform()(noise(28, 28).convert("RGB")).shape == (3, 32, 32)
