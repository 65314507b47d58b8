"""Solvers against fields with exact solutions, torchdiffeq and diffusers."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepInverseScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)
from torchdiffeq import odeint
from torchdiffeq._impl.odeint import SOLVERS as THEIR_METHODS

from janusflow.errors import SettingsError
from janusflow.flow.solvers import SOLVERS, SolveStopped, make_solver, solve, solver_names
from janusflow.flow.step_solvers import AdamsBashforth2
from janusflow.flow.timesteps import time_grid
from janusflow.flow.torchdiffeq_bridge import METHODS

sys.path.insert(0, str(Path(__file__).parents[1]))
from problems import GAUSSIAN, MIXTURE, PROBLEMS

# diffusers' own, of numpy; and torchdiffeq's, where a tolerance is tighter than its four iterations
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Functional iteration did not converge"),
]

START = torch.tensor([[1.0, -0.5], [0.3, 2.0]], dtype=torch.float64)
FACTS = solver_names()
CLASHING = ("euler", "midpoint", "rk4")
THEIRS = {method: f"torchdiffeq:{method}" if method in CLASHING else method for method in METHODS}
NAMES = [name for name in FACTS if ":" not in name] + [THEIRS[name] for name in CLASHING]
ADAPTIVE = [name for name in NAMES if FACTS[name].adaptive]
FIXED = [name for name in NAMES if not (FACTS[name].adaptive or FACTS[name].draws_noise)]
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SCHEDULERS = {
    "euler": lambda: FlowMatchEulerDiscreteScheduler(),
    "euler, inverted": lambda: FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    "heun": lambda: FlowMatchHeunDiscreteScheduler(),
    "unipc": lambda: UniPCMultistepScheduler(**FLOW),
    "unipc 3": lambda: UniPCMultistepScheduler(solver_order=3, **FLOW),
    "dpm": lambda: DPMSolverMultistepScheduler(**FLOW),
    "dpm, one step": lambda: DPMSolverSinglestepScheduler(**FLOW),
}
NOISY = {
    "euler": lambda: FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    "lcm": lambda: FlowMatchLCMScheduler(),
    "dpm": lambda: DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **FLOW),
}


def generators(seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def run(field, x_0, times, solver, **options):
    """`solve`, sample by sample for adaptive solvers; `generators` of one seed a row."""
    if solver in FACTS and FACTS[solver].draws_noise:
        options.setdefault("generators", generators(range(len(x_0))))
    return solve(field, x_0, times, solver=solver, **options)


def endpoints(field, x_0, times, solver, **options):
    """The states at the end, solved as the pipeline does."""
    if solver in ADAPTIVE:
        rows = [run(field, row, times, solver, **options).latents for row in x_0.split(1)]
        return torch.cat(rows)
    return run(field, x_0, times, solver, **options).latents


def slope(problem, solver, grids, **options):
    """Of the error at the end over the number of steps, on log axes."""
    errors = [
        (endpoints(problem.field, START, grid, solver, **options) - problem.solution(START)).norm()
        for grid in (grids[0], grids[-1])
    ]
    return math.log(errors[0] / errors[1]) / math.log((len(grids[-1]) - 1) / (len(grids[0]) - 1))


# Order


@pytest.mark.parametrize("solver", [name for name in FIXED if name not in ("dpm++2m", "unipc")])
@pytest.mark.parametrize("name", ["exponential", "rotation", "of time"])
def test_the_error_falls_with_the_solvers_order(solver, name):
    if (solver, name) == ("explicit_adams", "of time"):
        pytest.skip("the start, of a higher order there, still has the most of the error")
    found = slope(PROBLEMS[name], solver, [time_grid(num) for num in (64, 512)])
    assert found == pytest.approx(FACTS[solver].order, abs=0.15)


@pytest.mark.parametrize("solver", ["euler", "ab2", "midpoint", "heun", "rk4", "heun3"])
@pytest.mark.parametrize("name", ["exponential", "rotation", "of time"])
def test_the_order_holds_on_a_grid_that_is_not_uniform(solver, name):
    grids = [time_grid(num, shift=2.5) for num in (64, 512)]
    assert slope(PROBLEMS[name], solver, grids) == pytest.approx(FACTS[solver].order, abs=0.15)


@pytest.mark.parametrize("name", ["exponential", "rotation", "of time"])
def test_dpm_has_its_order_where_the_log_ratio_of_the_times_is_finite(name):
    # At the ends of [0, 1] steps of λ do not shrink with h, and the error is h² log(1/h).
    field, errors = PROBLEMS[name].field, []
    exact = solve(field, START, 0.1 + 0.8 * time_grid(2000), solver="rk4").latents
    for num in (64, 512):
        found = solve(field, START, 0.1 + 0.8 * time_grid(num), solver="dpm++2m").latents
        errors.append((found - exact).norm().item())
    assert math.log(errors[0] / errors[1], 8) == pytest.approx(2, abs=0.15)


def test_dpm_has_its_order_from_end_to_end_but_for_a_logarithm():
    grids = [time_grid(num) for num in (64, 512)]
    assert slope(PROBLEMS["of time"], "dpm++2m", grids) == pytest.approx(2, abs=0.15)
    logarithm = math.log(math.log(512) / math.log(64), 8)
    for name in ("exponential", "rotation"):
        assert 2 - 2 * logarithm - 0.15 < slope(PROBLEMS[name], "dpm++2m", grids) < 2.15


@pytest.mark.parametrize("name", ["exponential", "rotation"])
def test_unipc_has_its_order(name):
    # Not beyond 256 steps, where its float32 times begin to show.
    grids = [time_grid(num) for num in (64, 256)]
    assert slope(PROBLEMS[name], "unipc", grids) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("name", ["exponential", "rotation"])
def test_the_implicit_method_has_its_order_when_its_tolerance_is_out_of_the_way(name):
    grids = [time_grid(num) for num in (64, 128)]
    found = slope(PROBLEMS[name], "implicit_adams", grids, rtol=1e-12, atol=1e-12)
    assert found == pytest.approx(5, abs=0.15)


@pytest.mark.parametrize("solver", ADAPTIVE)
@pytest.mark.parametrize("name", ["exponential", "rotation", "of time", "gaussian"])
@pytest.mark.parametrize("tolerance", [1e-3, 1e-5])
def test_adaptive_solvers_meet_their_tolerance(solver, name, tolerance):
    problem = PROBLEMS[name]
    found = endpoints(problem.field, START, time_grid(30), solver, rtol=tolerance, atol=tolerance)
    # The errors of single steps are controlled, and add up. Fehlberg's are judged by a difference
    # of 1/512 of two velocities, and are larger.
    allowed = (300 if solver == "fehlberg2" else 30) * tolerance
    torch.testing.assert_close(found, problem.solution(START), rtol=allowed, atol=allowed)


@pytest.mark.parametrize("solver", [name for name in ADAPTIVE if "adams" not in name])
def test_a_tighter_tolerance_takes_more_evaluations(solver):
    field, start = PROBLEMS["of time"].field, START[:1]
    loose, tight = (
        solve(field, start, time_grid(2), solver=solver, rtol=tolerance, atol=tolerance).nfe
        for tolerance in (1e-2, 1e-7 if solver == "dopri8" else 1e-5)
    )
    assert loose < tight


def test_the_default_tolerance_holds_in_float32():
    field, start = MIXTURE.velocity, START[:1]
    exact = solve(field, start, time_grid(1000), solver="rk4").latents
    for solver in ADAPTIVE:
        times = time_grid(100 if "adams" in solver else 1)
        found = solve(field, start.float(), times, solver=solver).latents.double()
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-3)


# Other people's solvers


def test_every_method_of_torchdiffeq_is_there():
    assert set(METHODS) == set(THEIR_METHODS)
    for method in METHODS:
        assert f"torchdiffeq:{method}" in SOLVERS
        assert method in SOLVERS


@pytest.mark.parametrize(
    ("ours", "theirs"), [("euler", "euler"), ("midpoint", "midpoint"), ("heun", "heun2")]
)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_our_solvers_equal_torchdiffeqs_on_the_same_grid(ours, theirs, shift):
    grid = time_grid(10, shift=shift)
    found = solve(MIXTURE.velocity, START, grid, solver=ours).latents
    expected = odeint(lambda t, x: MIXTURE.velocity(x, t), START, grid, method=theirs)[-1]
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_the_bridge_equals_torchdiffeq(method):
    grid, row = time_grid(12), START[:1]
    options = {}
    if METHODS[method].lands:
        options = {"step_t": grid[-1:]}
    elif "adams" in method:
        options = {"max_order": 5}
    expected = odeint(
        lambda t, x: MIXTURE.velocity(x, t),
        row,
        grid,
        rtol=1e-5,
        atol=1e-5,
        method=method,
        options=options,
    )
    found = solve(MIXTURE.velocity, row, grid, solver=THEIRS[method], return_trajectory=True)
    torch.testing.assert_close(found.trajectory, expected, atol=1e-12, rtol=0)


def test_plain_names_that_clash_are_ours():
    grid = time_grid(4)
    ours, theirs = (
        solve(MIXTURE.velocity, START, grid, solver=solver).latents
        for solver in ("rk4", "torchdiffeq:rk4")
    )
    assert not torch.equal(ours, theirs)  # the classic rule, and the 3/8 rule
    torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0)


def test_euler_equals_diffusers_driven_by_hand():
    num = 10
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num, num))
    x = START.float()
    for t, timestep in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
        x = scheduler.step(MIXTURE.velocity(x, t), timestep, x).prev_sample
    found = solve(MIXTURE.velocity, START.float(), time_grid(num)).latents
    torch.testing.assert_close(found, x, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_unipc_equals_diffusers_driven_by_hand(shift):
    num = 10
    scheduler = UniPCMultistepScheduler(flow_shift=shift, **FLOW)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num, num))
    x = START.float()
    for index, timestep in enumerate(scheduler.timesteps):
        velocity = MIXTURE.velocity(x, 1 - scheduler.sigmas[index])
        x = scheduler.step(-velocity, timestep, x).prev_sample
    found = solve(MIXTURE.velocity, START.float(), time_grid(num, shift=shift), solver="unipc")
    torch.testing.assert_close(found.latents, x, atol=1e-5, rtol=0)
    theirs = UniPCMultistepScheduler(flow_shift=shift, **FLOW)
    found = solve(MIXTURE.velocity, START.float(), time_grid(num), solver=theirs)
    torch.testing.assert_close(found.latents, x, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["euler", "euler, inverted"])
def test_the_euler_scheduler_is_our_euler_on_the_runs_grid(name):
    grid = torch.tensor([0.0, 0.1, 0.35, 0.7, 1.0], dtype=torch.float64)
    found = solve(MIXTURE.velocity, START, grid, solver=SCHEDULERS[name]())
    expected = solve(MIXTURE.velocity, START, grid).latents
    torch.testing.assert_close(found.latents, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.times, grid, atol=1e-7, rtol=0)
    late = grid[2:]  # from an image with noise
    found = solve(MIXTURE.velocity, START, late, solver=SCHEDULERS[name]()).latents
    expected = solve(MIXTURE.velocity, START, late).latents
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_steps_whose_rounded_timesteps_coincide_are_told_apart():
    problem, grid = PROBLEMS["constant"], [0.0, 1e-4, 2e-4, 3e-4, 0.5, 1.0]
    found = solve(problem.field, START, grid, solver="unipc").latents
    torch.testing.assert_close(found, problem.solution(START), atol=2e-6, rtol=0)


def test_what_a_scheduler_does_to_sigmas_it_does_to_the_runs():
    found = solve(
        MIXTURE.velocity, START, time_grid(8), solver=FlowMatchEulerDiscreteScheduler(shift=3.0)
    )
    torch.testing.assert_close(found.times, time_grid(8, shift=3.0), atol=1e-7, rtol=0)
    late = FlowMatchEulerDiscreteScheduler()
    late.set_shift(3.0)  # not in its config
    assert torch.equal(solve(MIXTURE.velocity, START, time_grid(8), solver=late).times, found.times)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_flow_scheduler_comes_to_the_same_end(name):
    exact = solve(GAUSSIAN.velocity, START, time_grid(500), solver="rk4").latents
    found = solve(GAUSSIAN.velocity, START, time_grid(100), solver=SCHEDULERS[name]()).latents
    torch.testing.assert_close(found, exact, atol=0.03, rtol=0)
    assert found.dtype == START.dtype


@pytest.mark.parametrize("name", [*SCHEDULERS, "karras"])
def test_a_scheduler_counts_its_steps_and_tells_its_times(name):
    num = 6
    karras = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    scheduler = karras if name == "karras" else SCHEDULERS[name]()
    seen = []
    solution = solve(
        MIXTURE.velocity,
        START,
        time_grid(num),
        solver=scheduler,
        on_step=lambda index, t, x: seen.append((index, float(t))),
        return_trajectory=True,
    )
    assert solution.nfe == (2 * num - 1 if name == "heun" else num)
    assert len(solution.times) == len(solution.trajectory) == num + 1
    assert seen == list(enumerate(solution.times[1:].tolist()))
    assert torch.equal(solution.trajectory[-1], solution.latents)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_run_leaves_the_scheduler_alone_and_a_second_one_is_the_same(name):
    scheduler = SCHEDULERS[name]()
    before = {key: str(value) for key, value in vars(scheduler).items()}
    first, second = (
        solve(MIXTURE.velocity, START, time_grid(5), solver=scheduler).latents for _ in range(2)
    )
    assert {key: str(value) for key, value in vars(scheduler).items()} == before
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", NOISY)
def test_a_scheduler_that_draws_noise_draws_each_samples_own(name):
    grid = time_grid(6)
    with pytest.raises(SettingsError, match="draws noise: pass generators"):
        solve(MIXTURE.velocity, START, grid, solver=NOISY[name]())

    def draw(rows, seeds):
        return solve(
            MIXTURE.velocity, rows, grid, solver=NOISY[name](), generators=generators(seeds)
        ).latents

    both = draw(START, [5, 6])
    torch.testing.assert_close(both[1:], draw(START[1:], [6]), atol=1e-6, rtol=0)
    assert not torch.allclose(both[1:], draw(START[1:], [7]), atol=1e-2)


@pytest.mark.parametrize(
    ("scheduler", "times", "match"),
    [
        (DDIMScheduler(), None, "DDIMScheduler is no flow scheduler; expected a FlowMatch"),
        (EulerDiscreteScheduler(), None, "EulerDiscreteScheduler is no flow scheduler"),
        (UniPCMultistepScheduler(use_flow_sigmas=True), None, "is no flow scheduler"),
        (UniPCMultistepScheduler, None, "is the class UniPCMultistepScheduler; pass an object"),
        (3, None, "a name or a scheduler of diffusers, got 3"),
        (
            FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            None,
            "use_dynamic_shifting, which",
        ),
        (
            FlowMatchEulerDiscreteScheduler(stochastic_sampling=True, invert_sigmas=True),
            None,
            "leave invert_sigmas out",
        ),
        (
            UniPCMultistepScheduler(final_sigmas_type="sigma_min", **FLOW),
            None,
            'final_sigmas_type="zero"',
        ),
        (UniPCMultistepScheduler(use_exponential_sigmas=True, **FLOW), None, "steps from t = -"),
        (DEISMultistepScheduler(**FLOW), None, "to 0.75 here, .* and an end at 1"),
        (DPMSolverMultistepInverseScheduler(**FLOW), None, "expected the same"),
        (FlowMatchHeunDiscreteScheduler(), [0.5, 1.0], r"steps from t = 0 to 1 .* from 0.5 to 1"),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), [0.5, 1.0], "set shift=1"),
        (FlowMatchEulerDiscreteScheduler(), [0.0, 0.5], "an end at 1"),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "config") else None,
)
def test_a_scheduler_that_does_not_fit_is_refused(scheduler, times, match):
    with pytest.raises(SettingsError, match=match):
        solve(MIXTURE.velocity, START, times or time_grid(4), solver=scheduler)


# What holds for all


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", [name for name in NAMES if name != "sde"])
@pytest.mark.parametrize("num", [1, 7, 500])
def test_a_constant_velocity_is_integrated_exactly(solver, num, dtype):
    problem = PROBLEMS["constant"]
    x_0 = START.to(dtype)
    found = endpoints(problem.field, x_0, time_grid(num), solver)
    assert found.dtype == dtype
    eps = torch.finfo(dtype).eps
    rounding = max(2 * num * eps, 1e-6)  # half a unit in the last place a step, |x| < 4
    if solver in ADAPTIVE:
        rounding += 128 * eps  # terms up to 32 |x| cancel where they interpolate
    if solver == "unipc":
        rounding = max(rounding, 2e-6)  # starts at t = 1e-6, and has float32 times
    torch.testing.assert_close(found, problem.solution(x_0), atol=rounding, rtol=0)


@pytest.mark.parametrize("solver", NAMES)
def test_a_sample_does_not_depend_on_the_order_of_the_batch(solver):
    x_0 = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    order = [3, 0, 4, 2, 1]
    options = [{}, {}]
    if solver == "sde":
        options = [{"generators": generators(seeds)} for seeds in (range(5), order)]
    if solver in ADAPTIVE:
        options = [{"rtol": 1e-3}, {"rtol": 1e-3}]
    straight = endpoints(MIXTURE.velocity, x_0, time_grid(8), solver, **options[0])
    permuted = endpoints(MIXTURE.velocity, x_0[order], time_grid(8), solver, **options[1])
    torch.testing.assert_close(permuted, straight[order], atol=1e-12, rtol=0)
    assert (straight[0] - straight[1]).norm() > 0.1


@pytest.mark.parametrize("solver", NAMES)
def test_evaluations_are_counted_and_stay_within_the_run(solver):
    calls, start = [], START[:1].clone()

    def field(x, t):
        assert t.dtype == torch.float64
        assert t.ndim == 0
        calls.append(float(t))
        return 1e-3 * x  # so slow that guesses at a first step would leave the run

    solution = run(field, start, 0.25 + 0.75 * time_grid(6), solver)
    assert solution.nfe == len(calls)
    per_step = FACTS[solver].evaluations_per_step
    assert per_step is None or solution.nfe == 6 * per_step
    assert min(calls) >= 0.25 - 1e-7
    assert max(calls) <= 1
    assert torch.equal(start, START[:1])


@pytest.mark.parametrize("solver", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_trajectory_holds_every_state_when_asked_for(solver, dtype):
    start, seen = START[:1].to(dtype), []
    solution = run(
        MIXTURE.velocity,
        start,
        time_grid(4),
        solver,
        return_trajectory=True,
        on_step=lambda index, t, x: seen.append((index, float(t), x.clone())),
    )
    assert solution.trajectory.shape == (5, *start.shape)
    assert solution.trajectory.dtype == dtype
    assert torch.equal(solution.trajectory[0], start)
    assert torch.equal(solution.trajectory[1:], torch.stack([x for _, _, x in seen]))
    assert torch.equal(solution.trajectory[-1], solution.latents)
    assert [index for index, _, _ in seen] == [0, 1, 2, 3]
    assert [t for _, t, _ in seen] == solution.times[1:].tolist()
    torch.testing.assert_close(solution.times, time_grid(4), atol=2e-6, rtol=0)
    again = run(MIXTURE.velocity, start, time_grid(4), solver)
    assert again.trajectory is None
    assert torch.equal(again.latents, solution.latents)


@pytest.mark.parametrize("solver", NAMES)
def test_a_field_may_stop_the_run(solver):
    def field(x, t):
        if t > 0.4:
            raise SolveStopped
        return MIXTURE.velocity(x, t)

    with pytest.raises(SolveStopped):
        run(field, START[:1], time_grid(5), solver)


@pytest.mark.parametrize("solver", NAMES)
def test_a_callback_may_stop_the_run(solver):
    def stop(index, t, x):
        raise SolveStopped

    with pytest.raises(SolveStopped):
        run(MIXTURE.velocity, START[:1], time_grid(5), solver, on_step=stop)


@pytest.mark.parametrize("solver", [name for name in FIXED if name not in THEIRS.values()])
def test_a_run_goes_on_from_the_state_that_a_callback_returns(solver):
    grid, fresh = time_grid(6), START[:1]

    def on_step(index, t, x):
        return fresh if index == 2 else x

    found = run(MIXTURE.velocity, START[1:], grid, solver, on_step=on_step).latents
    if solver == "unipc":  # a run of its own lowers the order at its last step, like this one
        scheduler = UniPCMultistepScheduler(**FLOW)
        expected = solve(MIXTURE.velocity, fresh, grid[3:], solver=scheduler).latents
    else:
        expected = run(MIXTURE.velocity, fresh, grid[3:], solver).latents
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)  # and forgets what was before


@pytest.mark.parametrize("solver", THEIRS.values())
def test_a_state_for_a_run_that_is_over_is_refused(solver):
    with pytest.raises(SettingsError, match="cannot replace its states; return None"):
        run(
            MIXTURE.velocity,
            START[:1],
            time_grid(3),
            solver,
            on_step=lambda index, t, x: torch.zeros_like(x),
        )
    run(MIXTURE.velocity, START[:1], time_grid(3), solver, on_step=lambda index, t, x: x)


def test_second_order_pays_on_a_mixture():
    x_0 = torch.randn(200, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    exact = solve(MIXTURE.velocity, x_0, time_grid(500), solver="rk4").latents
    error = {}
    for solver in ("euler", "ab2", "midpoint", "dpm++2m", "unipc"):
        steps = 32 // FACTS[solver].evaluations_per_step
        solution = solve(MIXTURE.velocity, x_0, time_grid(steps), solver=solver)
        assert solution.nfe == 32
        error[solver] = ((solution.latents - exact).norm() / exact.norm()).item()
    for solver in ("ab2", "midpoint", "dpm++2m", "unipc"):
        assert error[solver] < error["euler"] / 2, error


def test_the_mixtures_velocity_takes_noise_to_the_mixture():
    x_0 = torch.randn(20_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = solve(MIXTURE.velocity, x_0, time_grid(100), solver="midpoint").latents
    nearest = torch.cdist(found, MIXTURE.means).argmin(1)
    for component, mean in enumerate(MIXTURE.means):
        own = found[nearest == component]
        # Four standard deviations of a share of a third, a mean and a variance.
        assert len(own) / 20_000 == pytest.approx(1 / 3, abs=4 * math.sqrt(2 / 9 / 20_000))
        torch.testing.assert_close(own.mean(0), mean, atol=4 * 0.3 / math.sqrt(6000), rtol=0)
        assert (own - mean).var().item() == pytest.approx(0.09, rel=4 * math.sqrt(2 / 12_000))


# Noise along the way


def test_the_sde_keeps_the_marginals():
    mean, pixels = GAUSSIAN.means[0, 0], 20_000
    # Each row holds many independent numbers, all with the mixture's first mean.
    field_of = type(GAUSSIAN)(torch.full((1, pixels), float(mean), dtype=torch.float64), 0.6)
    x_0 = torch.stack(
        [torch.randn(pixels, dtype=torch.float64, generator=one) for one in generators(range(4))]
    )
    times = time_grid(250)
    found = solve(
        field_of.velocity,
        x_0,
        times,
        solver="sde",
        generators=generators(range(10, 14)),
        return_trajectory=True,
    ).trajectory
    for index in (50, 125, 200, 249, 250):
        t = float(times[index])
        # Of 80,000 numbers the variance is known to 0.5 %; the steps are wrong by up to 1 %.
        expected = float(field_of.variance(t))
        assert found[index].var().item() == pytest.approx(expected, rel=0.03), t
        assert found[index].mean().item() == pytest.approx(t * float(mean), abs=0.02), t


def test_the_sdes_noise_is_each_samples_own_and_none_is_added_at_the_end():
    first, same, other = (
        solve(
            MIXTURE.velocity,
            START,
            time_grid(10),
            solver="sde",
            generators=generators(seeds),
            return_trajectory=True,
        ).trajectory
        for seeds in ([1, 2], [1, 2], [1, 3])
    )
    assert torch.equal(first, same)
    assert torch.equal(first[:, 0], other[:, 0])
    assert (first[1:, 1] != other[1:, 1]).all()
    alone = solve(
        MIXTURE.velocity, START[1:], time_grid(10), solver="sde", generators=generators([3])
    ).latents
    torch.testing.assert_close(alone, other[-1, 1:], atol=1e-12, rtol=0)
    t, x = time_grid(10)[-2], first[-2]
    expected = x + (1 - t) * ((1 + t) * MIXTURE.velocity(x, t) - x)
    torch.testing.assert_close(first[-1], expected, atol=1e-12, rtol=0)


def test_the_sde_needs_a_generator_for_each_sample():
    with pytest.raises(SettingsError, match=r"'sde' draws noise: pass generators, .* 2 samples"):
        solve(MIXTURE.velocity, START, time_grid(4), solver="sde")
    with pytest.raises(SettingsError, match="got 1 generators for 2"):
        solve(MIXTURE.velocity, START, time_grid(4), solver="sde", generators=generators([1]))


# What is refused


def test_an_unknown_solver_is_refused_with_the_known_ones():
    with pytest.raises(SettingsError, match=r"unknown solver 'eular'; known: .*euler.*dopri5"):
        solve(PROBLEMS["constant"].field, START, time_grid(2), solver="eular")


def test_a_solver_of_ones_own_is_taken_and_left_alone():
    own = AdamsBashforth2()
    found = solve(MIXTURE.velocity, START, time_grid(5), solver=own).latents
    assert torch.equal(found, solve(MIXTURE.velocity, START, time_grid(5), solver="ab2").latents)
    assert vars(own) == vars(AdamsBashforth2())


@pytest.mark.parametrize("solver", ADAPTIVE)
def test_adaptive_solvers_refuse_a_batch(solver):
    with pytest.raises(SettingsError, match=r"got 2, solve sample by sample"):
        solve(MIXTURE.velocity, START, time_grid(4), solver=solver)


@pytest.mark.parametrize("solver", [name for name in NAMES if name not in ADAPTIVE])
def test_tolerances_are_refused_where_there_are_none(solver):
    with pytest.raises(SettingsError, match="has no tolerances; leave rtol and atol out"):
        run(MIXTURE.velocity, START, time_grid(4), solver, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, -1e-3, 1e-9, math.inf, math.nan, "1e-3", True])
def test_a_tolerance_that_is_none_is_refused(value):
    with pytest.raises(SettingsError, match=r"rtol must be a number of at least 1.2e-07"):
        solve(MIXTURE.velocity, START[:1].float(), time_grid(4), solver="dopri5", rtol=value)


@pytest.mark.parametrize("solver", ["explicit_adams", "implicit_adams", "fixed_adams"])
def test_methods_of_a_uniform_grid_refuse_another(solver):
    with pytest.raises(SettingsError, match="uniform grid alone"):
        solve(MIXTURE.velocity, START[:1], time_grid(8, shift=3.0), solver=solver)


def test_a_method_that_gives_up_says_so(monkeypatch):
    def short(func, y0, t, **options):
        return odeint(func, y0, t, **options)[:3]

    monkeypatch.setattr("torchdiffeq.odeint", short)  # as scipy's would come back
    with pytest.raises(SettingsError, match="gave up after 2 of 4 times"):
        solve(MIXTURE.velocity, START[:1], time_grid(4), solver="scipy_solver")


def test_solve_checks_the_times():
    with pytest.raises(SettingsError, match="increase strictly"):
        solve(MIXTURE.velocity, START, [0.0, 0.5, 0.5, 1.0])


def test_names_and_facts_agree_with_what_is_made():
    assert list(FACTS) == list(SOLVERS)
    for name in NAMES:
        solver = make_solver(name)
        assert FACTS[name] == (
            solver.order,
            solver.evaluations_per_step,
            solver.adaptive,
            solver.draws_noise,
        )
