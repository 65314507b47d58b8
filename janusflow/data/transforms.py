"""Pictures to learn drawing from: cropped to a square, never mirrored (captions name sides).

S is the square's side. Padding for understanding is `janusflow.processing.images`.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def short_side_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Tensor:
    """Brings the shorter side to `size` (bicubic, antialiased) and takes a random square.

    Only what the square shows is resized, so a long thin picture takes no more memory.

    Args:
        image: RGB of any size.
        size: S in pixels.
        rng: Draws where the square lies; one number is taken from it.

    Returns:
        float32 (3, S, S) in [-1, 1].
    """
    short, long = min(image.size), max(image.size)
    scale = short / size
    start = int(rng.integers(round(long / scale) - size + 1)) * scale
    start = min(start, long - short)
    wide = image.width > image.height
    left, top = (start, 0.0) if wide else (0.0, start)
    square = image.resize(
        (size, size), Image.Resampling.BICUBIC, box=(left, top, left + short, top + short)
    )
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)
    return pixels.float().contiguous() / 127.5 - 1
