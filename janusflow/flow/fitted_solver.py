"""Solvers whose coefficients were fitted to a model's own fine solutions (arXiv 2403.01329).

Every state is the noise and a weighted sum of all velocities so far. Euler, Adams-Bashforth and
UniPC are such sums, too, with weights that suit any field; fitted ones suit a model, a guidance
scale and a number of evaluations. `janusflow.training.solver` fits them. Axes: n evaluations, B
batch; all else is free.
"""

from __future__ import annotations

import json
import os
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from janusflow.errors import SettingsError
from janusflow.flow.ode import Field, Solver, Visit
from janusflow.flow.timesteps import check_times

PREFIX = "fitted:"
"""Of the names of fitted solvers; what follows is the name of a bundled one, or a file."""
_ROUNDING = 1e-6


class FittedSolver(Solver):
    """`x_i = x_0 + Σ_j b_ij v_j`, over the velocities v_j at all states before the i-th.

    It takes n steps from noise to image, at times of its own. The weights of a state sum to its
    time, so that a constant velocity is integrated exactly. A replaced state moves all later ones
    by as much.
    """

    evaluations_per_step = 1
    steps: int

    def __init__(self, times: Tensor, weights: Tensor) -> None:
        """Takes coefficients, which gradients may flow into.

        Args:
            times: Of the evaluations and the end, from 0 to 1, (n + 1,).
            weights: b, of the states after the first, (n, n), 0 above the diagonal.

        Raises:
            SettingsError: If they are no such numbers.
        """
        grid = check_times(times.detach())
        if grid[0] != 0 or grid[-1] != 1:
            raise SettingsError(
                f"times of a fitted solver go from 0 to 1, got {grid[0]:g} to {grid[-1]:g}"
            )
        held = weights.detach()
        self.steps = len(grid) - 1
        if held.shape != (self.steps, self.steps) or held.triu(1).any():
            raise SettingsError(
                f"weights of a fitted solver of {self.steps} steps have shape "
                f"({self.steps}, {self.steps}) and zeros above the diagonal, got "
                f"{tuple(held.shape)}"
            )
        if not (held.double().sum(1) - grid[1:]).abs().max() <= _ROUNDING:
            raise SettingsError(
                f"weights of a fitted solver sum to the times of their states, "
                f"{grid[1:].tolist()}, got {held.sum(1).tolist()}"
            )
        self._times, self._weights = times, weights

    @classmethod
    def from_file(cls, where: str | os.PathLike[str]) -> FittedSolver:
        """Reads a JSON file of `janusflow.training.solver`.

        Args:
            where: The name of a bundled solver, such as "tiny-6", or a file.

        Raises:
            SettingsError: If there is none, or it is damaged.
        """
        bundled = _bundled().get(str(where))
        try:
            text = (Path(where) if bundled is None else bundled).read_text(encoding="utf-8")
            content = json.loads(text)
            rows: list[list[float]] = content["weights"]
            times = torch.tensor(content["times"], dtype=torch.float64)
            weights = torch.zeros(len(rows), len(rows), dtype=torch.float64)
            for index, row in enumerate(rows):
                weights[index, : index + 1] = torch.tensor(row, dtype=torch.float64)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise SettingsError(
                f"no fitted solver {str(where)!r}: expected a bundled one ({', '.join(_bundled())})"
                f" or a file that `janusflow train` wrote with task solver ({error})"
            ) from error
        return cls(times, weights)

    def content(self) -> dict[str, Any]:
        """What `from_file` reads, as JSON."""
        rows = self._weights.detach().double().tolist()
        return {
            "times": self._times.detach().double().tolist(),
            "weights": [row[: index + 1] for index, row in enumerate(rows)],
        }

    def grid(self, times: Tensor) -> Tensor:
        """Its own times.

        Raises:
            SettingsError: If the run has another number of steps, or is not from noise to image.
        """
        num = len(times) - 1
        if num != self.steps or times[0] != 0 or times[-1] != 1:
            raise SettingsError(
                f"this solver was fitted for {self.steps} steps from t = 0 to 1, and the run has "
                f"{num} from {times[0]:.3g} to {times[-1]:.3g}: set num_inference_steps="
                f"{self.steps}; a path that starts from a picture takes another solver"
            )
        return self._times.to(times)

    def run(self, field: Field, x: Tensor, times: Tensor, visit: Visit) -> Tensor:
        """See `Solver.run`."""
        start, weights = x, self._weights.to(x)
        velocities: list[Tensor] = []
        for index in range(self.steps):
            velocities.append(field(x, times[index]))
            terms = zip(weights[index], velocities, strict=False)
            reached = start + sum(weight * velocity for weight, velocity in terms)
            x = visit(index, times[index + 1], reached)
            if x is not reached:
                start = start + (x - reached)
        return x


def bundled_names() -> list[str]:
    """Names of the solvers that come with the package."""
    return sorted(_bundled())


def _bundled() -> dict[str, Any]:
    files = (package_files("janusflow") / "assets" / "solvers").iterdir()
    return {file.name.removesuffix(".json"): file for file in files}
