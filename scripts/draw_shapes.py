"""Draw the bundled segmentation set: textured shapes on textured ground, with exact masks.

    python scripts/draw_shapes.py            # writes assets/textured_shapes.npz

The class of a shape is its texture. Every region, the ground too, has two colours drawn alike, so that the colour of a
pixel says nothing about its class. `shift` has the same classes at lower contrast and with coarser textures.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

ASSETS = Path(__file__).resolve().parent.parent / "assets"
SIDE = 64
PARTS = {"train": (240, [0, 0]), "test": (80, [1, 1]), "shift": (40, [1, 2])}
"""Number of images and seed. Test and shift were drawn anew after an earlier pair of them had been looked at."""
Field = np.ndarray  # float [SIDE, SIDE]


def stripes(u: Field, v: Field) -> np.ndarray:
    return u % 1 < 0.5


def checks(u: Field, v: Field) -> np.ndarray:
    return (u % 1 < 0.5) ^ (v % 1 < 0.5)


def dots(u: Field, v: Field) -> np.ndarray:
    return np.hypot(u % 1 - 0.5, v % 1 - 0.5) < 0.35


def bricks(u: Field, v: Field) -> np.ndarray:
    row = np.floor(v)
    return ((u / 2 + 0.5 * (row % 2)) % 1 < 0.15) | (v % 1 < 0.3)


def blotches(u: Field, v: Field) -> np.ndarray:
    """Cells of light and dark without order: the ground."""
    seed = np.floor(u) * 127.1 + np.floor(v) * 311.7
    return np.sin(seed) * 43758.5453 % 1 < 0.5


TEXTURES: dict[str, Callable[[Field, Field], np.ndarray]] = {
    "ground": blotches, "stripes": stripes, "checks": checks, "dots": dots, "bricks": bricks}


def grid() -> tuple[Field, Field]:
    """Coordinates of the centres of the pixels."""
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    return x, y


def colours(rng: np.random.Generator, contrast: float) -> np.ndarray:
    """Two colours uint8 [2, 3], far enough apart to be told from one another."""
    while True:
        pair = rng.uniform(0, 255, (2, 3))
        if np.abs(pair[0] - pair[1]).mean() > 70:
            return (127.5 + contrast * (pair - 127.5)).astype(np.uint8)


def textured(rng: np.random.Generator, name: str, coarse: float, contrast: float) -> np.ndarray:
    """A whole picture uint8 [SIDE, SIDE, 3] of one texture, turned, shifted and scaled at random."""
    x, y = grid()
    angle, period = rng.uniform(0, 2 * np.pi), coarse * rng.uniform(5.5, 8)
    u = (np.cos(angle) * x + np.sin(angle) * y) / period + rng.uniform(0, 50)
    v = (np.cos(angle) * y - np.sin(angle) * x) / period + rng.uniform(0, 50)
    return colours(rng, contrast)[TEXTURES[name](u, v).astype(int)]


def silhouette(rng: np.random.Generator) -> np.ndarray:
    """bool [SIDE, SIDE]: a turned ellipse, rectangle or triangle."""
    x, y = grid()
    angle, (cx, cy) = rng.uniform(0, 2 * np.pi), rng.uniform(10, SIDE - 10, 2)
    u = np.cos(angle) * (x - cx) + np.sin(angle) * (y - cy)
    v = np.cos(angle) * (y - cy) - np.sin(angle) * (x - cx)
    a, b = rng.uniform(13, 21, 2)
    kind = rng.integers(3)
    if kind == 0:
        return (u / a) ** 2 + (v / b) ** 2 < 1
    if kind == 1:
        return (np.abs(u) < 0.85 * a) & (np.abs(v) < 0.85 * b)
    return (v > -0.6 * b) & (np.abs(u) < 0.6 * (b - v) * a / b)


def draw(rng: np.random.Generator, coarse: float, contrast: float) -> tuple[np.ndarray, np.ndarray]:
    """An image and its mask: two to four shapes, those drawn later in front."""
    names = list(TEXTURES)
    image, mask = textured(rng, names[0], coarse, contrast), np.zeros((SIDE, SIDE), np.uint8)
    for _ in range(rng.integers(2, 5)):
        label, where = int(rng.integers(1, len(names))), silhouette(rng)
        image = np.where(where[..., None], textured(rng, names[label], coarse, contrast), image)
        mask[where] = label
    return image.astype(np.uint8), mask


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ASSETS / "textured_shapes.npz")
    args = parser.parse_args(arguments)
    arrays: dict[str, np.ndarray] = {"classes": np.array(list(TEXTURES))}
    for part, (count, seed) in PARTS.items():
        rng = np.random.default_rng(seed)
        coarse, contrast = (1.3, 0.5) if part == "shift" else (1.0, 1.0)
        drawn = [draw(rng, coarse, contrast) for _ in range(count)]
        arrays[f"{part}_x"], arrays[f"{part}_mask"] = (np.stack(what) for what in zip(*drawn, strict=True))
    np.savez_compressed(args.out, **arrays)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
