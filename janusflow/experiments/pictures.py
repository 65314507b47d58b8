"""True pictures that drawn ones are compared with: a folder's, or drawings of the shapes world.

Axes: N pictures of H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from janusflow.data.shapes.language import Request
from janusflow.data.shapes.scene import draw, sample_scene
from janusflow.errors import SettingsError
from janusflow.processing.images import load_image

_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


def picture_files(folder: str, setting: str) -> list[Path]:
    """The pictures in a folder and those below it, by name.

    Args:
        folder: Where they are.
        setting: What named it, for a message.

    Raises:
        SettingsError: If there are fewer than two.
    """
    found = Path(folder).expanduser().rglob("*")
    files = sorted(file for file in found if file.suffix.lower() in _ENDINGS)
    if len(files) < 2:
        raise SettingsError(f"{setting} is {folder!r}: a folder with at least 2 pictures")
    return files


def as_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size as float32 (N, 3, H, W) in [0, 1]."""
    stacked = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 255


def read_square(file: Path, size: int) -> Image.Image:
    """A picture cropped to the square of this side in its middle."""
    return ImageOps.fit(load_image(file), (size, size), Image.Resampling.LANCZOS)


def draw_request(request: Request, size: int, rng: np.random.Generator) -> Image.Image:
    """A picture of the shapes world that shows what is asked for; all else is left to chance."""
    items = [item for item in request.items for _ in range(item.count)]
    layout = "pair" if len(request.items) == 2 else "single" if len(items) == 1 else "group"
    while True:
        scene = sample_scene(rng)
        if scene.layout == layout and len(scene.objects) == len(items):
            asked = ("relation", "zone", "background")
            if all(getattr(request, n) in (None, getattr(scene, n)) for n in asked):
                break
    objects = tuple(
        replace(found, shape=item.shape, color=item.color or found.color)
        for found, item in zip(scene.objects, items, strict=True)
    )
    return draw(replace(scene, objects=objects), size)
