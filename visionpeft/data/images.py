"""Decoding: any picture that Pillow can open becomes 8-bit RGB, or a DataError that names it."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, Any

from visionpeft.errors import DataError, require

if TYPE_CHECKING:
    from PIL import Image as PILImage

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".tif", ".tiff", ".webp")


def read_image(source: str | os.PathLike[str] | bytes, where: str | None = None, exif: bool = True) -> PILImage.Image:
    """Decode a file, or the bytes of one, to a PIL RGB image.

    `exif` turns the picture the way the camera was held; benchmarks whose published loaders do not, pass False.
    `where` is named in errors (default: the path).

    Raises:
        DataError: the file is missing, truncated, or not an image.
    """
    image_module = require("PIL.Image", extra="train")
    where = where or ("image" if isinstance(source, bytes) else os.fspath(source))
    try:
        with image_module.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.load()
            return to_rgb(_upright(image) if exif else image)
    except FileNotFoundError as error:
        raise DataError(f"{where}: no such image file") from error
    except Exception as error:  # Pillow's decoders raise almost any type on damaged files
        raise DataError(f"{where}: cannot read this image ({error}); replace or remove the file") from error


def to_rgb(image: Any) -> PILImage.Image:
    """Grey, 16-bit, palette, CMYK or transparent images as RGB; transparent parts become white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _deep_to_rgb(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return _on_white(image.convert("RGBA"))
    return image.convert("RGB")


def _upright(image: Any) -> Any:
    return require("PIL.ImageOps", extra="train").exif_transpose(image)


def _on_white(image: Any) -> PILImage.Image:
    white = require("PIL.Image", extra="train").new("RGBA", image.size, (255, 255, 255, 255))
    white.alpha_composite(image)
    return white.convert("RGB")


def _deep_to_rgb(image: Any) -> PILImage.Image:
    """16-bit grey to RGB by value / 257. Pillow's own conversion clips at 255, which turns a photograph white."""
    import numpy as np

    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"mode {image.mode} holds values outside 0..65535; store it as 8 or 16 bits")
    grey = np.round(values.astype(np.float64) / 257).astype(np.uint8)
    return require("PIL.Image", extra="train").fromarray(grey).convert("RGB")
