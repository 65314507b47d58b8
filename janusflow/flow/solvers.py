"""`solve`: integrates `dx/dt = velocity(x, t)` over a grid of times, by a solver of any make.

The state keeps the dtype of the given noise, float32 or float64, whatever the network computes in.
Axes: B batch; all else is free.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from janusflow.errors import SettingsError
from janusflow.flow.diffusers_bridge import DiffusersSolver, UniPC
from janusflow.flow.noise import image_generators
from janusflow.flow.ode import Field, Solver, StepSolver
from janusflow.flow.step_solvers import (
    AdamsBashforth2,
    DPMSolverPlusPlus2M,
    Euler,
    EulerMaruyama,
    Heun,
    Midpoint,
    RungeKutta4,
)
from janusflow.flow.timesteps import check_times
from janusflow.flow.torchdiffeq_bridge import METHODS, TorchdiffeqSolver

__all__ = [
    "SOLVERS",
    "Field",
    "ODESolution",
    "SolveStopped",
    "Solver",
    "SolverFacts",
    "StepCallback",
    "StepSolver",
    "make_solver",
    "solve",
    "solver_names",
]

StepCallback = Callable[[int, Tensor, Tensor], Tensor | None]
"""Called after each step with (index, time reached, state); may return a state to go on from."""

SOLVERS: dict[str, Callable[[], Solver]] = {
    "euler": Euler,
    "ab2": AdamsBashforth2,
    "midpoint": Midpoint,
    "heun": Heun,
    "rk4": RungeKutta4,
    "dpm++2m": DPMSolverPlusPlus2M,
    "unipc": UniPC,
    "sde": EulerMaruyama,
}
for _method in METHODS:  # by their plain names where those are free
    SOLVERS.setdefault(_method, partial(TorchdiffeqSolver, _method))
SOLVERS |= {f"torchdiffeq:{method}": partial(TorchdiffeqSolver, method) for method in METHODS}


class SolveStopped(Exception):
    """Raised by a callback to end a run; `solve` lets it pass."""


@dataclass(frozen=True)
class ODESolution:
    """What a run gives.

    Attributes:
        latents: The state at the last time, (B, …).
        nfe: Number of evaluations of the velocity.
        trajectory: States at all times on the CPU, (T + 1, B, …), when asked for.
        times: Times of the states, float64 (T + 1,), from `solve`; a scheduler's own where it has
            some.
    """

    latents: Tensor
    nfe: int
    trajectory: Tensor | None = None
    times: Tensor | None = None


class SolverFacts(NamedTuple):
    """What to know of a solver before a run; see `Solver`."""

    order: int | None
    evaluations_per_step: int | None
    adaptive: bool
    draws_noise: bool


def solver_names() -> dict[str, SolverFacts]:
    """All solvers by name. The torchdiffeq ones have a second name, `torchdiffeq:NAME`."""
    facts = {}
    for name, make in SOLVERS.items():
        solver: Any = make if isinstance(make, type) else make()
        facts[name] = SolverFacts(*(getattr(solver, field) for field in SolverFacts._fields))
    return facts


def make_solver(solver: str | Any) -> Solver:
    """A fresh solver.

    Args:
        solver: A name in `SOLVERS`, a flow scheduler of diffusers or a `Solver`; an object is
            copied and left alone.

    Raises:
        SettingsError: If there is no such solver, or the scheduler is not of flows.
    """
    if isinstance(solver, Solver):
        return copy.deepcopy(solver)
    if not isinstance(solver, str):
        return DiffusersSolver(solver)
    if solver not in SOLVERS:
        known = ", ".join(name for name in SOLVERS if not name.startswith("torchdiffeq:"))
        raise SettingsError(
            f"unknown solver {solver!r}; known: {known}, torchdiffeq:NAME for all of torchdiffeq's"
        )
    return SOLVERS[solver]()


def solve(
    field: Field,
    x_0: Tensor,
    times: Tensor | Sequence[float],
    *,
    solver: str | Any = "euler",
    rtol: float | None = None,
    atol: float | None = None,
    generators: Sequence[torch.Generator] | None = None,
    on_step: StepCallback | None = None,
    return_trajectory: bool = False,
) -> ODESolution:
    """Integrates the field over a grid of times.

    Args:
        field: Velocity of the state; called with the state and a float64 scalar time.
        x_0: State at `times[0]`, float32 or float64, (B, …); not modified. B is 1 for adaptive
            solvers: their steps would depend on what else is in the batch.
        times: Increasing times in [0, 1], (T + 1,). Some schedulers count them only, and have
            times of their own, see `DiffusersSolver`.
        solver: See `make_solver`.
        rtol: Relative tolerance of adaptive solvers. The default, 1e-5, is a hundred times the
            resolution of float32 and far below what a picture shows.
        atol: Absolute tolerance, 1e-5 by default, for states about 1 in size.
        generators: One on the CPU for each of the B rows, for solvers that draw noise.
        on_step: Called after every step; for the solvers of torchdiffeq after the run, without
            leave to return another state.
        return_trajectory: Keep all states on the CPU: (T + 1) times the memory of `x_0`. (The
            solvers of torchdiffeq hold as much on the device of `x_0` in any case.)

    Raises:
        SettingsError: If the solver is unknown, or cannot do what is asked of it.
    """
    stepper = make_solver(solver)
    label = solver if isinstance(solver, str) else type(solver).__name__
    _set_tolerances(stepper, label, rtol, atol, x_0)
    if stepper.draws_noise:
        if generators is None:
            raise SettingsError(
                f"solver {label!r} draws noise: pass generators, a torch.Generator for each of the "
                f"{len(x_0)} samples"
            )
        stepper.generators, _ = image_generators(len(x_0), generator=generators)
    times = stepper.grid(check_times(times))
    states = torch.empty(len(times), *x_0.shape, dtype=x_0.dtype) if return_trajectory else None
    if states is not None:
        states[0] = x_0
    evaluations = 0

    def counted(x: Tensor, t: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return field(x, t).to(x.dtype)

    def visit(index: int, t: Tensor, x: Tensor) -> Tensor:
        replaced = None if on_step is None else on_step(index, t, x)
        x = x if replaced is None else replaced
        if states is not None:
            states[index + 1] = x
        return x

    latents = stepper.run(counted, x_0, times, visit)
    return ODESolution(latents, evaluations, states, times)


def _set_tolerances(
    stepper: Solver, label: str, rtol: float | None, atol: float | None, x_0: Tensor
) -> None:
    given = {name: value for name, value in (("rtol", rtol), ("atol", atol)) if value is not None}
    if not stepper.adaptive:
        if given:
            raise SettingsError(
                f"solver {label!r} has no tolerances; leave {' and '.join(given)} out and set the "
                "number of steps, or take an adaptive solver such as dopri5"
            )
        return
    if len(x_0) != 1:
        raise SettingsError(
            f"solver {label!r} chooses its steps by the error over a whole batch, so that a sample "
            f"would depend on the others; got {len(x_0)}, solve sample by sample"
        )
    least = torch.finfo(x_0.dtype).eps
    for name, value in given.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and least <= value < math.inf):
            raise SettingsError(
                f"{name} must be a number of at least {least:.1e}, the resolution of "
                f"{str(x_0.dtype).removeprefix('torch.')}, got {value!r}"
            )
        setattr(stepper, name, float(value))
