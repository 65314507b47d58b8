"""Diagnostics of paths whose numbers are known in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from janusflow.errors import SettingsError
from janusflow.flow.diagnostics import (
    Recorder,
    dtype_gap,
    endpoint_error,
    fitted_order,
    guidance_diagnostics,
    guidance_sensitivity,
    path_diagnostics,
    path_length_ratio,
    previews,
    straightness,
)
from janusflow.flow.solvers import solve
from janusflow.flow.timesteps import time_grid

DIRECTIONS = torch.tensor([[3.0, 4.0], [-1.0, 0.0]], dtype=torch.float64)
START = torch.tensor([[1.0, -0.5], [0.3, 2.0]], dtype=torch.float64)


def exact(actual, expected, tolerance=1e-12):
    expected = torch.as_tensor(expected, dtype=torch.float64).expand_as(actual)
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance, equal_nan=True)


def straight(times):
    return START + times[:, None, None] * DIRECTIONS


def accelerated(times):
    """Along a straight line from rest: x = x_0 + t² d, v = 2 t d."""
    t = times[:, None, None]
    return START + t**2 * DIRECTIONS, (2 * t * DIRECTIONS)[:-1]


def turned(times, angle):
    """On a circle about the origin, by `angle` in all."""
    turns = torch.stack(
        [
            torch.tensor([[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]])
            for a in (angle * times).tolist()
        ]
    )
    return START @ turns.double()


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num", [1, 7])
def test_a_straight_path_at_even_speed_has_nothing_to_report(num, shift):
    times = time_grid(num, shift=shift)
    found = path_diagnostics(straight(times), times, DIRECTIONS.expand(num, 2, 2))
    lengths = torch.tensor([5.0, 1.0], dtype=torch.float64)
    exact(found.straightness, 0.0)
    exact(found.path_length_ratio, 1.0)
    exact(found.chord, lengths)
    exact(found.velocity_norm, lengths)
    exact(found.preview_error, 0.0)
    for jumps in (found.velocity_change, found.local_error):
        exact(jumps[:-1], 0.0)
        assert jumps.shape == (num, 2)
        assert jumps[-1].isnan().all()


def test_a_path_that_gathers_speed_is_as_long_as_its_chord_and_yet_not_straight():
    times = time_grid(8)
    states, velocity = accelerated(times)
    found = path_diagnostics(states, times, velocity)
    t, lengths = times[:-1, None], torch.tensor([5.0, 1.0], dtype=torch.float64)
    exact(found.path_length_ratio, 1.0)
    exact(found.straightness, (1 - 1 / 8**2) / 3)  # the midpoint rule on ∫ (1 - 2t)² dt
    exact(found.preview_error, (1 - t) ** 2 * lengths)
    exact(found.velocity_norm, 2 * t * lengths)
    exact(found.velocity_change[:-1], 2 * lengths.expand(7, 2))
    exact(found.local_error[:-1], lengths.expand(7, 2) / 8**2)
    exact(found.t, times[:-1])


def test_changes_of_velocity_are_by_each_steps_own_length():
    times = time_grid(5, shift=2.0)
    states, velocity = accelerated(times)
    found = path_diagnostics(states, times, velocity)
    h, lengths = times.diff()[:-1, None], torch.tensor([5.0, 1.0], dtype=torch.float64)
    exact(found.velocity_change[:-1], 2 * lengths.expand(4, 2))
    exact(found.local_error[:-1], h**2 * lengths)


@pytest.mark.parametrize("shift", [1.0, 2.0])
@pytest.mark.parametrize("angle", [0.5, 3.0])
def test_a_circle_has_the_straightness_and_length_of_its_arc(angle, shift):
    times = time_grid(2000, shift=shift)
    states = turned(times, angle)
    chord = 2 * math.sin(angle / 2)
    exact(straightness(states, times), (angle / chord) ** 2 - 1, tolerance=1e-5)
    exact(path_length_ratio(states), angle / chord, tolerance=1e-5)


def test_of_a_coarse_circle_the_polygon_is_measured():
    times, angle = time_grid(4), 2.0
    ratio = 4 * math.sin(angle / 8) / math.sin(angle / 2)
    states = turned(times, angle)
    exact(path_length_ratio(states), ratio, tolerance=1e-6)
    exact(straightness(states, times), ratio**2 - 1, tolerance=1e-6)


def test_part_of_a_path_is_measured_in_its_own_time():
    times = time_grid(8)
    exact(
        straightness(turned(times, 1.0), 0.6 + 0.4 * times), straightness(turned(times, 1.0), times)
    )


def test_the_batch_is_reported_as_the_ratio_of_means():
    times = time_grid(6)
    states = torch.stack([straight(times)[:, 0], turned(times, 1.0)[:, 1]], dim=1)
    found = path_diagnostics(states, times, states.diff(dim=0) * 6)
    chord = states[-1] - states[0]
    bends = (chord - 6 * states.diff(dim=0)).square().sum(-1).mean(0)
    expected = float(bends.mean() / chord.square().sum(-1).mean())
    assert found.mean_straightness == pytest.approx(expected, rel=1e-12)
    assert found.mean_straightness != pytest.approx(float(found.straightness.mean()), rel=0.01)


def test_any_axes_may_follow_the_batch_and_samples_do_not_mix():
    generator = torch.Generator().manual_seed(0)
    times = time_grid(4, shift=2.0)
    states = torch.randn(5, 3, 2, 4, 4, generator=generator)
    v, c, u = torch.randn(3, 4, 3, 2, 4, 4, generator=generator)
    together = path_diagnostics(states, times, v, c, u)
    alone = path_diagnostics(states[:, 1:2], times, v[:, 1:2], c[:, 1:2], u[:, 1:2])
    for name, value in vars(together).items():
        assert value.dtype == torch.float64
        mine = value if name == "t" else value[..., 1:2]
        exact(mine, getattr(alone, name))


def test_previews_are_where_each_velocity_points():
    times = time_grid(4)
    states, velocity = accelerated(times)
    t = times[:-1, None, None]
    exact(previews(states, times, velocity), START + (2 * t - t**2) * DIRECTIONS)


def test_guidance_is_told_by_lengths_gap_and_angle():
    v_cond = torch.tensor([[[3.0, 4.0], [2.0, 0.0]]])
    v_uncond = torch.tensor([[[4.0, -3.0], [-1.0, 0.0]]])
    found = guidance_diagnostics(v_cond, v_uncond)
    exact(found.conditional_norm, [[5.0, 2.0]])
    exact(found.unconditional_norm, [[5.0, 1.0]])
    exact(found.guidance_gap, [[math.sqrt(2), 1.5]])
    exact(found.guidance_cosine, [[0.0, -1.0]])


def test_without_an_unconditional_pass_its_numbers_are_unknown():
    found = guidance_diagnostics(DIRECTIONS[None], None)
    exact(found.conditional_norm, [[5.0, 1.0]])
    for unknown in (found.unconditional_norm, found.guidance_gap, found.guidance_cosine):
        assert unknown.shape == (1, 2)
        assert unknown.isnan().all()


def gaussian(mean, std):
    """The velocity between noise and a normal distribution: its flow ends at mean + std x_0."""

    def field(x, t):
        variance = (1 - t) ** 2 + (t * std) ** 2
        return mean + (t * std**2 - (1 - t)) / variance * (x - t * mean)

    return field


def recorded(recorder, scale=2.0, until=1.0):
    conditional, unconditional = gaussian(1.5, 0.5), gaussian(-0.5, 1.2)

    def field(x, t):
        v_cond = conditional(x, t)
        if t >= until:
            return recorder(t, v_cond)
        v_uncond = unconditional(x, t)
        return recorder(t, v_uncond + scale * (v_cond - v_uncond), v_cond, v_uncond)

    return field


def parts_along(states, times):
    """What `recorded` guides by, at each step's start."""
    return [
        torch.stack([part(x, t) for x, t in zip(states[:-1], times[:-1], strict=True)])
        for part in (gaussian(1.5, 0.5), gaussian(-0.5, 1.2))
    ]


@pytest.mark.parametrize("solver", ["euler", "ab2", "midpoint", "heun", "rk4", "dpm++2m", "unipc"])
def test_a_recorded_run_tells_what_its_velocities_were(solver):
    recorder, grid = Recorder(), time_grid(6, shift=1.5)
    run = solve(recorded(recorder), START, grid, solver=solver, return_trajectory=True)
    states, times = run.trajectory, run.times
    found = recorder.diagnostics(states, times)
    c, u = parts_along(states, times)
    expected = path_diagnostics(states, times, 2 * c - u, c, u)
    for name, value in vars(found).items():
        exact(value, getattr(expected, name))
    torch.testing.assert_close(found.conditional_norm, c.norm(dim=-1))
    torch.testing.assert_close(found.unconditional_norm, u.norm(dim=-1))


def test_under_euler_the_straightness_is_that_of_the_velocities():
    recorder, times = Recorder(), time_grid(6, shift=1.5)
    states = solve(recorded(recorder), START, times, return_trajectory=True).trajectory
    found = recorder.diagnostics(states, times)
    c, u = parts_along(states, times)
    bends = (states[-1] - states[0] - (2 * c - u)).square().sum(-1)
    chord = (states[-1] - states[0]).square().sum(-1)
    exact(found.straightness, (times.diff()[:, None] * bends).sum(0) / chord)


def test_recording_changes_nothing_and_keeps_what_is_changed_later():
    recorder, velocity = Recorder(), DIRECTIONS.clone()
    assert recorder(torch.tensor(0.0), velocity, velocity, velocity) is velocity
    velocity.zero_()
    [row, _] = recorder.rows()
    assert (row["conditional_norm"], row["unconditional_norm"]) == (5.0, 5.0)
    found = recorder.diagnostics(straight(time_grid(1)), time_grid(1))
    exact(found.velocity_norm, [[5.0, 1.0]])


def test_evaluations_within_steps_are_listed_but_a_step_is_told_by_its_start():
    recorder, times = Recorder(), time_grid(2)
    states = straight(times)
    for t, size in [(0.0, 1.0), (0.5, 9.0), (0.5 + 1e-9, 2.0), (1.0, 9.0)]:  # as Heun's
        recorder(t, size * DIRECTIONS)
    exact(recorder.diagnostics(states, times).velocity_norm, [[5.0, 1.0], [10.0, 2.0]])
    rows = recorder.rows()
    assert [(row["sample"], row["evaluation"]) for row in rows] == [
        (sample, evaluation) for sample in range(2) for evaluation in range(4)
    ]
    assert [row["conditional_norm"] for row in rows[:4]] == [5.0, 45.0, 10.0, 45.0]
    assert [row["t"] for row in rows[:4]] == [0.0, 0.5, 0.5 + 1e-9, 1.0]
    assert Recorder().rows() == []


def test_where_guidance_was_off_its_numbers_are_unknown():
    recorder, times = Recorder(), time_grid(4)
    states = solve(recorded(recorder, until=0.5), START, times, return_trajectory=True).trajectory
    found = recorder.diagnostics(states, times)
    for told in (found.unconditional_norm, found.guidance_gap, found.guidance_cosine):
        assert told.isnan().tolist() == [[False] * 2, [False] * 2, [True] * 2, [True] * 2]
    exact(found.conditional_norm[2:], found.velocity_norm[2:])
    assert not found.preview_error.isnan().any()


def test_a_step_that_was_not_evaluated_at_its_start_is_refused():
    recorder = Recorder()
    recorder(0.0, DIRECTIONS)
    recorder(0.4, DIRECTIONS)
    with pytest.raises(SettingsError, match=r"none of 2 recorded evaluations is at t = 0\.5"):
        recorder.diagnostics(straight(time_grid(2)), time_grid(2))


def test_rows_are_tidy():
    times = time_grid(3)
    states, velocity = accelerated(times)
    found = path_diagnostics(states, times, velocity, velocity, velocity / 2)
    rows = found.rows()
    assert [(row["sample"], row["step"]) for row in rows] == [
        (sample, step) for sample in range(2) for step in range(3)
    ]
    assert list(rows[0]) == [
        "sample",
        "step",
        "t",
        "conditional_norm",
        "unconditional_norm",
        "guidance_gap",
        "guidance_cosine",
        "velocity_norm",
        "preview_error",
        "velocity_change",
        "local_error",
    ]
    last = rows[-1]
    assert last["t"] == float(times[2])
    assert last["velocity_norm"] == last["conditional_norm"] == float(found.velocity_norm[2, 1])
    assert last["guidance_gap"] == 0.5
    assert math.isnan(last["local_error"])
    summary = found.summary()
    assert [row["sample"] for row in summary] == [0, 1]
    assert summary[0] == {
        "sample": 0,
        "chord": 5.0,
        "straightness": float(found.straightness[0]),
        "path_length_ratio": float(found.path_length_ratio[0]),
    }


def test_the_endpoint_error_is_relative_and_by_sample():
    reference = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    x = torch.tensor([[3.0, 4.5], [0.0, 2.0]])
    exact(endpoint_error(x, reference), [0.1, 0.0])
    with pytest.raises(SettingsError, match=r"shapes \(1, 2\) and \(2, 2\) differ"):
        endpoint_error(x[:1], reference)


def test_a_power_law_has_its_own_order():
    counts = [1, 2, 6, 30]
    assert fitted_order(counts, [7 * n**-2.5 for n in counts]) == pytest.approx(2.5, abs=1e-12)


def test_eulers_error_on_a_gaussian_falls_with_order_one():
    counts = [32, 64, 128, 256]
    ends = [solve(gaussian(1.5, 0.5), START, time_grid(num)).latents for num in counts]
    errors = [float(endpoint_error(end, 1.5 + 0.5 * START).mean()) for end in ends]
    assert fitted_order(counts, errors) == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize(
    ("counts", "errors"),
    [([4], [0.1]), ([4, 4], [0.1, 0.2]), ([4, 8], [0.1]), ([4, 8], [0.1, 0.0]), ([], [])],
)
def test_an_order_needs_two_counts_and_errors(counts, errors):
    with pytest.raises(SettingsError, match="two or more counts"):
        fitted_order(counts, errors)


@pytest.mark.parametrize("delta", [0.5, -0.5])
def test_guidance_sensitivity_is_the_change_a_unit_of_scale(delta):
    w_a, w_b = (START + scale * DIRECTIONS for scale in (2.0, 2.0 + delta))
    exact(guidance_sensitivity(w_a, w_b, delta), [5.0, 1.0])


def test_guidance_sensitivity_refuses_equal_scales_and_other_batches():
    with pytest.raises(SettingsError, match="delta is 0"):
        guidance_sensitivity(START, START, 0.0)
    with pytest.raises(SettingsError, match="differ"):
        guidance_sensitivity(START, START[:1], 0.5)


def test_the_gap_of_a_lower_precision_grows_from_nothing():
    times, field = time_grid(16), gaussian(1.5, 0.5)

    def rounded(x, t):
        return field(x.bfloat16(), t).bfloat16()

    reference = solve(field, START.float(), times, return_trajectory=True).trajectory
    run = solve(rounded, START.float(), times, return_trajectory=True).trajectory
    gap = dtype_gap(run, reference)
    assert gap.shape == (17, 2)
    exact(gap[-1], endpoint_error(run[-1], reference[-1]))
    assert gap[0].tolist() == [0.0, 0.0]
    assert 1e-4 < gap[-1].max() < 2e-2  # bfloat16 rounds at 4e-3


def test_runs_from_different_noise_have_no_gap_of_precision():
    times = time_grid(2)
    with pytest.raises(SettingsError, match="different noise"):
        dtype_gap(straight(times) + 0.1, straight(times))
    with pytest.raises(SettingsError, match=r"shapes \(3, 1, 2\) and \(3, 2, 2\) differ"):
        dtype_gap(straight(times)[:, :1], straight(times))


def test_tensors_that_do_not_fit_are_refused():
    times = time_grid(4)
    states, velocity = accelerated(times)
    with pytest.raises(
        SettingsError, match=r"v_uncond has shape \(3, 2, 2\); expected \(4, 2, 2\)"
    ):
        path_diagnostics(states, times, velocity, velocity, velocity[:3])
    with pytest.raises(SettingsError, match=r"velocity has shape \(5, 2, 2\)"):
        path_diagnostics(states, times, states)
    with pytest.raises(SettingsError, match="5 states and 4 times"):
        straightness(states, times[:-1])
    with pytest.raises(SettingsError, match="increase"):
        straightness(states, times.flip(0))
