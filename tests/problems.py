"""Fields with exact solutions, for the solvers' tests."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """`dx/dt = field(x, t)` on [0, 1] and its solution at 1 from any start."""

    field: Callable[[Tensor, Tensor], Tensor]
    solution: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class GaussianMixture:
    """Images from equally likely Gaussians, and the exact velocity of the straight path to them.

    Given component k, `x_t` is Gaussian with mean `t mean_k` and variance
    `t² std² + (1 - t)²`, and so are image and noise given `x_t`; the velocity is the mean of their
    difference.
    """

    means: Tensor  # (K, D)
    std: float

    def variance(self, t: Tensor | float) -> Tensor:
        """Of each component at t."""
        return torch.as_tensor(t**2 * self.std**2 + (1 - t) ** 2)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """The velocity (B, D) of states (B, D)."""
        offsets = x[:, None] - t * self.means.to(x)  # (B, K, D)
        weights = torch.softmax(-offsets.square().sum(-1) / (2 * self.variance(t)), dim=1)
        slope = (t * self.std**2 - (1 - t)) / self.variance(t)
        return (weights[..., None] * (self.means.to(x) + slope * offsets)).sum(1)


_TURN = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
GAUSSIAN = GaussianMixture(torch.tensor([[0.5, -1.0]], dtype=torch.float64), 0.6)
MIXTURE = GaussianMixture(
    torch.tensor([[1.5, 0.0], [-1.0, 1.0], [-0.5, -1.5]], dtype=torch.float64), 0.3
)

PROBLEMS = {
    "constant": Problem(lambda x, t: torch.full_like(x, 0.7), lambda x: x + 0.7),
    "exponential": Problem(lambda x, t: x, lambda x: math.e * x),
    "rotation": Problem(
        lambda x, t: x @ _TURN.to(x),
        lambda x: x @ torch.linalg.matrix_exp(_TURN.to(x)),
    ),
    "of time": Problem(lambda x, t: torch.cos(3 * t).expand_as(x), lambda x: x + math.sin(3) / 3),
    "gaussian": Problem(GAUSSIAN.velocity, lambda x: GAUSSIAN.means + GAUSSIAN.std * x),
}
