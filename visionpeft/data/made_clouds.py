"""Made-up furniture: eight classes of clouds put together from boxes and rods, different each time.

What tells the classes apart is how the parts stand to one another: sizes, proportions, number of parts and the turn
about the upright axis vary, a piece of each cloud is missing, and points are unevenly many and noisy.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Rng = np.random.Generator
Box = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Centre and size; y is up."""


def _legs(rng: Rng, width: float, depth: float, height: float, thick: float) -> list[Box]:
    x, z = width / 2 - thick / 2, depth / 2 - thick / 2
    return [((sx * x, height / 2, sz * z), (thick, height, thick)) for sx in (-1, 1) for sz in (-1, 1)]


def _table(rng: Rng) -> list[Box]:
    w, d, h, t = rng.uniform(0.8, 1.6), rng.uniform(0.5, 1.0), rng.uniform(0.4, 1.0), rng.uniform(0.03, 0.1)
    return [((0, h, 0), (w, t, d)), *_legs(rng, w, d, h, rng.uniform(0.05, 0.12))]


def _chair(rng: Rng) -> list[Box]:
    w, d, h = rng.uniform(0.4, 0.7), rng.uniform(0.4, 0.7), rng.uniform(0.35, 0.6)
    back = rng.uniform(0.3, 0.8)
    boxes = [((0, h, 0), (w, 0.06, d)), ((0, h + back / 2, -d / 2), (w, back, 0.06))]
    return boxes + _legs(rng, w, d, h, rng.uniform(0.04, 0.1))


def _armchair(rng: Rng) -> list[Box]:
    w, d, h = rng.uniform(0.5, 0.8), rng.uniform(0.5, 0.8), rng.uniform(0.3, 0.5)
    arm, back = rng.uniform(0.15, 0.35), rng.uniform(0.4, 0.8)
    arms: list[Box] = [((s * w / 2, h + arm, 0), (0.08, 0.06, d)) for s in (-1, 1)]
    posts: list[Box] = [((s * w / 2, h + arm / 2, d / 2 - 0.05), (0.06, arm, 0.06)) for s in (-1, 1)]
    body: list[Box] = [((0, h, 0), (w, 0.08, d)), ((0, h + back / 2, -d / 2), (w, back, 0.07))]
    return body + arms + posts + _legs(rng, w, d, h, 0.07)


def _stool(rng: Rng) -> list[Box]:
    w, h = rng.uniform(0.3, 0.7), rng.uniform(0.4, 0.9)
    rung = h * rng.uniform(0.2, 0.6)
    rungs: list[Box] = [((0, rung, s * w / 2.4), (w, 0.05, 0.05)) for s in (-1, 1)]
    return [((0, h, 0), (w, 0.07, w)), *rungs, *_legs(rng, w, w, h, rng.uniform(0.05, 0.1))]


def _shelf(rng: Rng) -> list[Box]:
    w, d, h = rng.uniform(0.5, 1.2), rng.uniform(0.25, 0.5), rng.uniform(0.8, 1.8)
    boards: list[Box] = [((0, y, 0), (w, 0.04, d)) for y in np.linspace(0, h, rng.integers(3, 7))]
    return boards + [((s * w / 2, h / 2, 0), (0.04, h, d)) for s in (-1, 1)]


def _cabinet(rng: Rng) -> list[Box]:
    w, d, h = rng.uniform(0.5, 1.2), rng.uniform(0.3, 0.6), rng.uniform(0.6, 1.8)
    walls: list[Box] = [((0, y, 0), (w, 0.04, d)) for y in (0.0, h)]
    walls += [((s * w / 2, h / 2, 0), (0.04, h, d)) for s in (-1, 1)]
    return walls + [((0, h / 2, s * d / 2), (w, h, 0.03)) for s in (-1, 1)]


def _lamp(rng: Rng) -> list[Box]:
    h, base, shade = rng.uniform(0.8, 1.6), rng.uniform(0.2, 0.5), rng.uniform(0.2, 0.6)
    return [((0, 0, 0), (base, 0.05, base)), ((0, h / 2, 0), (0.06, h, 0.06)), ((0, h, 0), (shade, shade / 2, shade))]


def _bed(rng: Rng) -> list[Box]:
    w, d, h = rng.uniform(0.8, 1.6), rng.uniform(1.4, 2.0), rng.uniform(0.2, 0.45)
    head, foot = rng.uniform(0.3, 0.8), rng.uniform(0.0, 0.3)
    boxes: list[Box] = [((0, h, 0), (w, 0.2, d)), ((0, h + head / 2, -d / 2), (w, head, 0.06))]
    return boxes + [((0, h + foot / 2, d / 2), (w, foot + 0.02, 0.06)), *_legs(rng, w, d, h, 0.1)]


MAKERS: dict[str, Callable[[Rng], list[Box]]] = {
    "armchair": _armchair, "bed": _bed, "cabinet": _cabinet, "chair": _chair, "lamp": _lamp, "shelf": _shelf,
    "stool": _stool, "table": _table,
}  # fmt: skip


PARTS: dict[str, tuple[tuple[str, int], ...]] = {
    "armchair": (("seat", 1), ("back", 1), ("arms", 4), ("legs", 4)),
    "bed": (("mattress", 1), ("head", 1), ("foot", 1), ("legs", 4)),
    "cabinet": (("boards", 2), ("sides", 2), ("doors", 2)),
    "chair": (("seat", 1), ("back", 1), ("legs", 4)),
    "lamp": (("base", 1), ("rod", 1), ("shade", 1)),
    "shelf": (("boards", 0), ("sides", 2)),
    "stool": (("seat", 1), ("rungs", 2), ("legs", 4)),
    "table": (("top", 1), ("legs", 4)),
}  # fmt: skip
"""What the boxes of a class are, in the order in which they are made: part and number, 0 for all that is left."""


def _part_of(name: str, boxes: int) -> np.ndarray:
    """For each box which part of its class it is."""
    counts = np.array([count for _, count in PARTS[name]])
    counts[counts == 0] = boxes - counts.sum()
    return np.repeat(np.arange(len(counts)), counts)


def _points(box: Box, count: int, rng: Rng) -> np.ndarray:
    """`count` points on the six sides of a box."""
    centre, size = np.array(box[0], dtype=np.float64), np.array(box[1], dtype=np.float64)
    areas = np.array([size[1] * size[2], size[0] * size[2], size[0] * size[1]])
    axis = rng.choice(3, count, p=areas / areas.sum())
    points = rng.uniform(-0.5, 0.5, (count, 3))
    points[np.arange(count), axis] = rng.choice([-0.5, 0.5], count)
    return centre + points * size


def make(name: str, rng: Rng, count: int = 1024) -> np.ndarray:
    """One cloud [count, 3] of a class, centred and within the unit sphere."""
    return _make(name, rng, count)[0]


def _make(name: str, rng: Rng, count: int) -> tuple[np.ndarray, np.ndarray]:
    """A cloud, and which part of its class each point belongs to [count]."""
    boxes = MAKERS[name](rng)
    weights = np.array([np.prod(np.sort(box[1])[1:]) for box in boxes]) * rng.uniform(0.5, 2.0, len(boxes))
    chosen = rng.choice(len(boxes), 2 * count, p=weights / weights.sum())
    counts = np.bincount(chosen, minlength=len(boxes))
    points = np.concatenate([_points(box, int(n), rng) for box, n in zip(boxes, counts, strict=True)])
    parts = np.repeat(_part_of(name, len(boxes)), counts)
    turn = rng.uniform(0, 2 * np.pi)
    cos, sin = np.cos(turn), np.sin(turn)
    points = points @ np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])
    points += rng.normal(0, rng.uniform(0.005, 0.03), points.shape)
    direction = rng.normal(size=3)
    along = points @ (direction / np.linalg.norm(direction))
    kept = np.argsort(along)[: int(len(points) * rng.uniform(0.65, 1.0))]  # the farthest piece is missing
    kept = kept[rng.permutation(len(kept))[:count]]
    points = points[kept] - points[kept].mean(0)
    return (points / np.linalg.norm(points, axis=1).max()).astype(np.float32), parts[kept]


def made(per_class: tuple[int, int] = (40, 40), seed: int = 0) -> dict[str, np.ndarray]:
    """Train and test clouds, labels and parts of points, the same for the same seed on every machine.

    Parts are numbered through all classes, as `part_names` lists them.
    """
    found: dict[str, np.ndarray] = {}
    first = dict(zip(MAKERS, np.cumsum([0, *(len(PARTS[name]) for name in MAKERS)]), strict=False))
    for part, count in zip(("train", "test"), per_class, strict=True):
        rng = np.random.default_rng((seed, part == "test"))
        clouds = [(name, *_make(name, rng, 1024)) for name in MAKERS for _ in range(count)]
        found[f"{part}_points"] = np.stack([points for _, points, _ in clouds])
        found[f"{part}_part"] = np.stack([first[name] + parts for name, _, parts in clouds])
        found[f"{part}_label"] = np.repeat(np.arange(len(MAKERS)), count)
    return found


def part_names() -> list[str]:
    """Names of all parts, class after class."""
    return [f"{name} {part}" for name in MAKERS for part, _ in PARTS[name]]
