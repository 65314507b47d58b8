"""What every solver of `dx/dt = velocity(x, t)` is: the interface between `solve` and the methods.

The state keeps the dtype of the given noise, float32 or float64. Axes: B batch; all else is free.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

Field = Callable[[Tensor, Tensor], Tensor]
"""Velocity (B, …) of a state (B, …) at a time, a scalar in [0, 1]."""

Visit = Callable[[int, Tensor, Tensor], Tensor]
"""Told (index of the step, time reached, state); gives the state to go on from, mostly the same."""


class Solver(ABC):
    """Takes a state along a grid of times; made anew for every run, so it may remember.

    Attributes:
        order: The error at the end falls as the step to this power; None where it varies.
        evaluations_per_step: Of the velocity; None where it varies.
        adaptive: Whether tolerances govern it; they see all rows of a state together.
        draws_noise: Whether it needs `generators`.
        rtol: Relative tolerance of an adaptive solver.
        atol: Absolute tolerance of an adaptive solver.
        generators: One for each row of the state.
    """

    order: int | None = None
    evaluations_per_step: int | None = None
    adaptive: bool = False
    draws_noise: bool = False
    rtol: float = 1e-5
    atol: float = 1e-5
    generators: Sequence[torch.Generator] = ()

    def grid(self, times: Tensor) -> Tensor:
        """The times that a run over `times` visits; called before it. Others for some schedulers.

        Args:
            times: float64 (T + 1,), strictly increasing.
        """
        return times

    @abstractmethod
    def run(self, field: Field, x: Tensor, times: Tensor, visit: Visit) -> Tensor:
        """The state at the last time.

        Args:
            field: Velocity of a state.
            x: State at the first time, (B, …); not modified.
            times: What `grid` gave.
            visit: To be called at every time but the first.
        """


class StepSolver(Solver):
    """A solver that advances by one interval at a time."""

    order: int
    evaluations_per_step: int

    @abstractmethod
    def step(self, field: Field, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """The state at `t_next`, from the state x at t."""

    def restart(self) -> None:
        """Forgets earlier steps: the state was replaced, and they led elsewhere."""
        return

    def run(self, field: Field, x: Tensor, times: Tensor, visit: Visit) -> Tensor:
        """See `Solver.run`."""
        for index, (t, t_next) in enumerate(pairwise(times)):
            reached = self.step(field, x, t, t_next)
            x = visit(index, t_next, reached)
            if x is not reached:
                self.restart()
        return x
