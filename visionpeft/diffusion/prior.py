"""Class images for prior preservation (DreamBooth, arXiv 2208.12242): drawn once by the base itself, then kept."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

from visionpeft.data.subjects import Picture
from visionpeft.diffusion.families import Family
from visionpeft.diffusion.loading import digest, parts
from visionpeft.training import runs


def class_images(family: Family, prompt: str, count: int, folder: Path, *, steps: int, guidance: float, seed: int,
                 side: int, watch: Callable[[int, int], None] | None = None) -> list[Picture]:  # fmt: skip
    """`count` pictures of a class; those that are in the folder already are not drawn again.

    The folder is named after the base's weights, the prompt and how it is drawn; image i has seed + i.

    Args:
        watch: called with (pictures there, all pictures).

    Raises:
        RunError: a picture cannot be written; those before it stay.
    """
    base = " ".join(digest(part) for part in parts(family.pipe).values())
    key = f"{base} {prompt} {steps} {guidance} {seed} {side}"
    home = folder / "class" / blake2b(key.encode(), digest_size=16).hexdigest()
    found = []
    for i in range(count):
        path = home / f"{i:04d}.png"
        if not path.exists():
            (image,) = family.draw([prompt], [seed + i], steps, guidance, side)
            with runs.replacing(path) as temporary:
                image.save(temporary, format="PNG")
        found.append(Picture(path, path.read_bytes(), (side, side), prompt))
        if watch is not None:
            watch(i + 1, count)
    return found
