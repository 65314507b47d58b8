"""Grids and training densities of t."""

from __future__ import annotations

import pytest
import torch

from janusflow.errors import SettingsError
from janusflow.flow.timesteps import check_times, logit_normal, time_grid, uniform


@pytest.mark.parametrize("steps", [1, 2, 30, 100])
def test_n_steps_are_n_intervals_from_noise_to_image(steps):
    grid = time_grid(steps)
    assert len(grid) == steps + 1
    assert grid[0] == 0
    assert grid[-1] == 1
    torch.testing.assert_close(grid.diff(), torch.full((steps,), 1 / steps, dtype=torch.float64))


def test_a_shift_above_one_spends_more_steps_near_the_noise():
    grid = time_grid(10, shift=3.0)
    assert grid[0] == 0
    assert grid[-1] == 1
    assert (grid.diff() > 0).all()
    assert grid[5] == pytest.approx(0.5 / (3 - 2 * 0.5))
    assert grid[5] < 0.5


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, "30", None])
def test_a_number_of_steps_that_is_none_is_refused(steps):
    with pytest.raises(SettingsError, match="num_inference_steps"):
        time_grid(steps)


@pytest.mark.parametrize("shift", [0.0, -1.0, float("nan"), float("inf")])
def test_a_shift_that_is_none_is_refused(shift):
    with pytest.raises(SettingsError, match="shift"):
        time_grid(4, shift=shift)


def test_logit_normal_times_have_the_quartiles_of_their_density():
    t = logit_normal(200_000, mean=0.3, std=1.2, generator=torch.Generator().manual_seed(0))
    expected = torch.sigmoid(0.3 + 1.2 * torch.tensor([-0.67449, 0.0, 0.67449]))
    found = torch.quantile(t, torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(found, expected, atol=4e-3, rtol=0)


def test_uniform_times_fill_the_interval():
    t = uniform(100_000, generator=torch.Generator().manual_seed(0))
    assert t.min() >= 0
    assert t.max() < 1
    assert t.mean().item() == pytest.approx(0.5, abs=5e-3)


def test_a_generator_fixes_the_draw():
    a, b = (logit_normal(5, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    "times", [[0, 1], (0.25, 0.5, 1.0), torch.tensor([0.0, 0.5]), time_grid(7, shift=3.0)]
)
def test_own_times_are_taken_as_float64(times):
    grid = check_times(times)
    assert grid.dtype == torch.float64
    assert grid.tolist() == [float(t) for t in times]


@pytest.mark.parametrize(
    ("times", "match"),
    [
        ([0.0], r"two or more, T \+ 1 for T steps; got shape \(1,\)"),
        ([[0.0, 1.0]], r"got shape \(1, 2\)"),
        (0.5, r"got shape \(\)"),
        ([0.0, 0.5, 0.5, 1.0], "increase strictly, .* got 0, 0.5, 0.5, 1$"),
        ([1.0, 0.5, 0.0], "increase strictly"),
        ([0.0, float("nan"), 1.0], "increase strictly"),
        ([*range(100), 99], "got 0, 1, 2, 3, …, 98, 99, 99$"),
        ([-0.1, 1.0], "between 0 .noise. and 1 .image., got -0.1, 1"),
        ([0.0, 500.0, 1000.0], "divided by 1000"),
        ("0, 1", "times must be numbers, got '0, 1'"),
        ([0.0, None], "times must be numbers"),
        ([[0.0], [0.5, 1.0]], "times must be numbers"),
    ],
)
def test_times_that_are_none_are_refused(times, match):
    with pytest.raises(SettingsError, match=match):
        check_times(times)


@pytest.mark.parametrize("shift", [0.1, 0.7, 1.5, 3.3, 7.77])
@pytest.mark.parametrize("steps", [1, 3, 30, 999])
def test_every_grid_of_ours_passes_and_ends_at_one(shift, steps):
    grid = check_times(time_grid(steps, shift=shift))
    assert grid[-1] == 1
