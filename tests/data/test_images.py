"""Every mode of Pillow becomes the right RGB; damaged files are named."""

import io

import numpy as np
import pytest
from PIL import Image

from visionpeft.data import read_image
from visionpeft.data.images import to_rgb
from visionpeft.errors import DataError


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixel(image):
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def test_grey_and_bilevel():
    assert pixel(to_rgb(Image.new("L", (2, 2), 77))) == (77, 77, 77)
    assert pixel(to_rgb(Image.new("1", (2, 2), 1))) == (255, 255, 255)


@pytest.mark.parametrize("value, expected", [(0, 0), (257, 1), (32768, 128), (65535, 255)])
def test_16_bit_grey_is_scaled_not_clipped(value, expected):
    data = encoded(Image.fromarray(np.full((2, 2), value, dtype=np.uint16)))
    assert pixel(read_image(data)) == (expected,) * 3


def test_float_images_outside_the_range_are_refused():
    data = encoded(Image.fromarray(np.full((2, 2), -1.0, dtype=np.float32)), "TIFF")
    with pytest.raises(DataError, match="mode F"):
        read_image(data)


def test_palette():
    image = Image.new("P", (2, 2), 3)
    image.putpalette([0, 0, 0] * 3 + [10, 20, 30])
    assert pixel(read_image(encoded(image))) == (10, 20, 30)


def test_cmyk_jpeg():
    red, green, blue = pixel(read_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)))
    assert red > 240 and green < 15 and blue < 15


def test_transparent_parts_become_white_whatever_colour_is_hidden_there():
    assert pixel(read_image(encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 0))))) == (255, 255, 255)
    assert pixel(read_image(encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 255))))) == (255, 0, 0)
    assert pixel(read_image(encoded(Image.new("LA", (2, 2), (9, 0))))) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([1, 2, 3])
    assert pixel(read_image(encoded(palette, transparency=0))) == (255, 255, 255)
    assert pixel(read_image(encoded(Image.new("RGB", (2, 2), (1, 2, 3)), transparency=(1, 2, 3)))) == (255, 255, 255)


def test_exif_rotation_only_where_asked():
    image = Image.new("RGB", (4, 2))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(image, "JPEG", exif=exif)
    assert read_image(data).size == (2, 4)
    assert read_image(data, exif=False).size == (4, 2)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"no image", lambda b: b""])
def test_damaged_files_are_named(tmp_path, damage):
    path = tmp_path / "broken.jpg"
    path.write_bytes(damage(encoded(Image.effect_noise((32, 32), 90), "JPEG")))
    with pytest.raises(DataError, match="broken.jpg.*cannot read"):
        read_image(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere.png: no such image"):
        read_image(tmp_path / "nowhere.png")
