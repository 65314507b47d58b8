"""Scenes of the shapes world and their pictures.

A scene is a background and up to four objects; positions and radii are fractions of the side, so
that a scene can be drawn at any size. Objects never touch. This module knows nothing of words
beyond the names of shapes, colours, backgrounds, zones and relations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

Color = tuple[int, int, int]
Point = tuple[float, float]

# Far apart in RGB, so that they survive a small autoencoder and can be told apart from pixels.
COLORS: dict[str, Color] = {
    "red": (220, 40, 40),
    "green": (40, 165, 60),
    "blue": (50, 80, 225),
    "yellow": (240, 210, 40),
    "purple": (160, 50, 190),
    "cyan": (60, 205, 220),
}
BACKGROUNDS: dict[str, Color] = {
    "white": (245, 245, 245),
    "gray": (128, 128, 128),
    "black": (20, 20, 20),
}
ZONES: dict[str, Point] = {
    "in the middle": (0.5, 0.5),
    "at the top": (0.5, 0.25),
    "at the bottom": (0.5, 0.75),
    "on the left": (0.25, 0.5),
    "on the right": (0.75, 0.5),
}
# Unit vector from the second object to the first, y pointing down.
RELATIONS: dict[str, Point] = {
    "above": (0.0, -1.0),
    "below": (0.0, 1.0),
    "left of": (-1.0, 0.0),
    "right of": (1.0, 0.0),
}
MAX_OBJECTS = 4


def _circle(radius: float, center: Point) -> tuple[float, float, float, float]:
    x, y = center
    return (x - radius, y - radius, x + radius, y + radius)


def _draw_circle(pen: ImageDraw.ImageDraw, x: float, y: float, r: float, ink: Color) -> None:
    pen.ellipse(_circle(r, (x, y)), fill=ink)


def _draw_ring(pen: ImageDraw.ImageDraw, x: float, y: float, r: float, ink: Color) -> None:
    pen.ellipse(_circle(r, (x, y)), outline=ink, width=max(1, round(0.42 * r)))


def _polygon(corners: list[Point]) -> Callable[..., None]:
    def pen_polygon(pen: ImageDraw.ImageDraw, x: float, y: float, r: float, ink: Color) -> None:
        pen.polygon([(x + r * dx, y + r * dy) for dx, dy in corners], fill=ink)

    return pen_polygon


_SQRT3 = math.sqrt(3)
_ARM = 0.34  # half the width of a cross's arm

# Each painter takes (pen, x, y, radius, color) in pixels of its canvas.
SHAPES: dict[str, Callable[..., None]] = {
    "circle": _draw_circle,
    "square": _polygon([(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]),
    "triangle": _polygon([(0, -1), (_SQRT3 / 1.8, 0.8), (-_SQRT3 / 1.8, 0.8)]),
    "diamond": _polygon([(0, -1.1), (0.8, 0), (0, 1.1), (-0.8, 0)]),
    "cross": _polygon(
        [
            *((-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)),
            *((_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)),
        ]
    ),
    "ring": _draw_ring,
}


@dataclass(frozen=True)
class ShapeObject:
    """One shape: its names, its centre and radius in fractions of the side (y points down)."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """A background and one to four objects that do not touch.

    `layout` says how it was composed: "single" (one object in a zone), "pair" (two objects that
    differ in shape and colour, one `relation` the other), "group" (two to four equal objects).
    """

    layout: str
    background: str
    objects: tuple[ShapeObject, ...]
    relation: str | None = None
    zone: str | None = None


def draw(scene: Scene, size: int = 64, supersample: int = 4) -> Image.Image:
    """Draws a scene, antialiased.

    Args:
        scene: What to draw.
        size: Side of the square picture in pixels.
        supersample: Factor of the canvas that is averaged down.

    Returns:
        An RGB picture of size × size.
    """
    side = size * supersample
    canvas = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    pen = ImageDraw.Draw(canvas)
    for item in scene.objects:
        paint = SHAPES[item.shape]
        paint(pen, item.x * side, item.y * side, item.radius * side, COLORS[item.color])
    return canvas.reduce(supersample)


def sample_scene(
    rng: np.random.Generator, shares: tuple[float, float, float] = (0.3, 0.4, 0.3)
) -> Scene:
    """Draws a random scene; `shares` are those of single objects, pairs and groups."""
    layout = rng.choice(["single", "pair", "group"], p=shares)
    background = str(rng.choice(list(BACKGROUNDS)))
    if layout == "single":
        return _single(rng, background)
    if layout == "pair":
        return _pair(rng, background)
    return _group(rng, background)


def _jitter(rng: np.random.Generator, center: Point, x: float, y: float) -> Point:
    return center[0] + rng.uniform(-x, x), center[1] + rng.uniform(-y, y)


def _single(rng: np.random.Generator, background: str) -> Scene:
    zone = str(rng.choice(list(ZONES)))
    x, y = _jitter(rng, ZONES[zone], 0.03, 0.03)
    item = ShapeObject(
        str(rng.choice(list(SHAPES))), str(rng.choice(list(COLORS))), x, y, rng.uniform(0.15, 0.2)
    )
    return Scene("single", background, (item,), zone=zone)


def _facing(rng: np.random.Generator, relation: str) -> tuple[Point, Point]:
    """Centres of two objects, the first one `relation` the second, a little out of line."""
    dx, dy = RELATIONS[relation]
    along, across = 0.03, 0.1
    spread = (along, across) if dx else (across, along)
    first = _jitter(rng, (0.5 + 0.25 * dx, 0.5 + 0.25 * dy), *spread)
    second = _jitter(rng, (0.5 - 0.25 * dx, 0.5 - 0.25 * dy), *spread)
    return first, second


def _pair(rng: np.random.Generator, background: str) -> Scene:
    relation = str(rng.choice(list(RELATIONS)))
    shapes = rng.choice(list(SHAPES), size=2, replace=False)
    colors = rng.choice(list(COLORS), size=2, replace=False)
    centers = _facing(rng, relation)
    objects = tuple(
        ShapeObject(str(shape), str(color), x, y, rng.uniform(0.14, 0.18))
        for shape, color, (x, y) in zip(shapes, colors, centers, strict=True)
    )
    return Scene("pair", background, objects, relation=relation)


def _group(rng: np.random.Generator, background: str) -> Scene:
    count = int(rng.integers(2, MAX_OBJECTS + 1))
    shape, color = str(rng.choice(list(SHAPES))), str(rng.choice(list(COLORS)))
    if count == 2:
        centers = list(_facing(rng, str(rng.choice(list(RELATIONS)))))
    else:
        quarters = [(x, y) for y in (0.27, 0.73) for x in (0.27, 0.73)]
        chosen = rng.permutation(len(quarters))[:count]
        centers = [_jitter(rng, quarters[i], 0.03, 0.03) for i in chosen]
    objects = tuple(ShapeObject(shape, color, x, y, rng.uniform(0.14, 0.18)) for x, y in centers)
    return Scene("group", background, objects)
