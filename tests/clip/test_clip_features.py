"""Features and their cache: what decides a feature is in the key, and nothing else is."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import PREPARE
from tiny_clip import tiny as tiny_clip

import visionpeft as vp
from visionpeft.clip.features import (
    FeatureCache,
    data_digest,
    image_features,
    may_cache,
    text_features,
    tower_digest,
)
from visionpeft.data.preprocessing import Preprocessing
from visionpeft.data.sets import ArraySource, FileSource, ImageSet
from visionpeft.errors import DataError

TEXT = dict(context_length=8, vocab_size=40)


def tiny():
    return tiny_clip(text=TEXT)


def pictures(count: int = 5) -> ImageSet:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return ImageSet(ArraySource(pixels, "random"), np.zeros(count, dtype=np.int64))


def tune(model, tower, **fields):
    tuner = vp.attach(model, vp.LoRA(rank=2, targets="query", tower=tower, **fields))
    with torch.no_grad():
        for p in tuner.parameters():
            p.normal_()
    return tuner


def test_features_are_those_of_the_model_image_by_image():
    model, images = tiny(), pictures()
    model.train().visual.ln_post.eval()
    modes = [m.training for m in model.modules()]
    found = image_features(model, images, PREPARE, batch=2)
    assert [m.training for m in model.modules()] == modes
    model.eval()
    transform = PREPARE.transform()
    with torch.no_grad():
        one = [model.encode_image(transform(images[i][0])[None], normalize=True) for i in range(5)]
    torch.testing.assert_close(found, torch.cat(one), rtol=0, atol=1e-5)
    ids = torch.tensor([[1, 5, 39, 0, 0, 0, 0, 0], [1, 7, 8, 9, 39, 0, 0, 0]])
    with torch.no_grad():
        torch.testing.assert_close(text_features(model, ids), model.encode_text(ids, normalize=True))


def test_second_look_is_a_hit_also_from_the_folder(tmp_path):
    model, images = tiny(), pictures()
    cache = FeatureCache(tmp_path)
    first = image_features(model, images, PREPARE, cache)
    assert cache.hits == 0
    again = FeatureCache(tmp_path)
    assert torch.equal(image_features(model, images, PREPARE, again), first) and again.hits == 1
    for file in tmp_path.iterdir():
        file.write_bytes(b"damaged")
    other = FeatureCache(tmp_path)
    assert torch.equal(image_features(model, images, PREPARE, other), first) and other.hits == 0


def test_everything_that_changes_a_feature_changes_the_digest():
    model = tiny()
    seen = [tower_digest(model, "image")]
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.visual.conv1.weight.view(-1)[0] += 1e-6
    seen.append(tower_digest(other, "image"))
    seen.append(tower_digest(copy.deepcopy(model).bfloat16(), "image"))
    tuner = tune(model, "image")
    seen.append(tower_digest(model, "image"))
    tuner.scale = 0.5
    seen.append(tower_digest(model, "image"))
    with torch.no_grad():
        next(tuner.parameters()).view(-1)[0] += 1e-3
    seen.append(tower_digest(model, "image"))
    assert len(set(seen)) == len(seen)


def test_every_tensor_of_every_method_is_in_the_digest_of_its_tower_wherever_it_is_kept():
    """Factors that several sites share lie at the root, outside of either tower."""
    seen = {}
    for key, method in vp.METHODS.items():
        model = tiny()
        if key == "linear":  # CLIP has no classifier
            continue
        try:
            tuner = vp.attach(model, method(tower="image"))
        except vp.VisionPEFTError:  # it needs another kind of tower
            continue
        image, text = tower_digest(model, "image"), tower_digest(model, "text")
        for name, tensor in tuner.state_dict().items():
            kept = tensor.clone()
            with torch.no_grad():
                tensor.view(-1)[0].add_(1)
            assert tower_digest(model, "image") != image, f"{key}: {name}"
            assert tower_digest(model, "text") == text
            with torch.no_grad():
                tensor.copy_(kept)
        assert tower_digest(model, "image") == image
        seen[key] = len(tuner.state_dict())
    assert len(seen) > 20 and {"fact_tt", "fact_tk", "compacter"} <= set(seen)


def test_settings_that_no_tensor_tells_are_in_the_digest():
    plain = tiny()
    seen = [tower_digest(plain, tower) for tower in ("image", "text")]
    for other in (tiny_clip(text=TEXT, quick_gelu=True), tiny_clip({"head_width": 4}, {**TEXT, "heads": 4}),
                  tiny_clip({"pool_type": "avg"}, {**TEXT, "pool_type": "last"})):  # fmt: skip
        other.load_state_dict(plain.state_dict())
        seen += [tower_digest(other, tower) for tower in ("image", "text")]
    for alpha in (1, 4):
        model = tiny()
        torch.manual_seed(0)
        tune(model, "image", alpha=alpha)
        seen.append(tower_digest(model, "image"))
    with torch.autocast("cpu", torch.bfloat16):
        seen.append(tower_digest(plain, "image"))
    assert len(set(seen)) == len(seen)


def test_an_adapter_that_rests_leaves_the_key_of_the_model_alone():
    model = tiny()
    alone = tower_digest(model, "image")
    tuner = tune(model, "image")
    with tuner.disabled():
        assert tower_digest(model, "image") == alone
    tuner.detach()
    assert tower_digest(model, "image") == alone


def test_turned_photos_are_other_images(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    one, other = (ImageSet(FileSource([str(tmp_path / "a.png")], exif=exif), np.zeros(1)) for exif in (True, False))
    assert data_digest(one) != data_digest(other)


def test_scale_dtype_preprocessing_and_data_miss_and_the_other_tower_does_not():
    model, images, cache = tiny(), pictures(), FeatureCache()
    ids = torch.tensor([[1, 5, 39, 0, 0, 0, 0, 0]])
    image_features(model, images, PREPARE, cache)
    text_features(model, ids, cache)
    tuner = tune(model, "text")
    image_features(model, images, PREPARE, cache)
    assert cache.hits == 1
    full = text_features(model, ids, cache)
    tuner.scale = 0.5
    assert not torch.equal(text_features(model, ids, cache), full) and cache.hits == 1
    image_features(model, images, PREPARE, cache)
    assert cache.hits == 2
    image_features(model, images, Preprocessing((0.4,) * 3, (0.5,) * 3, (16, 16)), cache)
    image_features(model, images.take(np.array([1, 0, 2, 3, 4])), PREPARE, cache)
    image_features(model.double(), images, PREPARE, cache)
    assert cache.hits == 2


def test_training_may_cache_only_what_stays():
    model = tiny().requires_grad_(False)
    assert may_cache(model, "image") and may_cache(model, "text") and not may_cache(model, "image", augmented=True)
    tuner = tune(model, "text")
    assert may_cache(model, "image") and not may_cache(model, "text")
    tuner.detach()
    vp.attach(model, vp.methods.LNTuning(tower="image"))
    assert not may_cache(model, "image") and may_cache(model, "text")


def test_an_image_that_is_gone_is_named(tmp_path):
    paths = [str(tmp_path / f"{i}.png") for i in range(2)]
    for path in paths:
        Image.new("RGB", (16, 16)).save(path)
    images = ImageSet(FileSource(paths), np.zeros(2, dtype=np.int64))
    model = tiny()
    image_features(model, images, PREPARE)
    (tmp_path / "1.png").unlink()
    with pytest.raises(DataError, match="1.png: no such image file"):
        image_features(model, images, PREPARE, FeatureCache())
