"""A folder with a few pictures of a subject: captions, masks, and one of a few shapes (buckets) for each picture.

    subject/  01.jpg  01.txt  02.png  02.txt ...        a caption beside each image, or all in captions.json
    masks/    01.png  02.png                            optional: what of each image counts

Pictures of any size are turned as their EXIF says, transparent parts become white, and they are scaled to cover the
bucket whose aspect ratio is the nearest, then cropped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from visionpeft.data.images import EXTENSIONS, read_image
from visionpeft.errors import DataError, require

if TYPE_CHECKING:
    from PIL import Image

Size = tuple[int, int]
"""Height and width."""


@dataclass(frozen=True)
class Picture:
    """One image; decoded when it is asked for."""

    path: Path
    data: bytes
    size: Size
    caption: str | None = None
    mask: Path | None = None
    alpha: bool = False
    """Whether its own transparency is the mask."""

    @property
    def digest(self) -> str:
        """Fingerprint of the file's bytes."""
        return blake2b(self.data, digest_size=16).hexdigest()

    def open(self) -> Image.Image:
        return read_image(self.data, str(self.path))


@dataclass(frozen=True)
class Crop:
    """How a picture is fitted into a bucket: where the window lies between its ends (0 .. 1), and whether mirrored."""

    down: float = 0.5
    right: float = 0.5
    flip: bool = False


def read_subject(folder: str | Path, masks: str | None = None, skip_corrupt: bool = False,
                 allow_missing_captions: bool = False,
                 tell: Callable[[str], None] | None = None) -> list[Picture]:  # fmt: skip
    """All pictures of a folder, by name, each decoded once to see that it can be.

    Args:
        masks: folder of masks with the images' names (white counts), or "alpha" for the images' own transparency.
        skip_corrupt: leave out images that cannot be read, and tell so; otherwise they stop.
        allow_missing_captions: take None where some images have a caption and others none.

    Raises:
        DataError: no folder, no image, an unreadable one, a missing mask, captions for some images only.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of images")
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in EXTENSIONS and p.is_file())
    if not paths:
        raise DataError(f"{folder}: no image there; expected files ending in {', '.join(EXTENSIONS)}")
    captions = _captions(folder, paths)
    without = [p.name for p in paths if p.name not in captions]
    if captions and without and not allow_missing_captions:
        raise DataError(
            f"{folder}: {len(captions)} of {len(paths)} images have a caption, and {without[0]} has none; write it, or "
            "allow missing captions (they get the subject's prompt)"
        )
    found = []
    for path in paths:
        try:
            found.append(_picture(path, captions.get(path.name), masks))
        except DataError as error:
            if not skip_corrupt:
                raise DataError(f"{error}, or skip what cannot be read") from error
            if tell is not None:
                tell(f"left out: {error}")
    if not found:
        raise DataError(f"{folder}: none of its {len(paths)} images can be read")
    return found


def _picture(path: Path, caption: str | None, masks: str | None) -> Picture:
    data = path.read_bytes()
    width, height = read_image(data, str(path)).size
    mask = None
    if masks is not None and masks != "alpha":
        mask = next((m for e in (".png", *EXTENSIONS) if (m := Path(masks).expanduser() / f"{path.stem}{e}").is_file()),
                    None)  # fmt: skip
        if mask is None:
            raise DataError(f"{path}: no mask {path.stem}.png in {masks}")
    return Picture(path, data, (height, width), caption, mask, masks == "alpha")


def _captions(folder: Path, paths: Sequence[Path]) -> dict[str, str]:
    """Captions by file name; sidecars win over captions.json ({"01.jpg": "..."})."""
    found: dict[str, str] = {}
    table = folder / "captions.json"
    if table.exists():
        try:
            read = json.loads(table.read_text(encoding="utf-8-sig"))
            found = {str(k): str(v).strip() for k, v in read.items()}
        except (OSError, ValueError, AttributeError) as error:
            raise DataError(f'{table}: expected {{"01.jpg": "a caption", ...}} ({error})') from error
        names = {p.name for p in paths}
        if foreign := [name for name in found if name not in names]:
            raise DataError(f"{table}: has a caption for {foreign[0]!r}, and there is no such image")
    for path in paths:
        if (beside := path.with_suffix(".txt")).exists():
            try:
                found[path.name] = beside.read_text(encoding="utf-8-sig").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{beside}: a caption is text in UTF-8 ({error})") from error
    return found


# ---- buckets ---------------------------------------------------------------------------------------------------------


def make_buckets(resolution: int, multiple: int, longest: float = 2.0) -> list[Size]:
    """Shapes of about resolution^2 pixels, sides multiples of `multiple`, at most `longest` times as long as wide.

    Raises:
        DataError: the resolution is no multiple.
    """
    if resolution < multiple or resolution % multiple:
        raise DataError(f"resolution {resolution}: this model takes multiples of {multiple}")
    found = {(resolution, resolution)}
    for width in range(multiple, int(resolution * math.sqrt(longest)) + 1, multiple):
        height = resolution * resolution // width // multiple * multiple
        if height and max(height / width, width / height) <= longest:
            found |= {(height, width), (width, height)}
    return sorted(found)


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket with the most similar aspect ratio; the larger one among equals."""
    ratio = math.log(size[0] / size[1])
    return min(buckets, key=lambda b: (round(abs(math.log(b[0] / b[1]) - ratio), 9), -b[0] * b[1]))


def fit(image: Any, size: Size, crop: Crop) -> tuple[Any, Size]:
    """The image scaled to cover `size`, cropped and mirrored, and the window's corner (top, left) in the scaled one."""
    resampling = require("PIL.Image", extra="train").Resampling.LANCZOS
    width, height = image.size
    scale = max(size[0] / height, size[1] / width)
    scaled = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    image = image.resize((scaled[1], scaled[0]), resampling)
    top, left = round((scaled[0] - size[0]) * crop.down), round((scaled[1] - size[1]) * crop.right)
    image = image.crop((left, top, left + size[1], top + size[0]))
    if crop.flip:
        image = image.transpose(require("PIL.Image", extra="train").Transpose.FLIP_LEFT_RIGHT)
    return image, (top, left)


def pixels(picture: Picture, size: Size, crop: Crop) -> tuple[Tensor, Size]:
    """Float (3, H, W) in -1 .. 1, and the corner of the crop."""
    image, corner = fit(picture.open(), size, crop)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1, corner


def mask_of(picture: Picture, size: Size, crop: Crop, factor: int) -> Tensor | None:
    """Float (1, H / factor, W / factor) in 0 .. 1, the share of each latent that counts; None without a mask.

    Raises:
        DataError: nothing counts, or alpha was asked for and the image has none.
    """
    if picture.mask is None and not picture.alpha:
        return None
    grey = read_image(picture.mask).convert("L") if picture.mask is not None else _alpha(picture)
    if picture.mask is not None and (grey.size[1], grey.size[0]) != picture.size:
        raise DataError(f"{picture.mask}: {grey.size[::-1]} pixels, its image has {picture.size}")
    share = torch.from_numpy(np.array(fit(grey, size, crop)[0])).float()[None, None] / 255
    found = torch.nn.functional.avg_pool2d(share, factor)[0]
    if not found.any():
        raise DataError(f"{picture.mask or picture.path}: the mask covers nothing of the crop")
    return found


def _alpha(picture: Picture) -> Any:
    import io

    with require("PIL.Image", extra="train").open(io.BytesIO(picture.data)) as image:
        image = require("PIL.ImageOps", extra="train").exif_transpose(image)
        if "A" not in image.getbands() and "transparency" not in image.info:
            raise DataError(f"{picture.path}: masks=alpha, and the image has no transparency")
        return image.convert("RGBA").getchannel("A")
