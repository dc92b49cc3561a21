"""The bundled nano ViT: plain timm, small on disk, and as accurate as its card says."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from visionpeft.errors import VisionPEFTError
from visionpeft.models import nano

timm = pytest.importorskip("timm")
from safetensors.torch import load_file  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = ROOT / "assets" / "nano_vit.safetensors"
CIFAR10 = ROOT.parent / "shared" / "data" / "cifar10" / "cifar10_jpeg.npz"


def card(row: str) -> float:
    """The number in the card's table row that begins with `row`."""
    text = (ROOT / "assets" / "nano_vit.md").read_text()
    found = re.search(rf"^\| {re.escape(row)} \| \**([\d.,]+)", text, re.M)
    assert found, f"no row {row!r} in the card"
    return float(found[1].replace(",", ""))


def test_it_is_timms_own_class_with_timms_shapes() -> None:
    model = nano.create(pretrained=False)
    assert type(model) is VisionTransformer
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert model.forward_features(torch.zeros(2, 3, 32, 32)).shape == (2, 65, 192)
    assert model.get_classifier() is model.head


def test_bundled_tensors_are_the_models_in_fp16() -> None:
    stored, expected = load_file(WEIGHTS), nano.create(pretrained=False).state_dict()
    assert {k: v.shape for k, v in stored.items()} == {k: v.shape for k, v in expected.items()}
    assert {v.dtype for v in stored.values()} == {torch.float16}
    loaded = nano.create().state_dict()
    assert all(torch.equal(loaded[k], v.float()) for k, v in stored.items())


def test_size_and_count_are_those_of_the_card() -> None:
    size = WEIGHTS.stat().st_size
    assert size <= 8e6
    assert size == card("bytes")
    assert sum(p.numel() for p in nano.create().parameters()) == card("parameters")


@pytest.mark.parametrize("classes", [0, 3])
def test_another_number_of_classes_gets_a_fresh_head_on_the_same_backbone(classes: int) -> None:
    model, bundled = nano.create(num_classes=classes), nano.create()
    head = {k for k in bundled.state_dict() if k.startswith("head.")}
    assert all(torch.equal(model.state_dict()[k], v) for k, v in bundled.state_dict().items() if k not in head)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, classes or 192)
    assert model.num_classes == classes


def test_timm_reads_the_preprocessing_from_it() -> None:
    config = timm.data.resolve_model_data_config(nano.create(num_classes=3))
    assert config["input_size"] == (3, 32, 32)
    assert config["mean"] == (0.485, 0.456, 0.406) and config["std"] == (0.229, 0.224, 0.225)
    assert config["interpolation"] == "bicubic" and config["crop_pct"] == 1.0
    assert nano.create(num_classes=3).pretrained_cfg["classifier"] == "head"
    assert nano.create(num_classes=3).default_cfg["num_classes"] == 3


def test_an_unknown_name_is_refused_by_name() -> None:
    with pytest.raises(VisionPEFTError, match="'nano_cnn'.*nano_vit"):
        nano.create("nano_cnn")


@pytest.mark.skipif(not CIFAR10.exists(), reason="needs ../shared/data/cifar10")
def test_accuracy_of_the_card_on_every_tenth_test_image() -> None:
    from PIL import Image

    with np.load(CIFAR10) as file:
        data, offset, labels = (file[f"test_{key}"] for key in ("bytes", "off", "y"))
    rows = range(0, len(labels), 10)
    images = [np.array(Image.open(io.BytesIO(data[offset[i] : offset[i + 1]].tobytes())).convert("RGB")) for i in rows]
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    model = nano.create().eval()
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        right = (model((x - mean) / std).argmax(1).numpy() == labels[list(rows)]).mean()
    # three standard errors of 1,000 draws at 0.8
    assert 100 * right == pytest.approx(card("CIFAR-10 test accuracy, %"), abs=3.8)


def test_fashion_piece_is_balanced_and_taken_unchanged() -> None:
    with np.load(ROOT / "assets" / "fashion_mnist_small.npz") as file:
        data = dict(file)
    for split, per_class in (("train", 100), ("test", 200)):
        assert data[f"{split}_x"].shape == (10 * per_class, 28, 28) and data[f"{split}_x"].dtype == np.uint8
        assert np.bincount(data[f"{split}_y"]).tolist() == [per_class] * 10
    assert data["classes"].tolist()[:2] == ["T-shirt/top", "Trouser"] and len(data["classes"]) == 10
