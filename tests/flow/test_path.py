"""The convention: t = 0 is noise, t = 1 is the image, the velocity points from one to the other."""

from __future__ import annotations

import pytest
import torch

from janusflow.flow.path import interpolate, predicted_image, velocity_target


@pytest.fixture
def ends() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(3, 4, 8, 8, generator=generator) for _ in range(2))


def test_the_path_begins_at_noise_and_ends_at_the_image(ends):
    x_0, x_1 = ends
    assert torch.equal(interpolate(x_0, x_1, torch.tensor(0.0)), x_0)
    assert torch.equal(interpolate(x_0, x_1, torch.tensor(1.0)), x_1)


def test_each_row_has_its_own_time(ends):
    x_0, x_1 = ends
    t = torch.tensor([0.0, 0.25, 1.0])
    x_t = interpolate(x_0, x_1, t)
    torch.testing.assert_close(x_t[1], 0.75 * x_0[1] + 0.25 * x_1[1])
    torch.testing.assert_close(x_t[2], x_1[2])


def test_the_velocity_is_the_derivative_of_the_path(ends):
    x_0, x_1 = (x.double() for x in ends)
    a, b = (interpolate(x_0, x_1, torch.tensor(t, dtype=torch.float64)) for t in (0.3, 0.5))
    torch.testing.assert_close((b - a) / 0.2, velocity_target(x_0, x_1))


def test_the_true_velocity_predicts_the_image_from_anywhere(ends):
    x_0, x_1 = ends
    t = torch.tensor([0.1, 0.5, 0.9])
    x_t = interpolate(x_0, x_1, t)
    torch.testing.assert_close(predicted_image(x_t, velocity_target(x_0, x_1), t), x_1)
