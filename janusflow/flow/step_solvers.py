"""The package's own solvers: a rule each for one interval of the grid.

`h` is the length of the interval, `v` the velocity at its start. Axes: B batch; all else is free.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from janusflow.flow.ode import Field, StepSolver
from janusflow.flow.path import predicted_image


class Euler(StepSolver):
    """`x + h v`."""

    order = 1
    evaluations_per_step = 1

    def step(self, field: Field, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """See `StepSolver.step`."""
        return x + (t_next - t).to(x.dtype) * field(x, t)


class AdamsBashforth2(StepSolver):
    """`x + h ((1 + r/2) v - r/2 v_before)`, r the ratio of this step to the one before.

    The first step is Euler's.
    """

    order = 2
    evaluations_per_step = 1

    def __init__(self) -> None:
        self._before: tuple[Tensor, Tensor] | None = None  # velocity and length of the last step

    def restart(self) -> None:
        """See `StepSolver.restart`."""
        self._before = None

    def step(self, field: Field, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """See `StepSolver.step`."""
        h, v = t_next - t, field(x, t)
        slope = v
        if self._before is not None:
            v_before, h_before = self._before
            slope = v + (h / h_before / 2).to(x.dtype) * (v - v_before)
        self._before = v, h
        return x + h.to(x.dtype) * slope


class Midpoint(StepSolver):
    """`x + h v(x + h/2 v, t + h/2)`."""

    order = 2
    evaluations_per_step = 2

    def step(self, field: Field, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """See `StepSolver.step`."""
        h = (t_next - t).to(x.dtype)
        return x + h * field(x + h / 2 * field(x, t), (t + t_next) / 2)


class Heun(StepSolver):
    """`x + h/2 (v + v(x + h v, t + h))`."""

    order = 2
    evaluations_per_step = 2

    def step(self, field: Field, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """See `StepSolver.step`."""
        h, v = (t_next - t).to(x.dtype), field(x, t)
        return x + h / 2 * (v + field(x + h * v, t_next))


class RungeKutta4(StepSolver):
    """The classic method of order 4."""

    order = 4
    evaluations_per_step = 4

    def step(self, field: Field, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """See `StepSolver.step`."""
        h, middle = (t_next - t).to(x.dtype), (t + t_next) / 2
        v_1 = field(x, t)
        v_2 = field(x + h / 2 * v_1, middle)
        v_3 = field(x + h / 2 * v_2, middle)
        v_4 = field(x + h * v_3, t_next)
        return x + h / 6 * (v_1 + 2 * v_2 + 2 * v_3 + v_4)


class DPMSolverPlusPlus2M(StepSolver):
    """DPM-Solver++(2M) (arXiv 2211.01095) on the straight path: linear in `λ = log(t / (1 - t))`.

    It follows the predicted image `D`, extrapolated from the last two. The step from t = 0, the
    one after it and the step to t = 1 have an infinite interval of λ and use `D` as predicted,
    which makes them Euler's.
    """

    order = 2
    evaluations_per_step = 1

    def __init__(self) -> None:
        self._before: tuple[Tensor, float] | None = None  # predicted image and λ of the last step

    def restart(self) -> None:
        """See `StepSolver.restart`."""
        self._before = None

    def step(self, field: Field, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """See `StepSolver.step`."""
        now, after = _log_ratio(t), _log_ratio(t_next)
        image = target = predicted_image(x, field(x, t), t.to(x.dtype))
        if self._before is not None and after < math.inf:
            image_before, before = self._before
            target = image + (after - now) / (now - before) / 2 * (image - image_before)
        self._before = image, now
        kept = (1 - t_next) / (1 - t)
        return kept.to(x.dtype) * x + (t_next - t * kept).to(x.dtype) * target


def _log_ratio(t: Tensor) -> float:
    return torch.logit(t).item()  # -inf at 0, inf at 1


class EulerMaruyama(StepSolver):
    """The SDE that has the marginals of the ODE, `dx = (v + w s) dt + sqrt(2 w) dW`.

    With `w = 1 - t` and the score `s = (t v - x) / (1 - t)` (arXiv 2401.08740) the drift is
    `(1 + t) v - x`. The step to t = 1 adds no noise. Of order 1 in distribution; guidance changes
    the marginals. Noise is float32 whatever the state is, so that a seed means the same.
    """

    order = 1
    evaluations_per_step = 1
    draws_noise = True

    def step(self, field: Field, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """See `StepSolver.step`."""
        h = t_next - t
        moved = x + h.to(x.dtype) * ((1 + t).to(x.dtype) * field(x, t) - x)
        if t_next == 1:
            return moved
        noise = torch.stack([torch.randn(x.shape[1:], generator=one) for one in self.generators])
        return moved + (2 * (1 - t) * h).sqrt().to(x.dtype) * noise.to(x)
