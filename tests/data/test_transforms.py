"""Crops to learn drawing from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from data.made import noise
from PIL import Image

from janusflow.data.transforms import short_side_crop
from janusflow.processing.images import load_image


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def ramp(width: int, height: int) -> Image.Image:
    """Red grows to the right and green downwards, from 0 to 255."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([red, green, 0 * red], -1).round().astype(np.uint8))


@pytest.mark.parametrize("size", [(300, 90), (90, 300), (64, 64), (1, 1), (3, 2), (7, 2000)])
def test_a_crop_is_a_square_of_pixel_values_whatever_the_picture(size: tuple[int, int]) -> None:
    crop = short_side_crop(load_image(noise(1, size)), 64, rng())
    assert crop.shape == (3, 64, 64)
    assert crop.dtype == torch.float32
    assert crop.is_contiguous()
    assert -1 <= crop.min() < crop.max() <= 1 or size == (1, 1)


def test_black_is_minus_one_and_white_one() -> None:
    for value, pixel in ((0, -1.0), (255, 1.0)):
        image = Image.new("RGB", (40, 30), (value,) * 3)
        assert (short_side_crop(image, 16, rng()) == pixel).all()


@pytest.mark.parametrize("form", [(256, 128), (128, 256)])
def test_a_crop_is_what_resizing_first_and_cropping_then_gives(form: tuple[int, int]) -> None:
    image = load_image(noise(2, form, "PNG"))
    wide = form[0] > form[1]
    crop = short_side_crop(image, 32, rng(5))
    start = int(rng(5).integers(33))
    resized = image.resize((form[0] // 4, form[1] // 4), Image.Resampling.BICUBIC)
    box = (start, 0, start + 32, 32) if wide else (0, start, 32, start + 32)
    expected = torch.from_numpy(np.array(resized.crop(box))).permute(2, 0, 1) / 127.5 - 1
    inner = (slice(None), slice(2, -2), slice(2, -2))  # at its edge a crop sees no neighbours
    assert torch.allclose(crop[inner], expected[inner], atol=1.01 / 127.5)


def test_the_crop_moves_along_the_longer_side_with_the_generator_alone() -> None:
    image = ramp(96, 32)
    crops = [short_side_crop(image, 32, rng(seed)) for seed in range(300)]
    again = [short_side_crop(image, 32, rng(seed)) for seed in range(300)]
    assert all(torch.equal(one, two) for one, two in zip(crops, again, strict=True))
    starts = torch.stack([(crop[0, 16, 0] + 1) * 127.5 for crop in crops])
    assert starts.min() < 5
    assert starts.max() > 165
    assert all((crop[1, 0] < -0.9).all() and (crop[1, -1] > 0.9).all() for crop in crops)


def test_no_crop_is_mirrored() -> None:
    for seed in range(50):
        crop = short_side_crop(ramp(50, 40), 32, rng(seed))
        assert crop[0, 16, 0] < crop[0, 16, -1]


def test_a_long_thin_picture_is_never_resized_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    resize = Image.Image.resize

    def watch(self: Image.Image, size: tuple[int, int], *args: object, **options: object):
        sizes.append(size)
        return resize(self, size, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", watch)
    short_side_crop(Image.new("RGB", (90_000, 2)), 256, rng())
    assert sizes == [(256, 256)]
