"""Solvers of `dx/dt = velocity(x, t)` from t = 0 to t = 1.

A solver advances one interval; `solve` holds the one loop. The state keeps the dtype of the given
noise, float32 or float64, whatever the network computes in. Axes: B batch; all else is free.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from janusflow.errors import SettingsError

Field = Callable[[Tensor, Tensor], Tensor]
"""Velocity (B, …) of a state (B, …) at a time, a scalar in [0, 1]."""

StepCallback = Callable[[int, Tensor, Tensor], Tensor | None]
"""Called after each step with (index, time reached, state); may return a state to go on from."""


class SolveStopped(Exception):
    """Raised by a callback to end a run; `solve` lets it pass."""


@dataclass(frozen=True)
class ODESolution:
    """What a run gives.

    Attributes:
        latents: The state at the last time, (B, …).
        nfe: Number of evaluations of the velocity.
        trajectory: States at all times on the CPU, (T + 1, B, …), when asked for.
    """

    latents: Tensor
    nfe: int
    trajectory: Tensor | None = None


class Solver(ABC):
    """Advances a state by one interval; made anew for every run, so it may remember."""

    @abstractmethod
    def step(self, field: Field, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """The state at `t_next`, from the state x at t."""


class Euler(Solver):
    """`x + h v`: one evaluation a step, order 1."""

    def step(self, field: Field, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """See `Solver.step`."""
        return x + (t_next - t).to(x.dtype) * field(x, t)


SOLVERS: dict[str, type[Solver]] = {"euler": Euler}


def make_solver(name: str) -> Solver:
    """A fresh solver by its name in `SOLVERS`.

    Raises:
        SettingsError: If there is no such solver.
    """
    if name not in SOLVERS:
        raise SettingsError(f"unknown solver {name!r}; known: {', '.join(SOLVERS)}")
    return SOLVERS[name]()


def solve(
    field: Field,
    x_0: Tensor,
    times: Tensor,
    *,
    solver: str = "euler",
    on_step: StepCallback | None = None,
    return_trajectory: bool = False,
) -> ODESolution:
    """Integrates the field over a grid of times.

    Args:
        field: Velocity of the state; called with the state and a float64 scalar time.
        x_0: State at `times[0]`, float32 or float64, (B, …); not modified.
        times: Increasing times, (T + 1,).
        solver: A name in `SOLVERS`.
        on_step: Called after every step.
        return_trajectory: Keep all states on the CPU, (T + 1) times the memory of `x_0`.
    """
    evaluations = 0

    def counted(x: Tensor, t: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return field(x, t).to(x.dtype)

    stepper = make_solver(solver)
    x, states = x_0, [x_0.cpu()]
    for index, (t, t_next) in enumerate(pairwise(times)):
        x = stepper.step(counted, x, t, t_next)
        if on_step is not None:
            replaced = on_step(index, t_next, x)
            x = x if replaced is None else replaced
        if return_trajectory:
            states.append(x.cpu())
    return ODESolution(x, evaluations, torch.stack(states) if return_trajectory else None)
