"""Pictures of a subject: decoding, captions, masks, buckets, crops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

Image = pytest.importorskip("PIL.Image")

from visionpeft.data.subjects import (  # noqa: E402
    Crop,
    fit,
    make_buckets,
    mask_of,
    nearest_bucket,
    pixels,
    read_subject,
)
from visionpeft.errors import DataError  # noqa: E402


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> Any:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images: lying on its side by EXIF, with transparency, plain."""
    side = noise(20, 40)
    exif = side.getexif()
    exif[0x0112] = 6
    side.save(tmp_path / "a.png", exif=exif)
    noise(30, 30, 4, 1).save(tmp_path / "b.png")
    noise(64, 16, 3, 2).save(tmp_path / "c.png")
    (tmp_path / "notes.md").write_text("no image")
    return tmp_path


def test_sizes_and_modes(folder: Path) -> None:
    a, b, c = read_subject(folder)
    assert [p.size for p in (a, b, c)] == [(40, 20), (30, 30), (64, 16)]
    assert np.array_equal(np.array(a.open()), np.rot90(np.array(noise(20, 40)), -1))
    rgba = np.array(noise(30, 30, 4, 1)).astype(np.float64)
    share = rgba[..., 3:] / 255
    assert np.abs(np.array(b.open()) - (share * rgba[..., :3] + (1 - share) * 255)).max() <= 1
    assert a.digest != b.digest and a.caption is None


def test_captions(folder: Path) -> None:
    (folder / "captions.json").write_text(json.dumps({"a.png": "from the table", "b.png": " b "}))
    (folder / "a.txt").write_text("beside it\n")
    with pytest.raises(DataError, match="2 of 3 images have a caption, and c.png has none"):
        read_subject(folder)
    found = read_subject(folder, allow_missing_captions=True)
    assert [p.caption for p in found] == ["beside it", "b", None]
    (folder / "captions.json").write_text(json.dumps({"z.png": "?"}))
    with pytest.raises(DataError, match="'z.png', and there is no such image"):
        read_subject(folder)
    (folder / "captions.json").write_text("[1]")
    with pytest.raises(DataError, match="captions.json: expected"):
        read_subject(folder)


def test_captions_in_other_encodings(folder: Path) -> None:
    """A mark at the beginning, as some editors leave, is no part of the caption; what is no UTF-8 is named."""
    for name in "ac":
        (folder / f"{name}.txt").write_bytes(b"\xef\xbb\xbfa caf\xc3\xa9")
    (folder / "captions.json").write_bytes(b'\xef\xbb\xbf{"b.png": "a b"}')
    assert [p.caption for p in read_subject(folder)] == ["a café", "a b", "a café"]
    (folder / "a.txt").write_bytes(b"a caf\xe9")
    with pytest.raises(DataError, match="a.txt: a caption is text in UTF-8"):
        read_subject(folder)


def test_bad_folders(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        read_subject(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image there"):
        read_subject(tmp_path / "empty")
    (folder / "bad.png").write_bytes((folder / "b.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"bad\.png: cannot read.*or skip"):
        read_subject(folder)
    told: list[str] = []
    assert len(read_subject(folder, skip_corrupt=True, tell=told.append)) == 3
    assert len(told) == 1 and "bad.png" in told[0]


def test_buckets() -> None:
    buckets = make_buckets(512, 64)
    assert (512, 512) in buckets and all(h % 64 == 0 == w % 64 and h * w <= 512 * 512 for h, w in buckets)
    assert all((w, h) in buckets for h, w in buckets) and max(h / w for h, w in buckets) <= 2
    assert nearest_bucket((1000, 1000), buckets) == (512, 512)
    assert nearest_bucket((300, 400), buckets) == (448, 576)
    assert nearest_bucket((4000, 100), buckets)[0] == max(h for h, _ in buckets)
    with pytest.raises(DataError, match="multiples of 64"):
        make_buckets(500, 64)


def test_fit_covers_and_crops() -> None:
    image = noise(20, 50)
    whole, corner = fit(image, (20, 50), Crop())
    assert corner == (0, 0) and np.array_equal(np.array(whole), np.array(image))
    left, corner = fit(image, (20, 20), Crop(right=0.0))
    assert corner == (0, 0) and np.array_equal(np.array(left), np.array(image)[:, :20])
    right, corner = fit(image, (20, 20), Crop(right=1.0, flip=True))
    assert corner == (0, 30) and np.array_equal(np.array(right), np.array(image)[:, :29:-1])


def test_pixels_run_from_minus_one_to_one(tmp_path: Path) -> None:
    values = np.zeros((8, 8, 3), np.uint8)
    values[:4] = 255
    Image.fromarray(values).save(tmp_path / "x.png")
    x, _ = pixels(read_subject(tmp_path)[0], (8, 8), Crop())
    assert torch.equal(x[:, :4], torch.ones(3, 4, 8)) and torch.equal(x[:, 4:], -torch.ones(3, 4, 8))


def test_masks(folder: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    grey = np.zeros((40, 20), np.uint8)
    grey[:20] = 255
    Image.fromarray(grey).save(masks / "a.png")
    with pytest.raises(DataError, match="no mask b.png"):
        read_subject(folder, masks=str(masks))
    for name in ("b.png", "c.png"):
        (folder / name).unlink()
    (picture,) = read_subject(folder, masks=str(masks))
    found = mask_of(picture, (40, 20), Crop(), 4)
    assert found is not None and found.shape == (1, 10, 5)
    assert torch.equal(found, torch.cat([torch.ones(1, 5, 5), torch.zeros(1, 5, 5)], 1))
    Image.fromarray(0 * grey).save(masks / "a.png")
    with pytest.raises(DataError, match="covers nothing"):
        mask_of(picture, (40, 20), Crop(), 4)


def test_alpha_as_mask(folder: Path) -> None:
    a, b, _ = read_subject(folder, masks="alpha")
    found = mask_of(b, (30, 30), Crop(), 1)
    assert found is not None
    assert np.array_equal((found[0] * 255).round().byte().numpy(), np.array(noise(30, 30, 4, 1))[..., 3])
    with pytest.raises(DataError, match="no transparency"):
        mask_of(a, (40, 20), Crop(), 1)
