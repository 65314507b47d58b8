"""The exact scorer of the shapes world: what is in a picture, and does it fulfil a request.

No network is asked. Pixels are explained as blends of the background and one palette colour;
connected blends are objects; an object's shape is the one whose drawing overlaps it best.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image
from scipy import ndimage

from janusflow.data.shapes.language import Request
from janusflow.data.shapes.scene import (
    BACKGROUNDS,
    COLORS,
    RELATIONS,
    SHAPES,
    ZONES,
    Scene,
    ShapeObject,
    draw,
)

MIN_AREA = 0.006
"""Smaller spots, as a share of the picture, are no objects but noise of an autoencoder."""
MIN_OVERLAP = 0.7
"""Least intersection over union with the best shape's drawing; below, an object is a blob."""


@dataclass(frozen=True)
class Sighting:
    """One object found: names (shape None for a blob), centre in fractions of the side, overlap."""

    shape: str | None
    color: str
    x: float
    y: float
    overlap: float


def background_of(image: Image.Image) -> str:
    """The background that the picture's border is nearest to."""
    pixels = np.asarray(image.convert("RGB"), np.float64)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    middle = np.median(border, axis=0)
    return min(BACKGROUNDS, key=lambda name: float(np.abs(middle - BACKGROUNDS[name]).sum()))


def find_objects(image: Image.Image) -> list[Sighting]:
    """Finds the objects of a square picture, in no particular order."""
    pixels = np.asarray(image.convert("RGB"), np.float64)
    background = np.array(BACKGROUNDS[background_of(image)], np.float64)
    names = list(COLORS)
    directions = np.array([COLORS[name] for name in names], np.float64) - background
    offset = pixels - background
    # Share of each palette colour that explains a pixel best; of what it leaves unexplained, the
    # square less that of the offset itself, which is the same for all colours.
    along, squared = offset @ directions.T, (directions**2).sum(1)
    share = np.clip(along / squared, 0, 1)
    best = (share * (share * squared - 2 * along)).argmin(-1)
    cover = np.take_along_axis(share, best[..., None], -1)[..., 0]
    labels, count = ndimage.label(cover > 0.5)
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    sightings = []
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        if areas[label] < MIN_AREA * labels.size:
            continue
        inside = labels[box] == label
        color = names[int(np.bincount(best[box][inside], minlength=len(names)).argmax())]
        shape, overlap = _best_shape(inside)
        corner = [side.start for side in box]
        y, x = ((np.argwhere(inside).mean(0) + corner + 0.5) / len(pixels)).tolist()
        sightings.append(Sighting(shape if overlap >= MIN_OVERLAP else None, color, x, y, overlap))
    return sightings


@lru_cache(maxsize=4096)
def _reference(shape: str, height: int, width: int) -> np.ndarray:
    """A shape's mask, cropped to its bounding box and fitted to height × width pixels."""
    color = next(iter(COLORS))
    scene = Scene("single", "black", (ShapeObject(shape, color, 0.5, 0.5, 0.4),))
    pixels = np.asarray(draw(scene, 128), np.int64)
    mask = pixels.max(-1) > (np.max(COLORS[color]) + max(BACKGROUNDS["black"])) / 2
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    mask = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    fitted = Image.fromarray(mask.astype(np.uint8) * 255).resize(
        (width, height), Image.Resampling.BOX
    )
    return np.asarray(fitted) > 127


def _best_shape(mask: np.ndarray) -> tuple[str, float]:
    """The shape with the largest intersection over union, and that overlap.

    The mask is cropped to what it covers.
    """
    height, width = mask.shape
    if max(height, width) > 1.8 * min(height, width):
        return "circle", 0.0  # no shape is so long: two that have run together
    overlaps = {}
    for shape in SHAPES:
        reference = _reference(shape, height, width)
        both = np.count_nonzero(mask & reference)
        overlaps[shape] = both / np.count_nonzero(mask | reference)
    shape = max(overlaps, key=lambda name: overlaps[name])
    return shape, overlaps[shape]


def fulfils(image: Image.Image, request: Request) -> bool:
    """Whether a picture shows all that a request names, and nothing else."""
    if request.background is not None and background_of(image) != request.background:
        return False
    found = find_objects(image)
    if len(found) != sum(item.count for item in request.items):
        return False
    groups = []
    for item in request.items:
        group = [s for s in found if s.shape == item.shape and item.color in (None, s.color)]
        if len(group) != item.count:
            return False
        groups.append(group)
    if request.zone is not None and not _in_zone(groups[0][0], request.zone):
        return False
    return request.relation is None or _related(groups[0][0], groups[1][0], request.relation)


def _in_zone(sighting: Sighting, zone: str) -> bool:
    """Whether the zone's centre is the nearest of all zones' centres."""
    distances = {
        name: (sighting.x - x) ** 2 + (sighting.y - y) ** 2 for name, (x, y) in ZONES.items()
    }
    return min(distances, key=lambda name: distances[name]) == zone


def _related(first: Sighting, second: Sighting, relation: str) -> bool:
    """Whether the first lies in the relation's direction, more so than across it."""
    dx, dy = RELATIONS[relation]
    step = (first.x - second.x, first.y - second.y)
    along, across = step[0] * dx + step[1] * dy, abs(step[0] * dy) + abs(step[1] * dx)
    return bool(along > max(across, 0.1))
