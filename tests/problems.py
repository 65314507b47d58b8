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


_TURN = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)

PROBLEMS = {
    "constant": Problem(lambda x, t: torch.full_like(x, 0.7), lambda x: x + 0.7),
    "exponential": Problem(lambda x, t: x, lambda x: math.e * x),
    "rotation": Problem(
        lambda x, t: x @ _TURN,
        lambda x: x @ torch.linalg.matrix_exp(_TURN),
    ),
    "of time": Problem(lambda x, t: torch.cos(3 * t).expand_as(x), lambda x: x + math.sin(3) / 3),
}
