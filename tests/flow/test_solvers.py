"""Solvers against fields with exact solutions and against torchdiffeq."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torchdiffeq import odeint

from janusflow.errors import SettingsError
from janusflow.flow.solvers import SOLVERS, SolveStopped, solve
from janusflow.flow.timesteps import time_grid

sys.path.insert(0, str(Path(__file__).parents[1]))
from problems import PROBLEMS

START = torch.tensor([[1.0, -0.5], [0.3, 2.0]], dtype=torch.float64)
ORDER = {"euler": 1}


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_has_a_known_order(solver):
    assert solver in ORDER


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["exponential", "rotation", "of time"])
def test_the_error_falls_with_the_solvers_order(solver, name):
    problem = PROBLEMS[name]
    steps = [16, 32, 64, 128]
    errors = []
    for num in steps:
        found = solve(problem.field, START, time_grid(num), solver=solver).latents
        errors.append((found - problem.solution(START)).norm().item())
    slope = math.log(errors[0] / errors[-1]) / math.log(steps[-1] / steps[0])
    assert slope == pytest.approx(ORDER[solver], abs=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("num", [1, 7, 500])
def test_a_constant_velocity_is_integrated_exactly(solver, num, dtype):
    problem = PROBLEMS["constant"]
    x_0 = START.to(dtype)
    found = solve(problem.field, x_0, time_grid(num), solver=solver).latents
    assert found.dtype == dtype
    rounding = 2 * num * torch.finfo(dtype).eps  # half a unit in the last place a step, |x| < 4
    torch.testing.assert_close(found, problem.solution(x_0), atol=max(rounding, 1e-6), rtol=0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_equals_torchdiffeqs_on_the_same_grid(shift):
    problem, grid = PROBLEMS["rotation"], time_grid(10, shift=shift)
    ours = solve(problem.field, START, grid).latents
    theirs = odeint(lambda t, x: problem.field(x, t), START, grid, method="euler")[-1]
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_evaluations_are_counted_and_the_start_is_left_alone():
    calls = []
    start = START.clone()

    def field(x, t):
        calls.append(float(t))
        return x

    solution = solve(field, start, time_grid(5))
    assert solution.nfe == len(calls) == 5
    assert calls == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert torch.equal(start, START)


def test_the_trajectory_holds_every_state_when_asked_for():
    field = PROBLEMS["exponential"].field
    solution = solve(field, START, time_grid(4), return_trajectory=True)
    assert solution.trajectory.shape == (5, *START.shape)
    assert torch.equal(solution.trajectory[0], START)
    assert torch.equal(solution.trajectory[-1], solution.latents)
    assert solve(field, START, time_grid(4)).trajectory is None


def test_a_callback_sees_each_step_and_may_replace_the_state():
    seen = []

    def on_step(index, t, x):
        seen.append((index, float(t)))
        return torch.zeros_like(x) if index == 2 else None

    found = solve(PROBLEMS["exponential"].field, START, time_grid(3), on_step=on_step).latents
    assert seen == [(0, pytest.approx(1 / 3)), (1, pytest.approx(2 / 3)), (2, 1.0)]
    assert torch.equal(found, torch.zeros_like(START))


def test_a_callback_may_stop_the_run():
    def stop(index, t, x):
        raise SolveStopped

    with pytest.raises(SolveStopped):
        solve(PROBLEMS["exponential"].field, START, time_grid(3), on_step=stop)


def test_an_unknown_solver_is_refused_with_the_known_ones():
    with pytest.raises(SettingsError, match=r"unknown solver 'eular'; known: .*euler"):
        solve(PROBLEMS["constant"].field, START, time_grid(2), solver="eular")
