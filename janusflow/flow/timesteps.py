"""Times: densities to train on, grids to sample on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from janusflow.errors import SettingsError


def logit_normal(
    num: int, *, mean: float = 0.0, std: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Draws times `sigmoid(N(mean, std))` (arXiv 2403.03206), float32 (num,) in (0, 1)."""
    return torch.sigmoid(mean + std * torch.randn(num, generator=generator))


def uniform(num: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Draws times uniformly, float32 (num,) in [0, 1)."""
    return torch.rand(num, generator=generator)


def time_grid(num_inference_steps: int, *, shift: float = 1.0) -> Tensor:
    """Times of a sampling run: `num_inference_steps` intervals from 0 to 1.

    Args:
        num_inference_steps: Number of intervals.
        shift: `t' = t / (s - (s - 1) t)` (arXiv 2403.03206); above 1 spends more steps near the
            noise, 1 is the uniform grid.

    Returns:
        float64 (num_inference_steps + 1,), so that differences of neighbours are exact in float32.

    Raises:
        SettingsError: If the number is no integer of at least 1, or shift is not above 0.
    """
    steps = num_inference_steps
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise SettingsError(
            f"num_inference_steps must be a whole number of at least 1, got {steps!r}"
        )
    if not (math.isfinite(shift) and shift > 0):
        raise SettingsError(f"shift must be a finite number above 0, got {shift!r}")
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    return t / (shift - (shift - 1) * t)


def check_times(times: Tensor | Sequence[float]) -> Tensor:
    """Gives a grid of times back as float64 (T + 1,), on its device.

    It may start above 0, from an image with noise, and is not asked to end at 1.

    Raises:
        SettingsError: If they are not two or more strictly increasing numbers in [0, 1].
    """
    try:
        grid = torch.as_tensor(times).double()
    except (TypeError, ValueError, RuntimeError) as error:
        raise SettingsError(f"times must be numbers, got {times!r}") from error
    if grid.ndim != 1 or len(grid) < 2:
        raise SettingsError(
            f"times must be a list of two or more, T + 1 for T steps; got shape {tuple(grid.shape)}"
        )
    if not (grid.diff() > 0).all():
        raise SettingsError(
            f"times must increase strictly, from noise to image; got {_short(grid)}"
        )
    if not (grid[0] >= 0 and grid[-1] <= 1):
        raise SettingsError(
            f"times must lie between 0 (noise) and 1 (image), got {_short(grid)}; "
            "timesteps up to 1000 are to be divided by 1000"
        )
    return grid


def _short(grid: Tensor) -> str:
    shown = [f"{t:.6g}" for t in grid.tolist()]
    return ", ".join(shown if len(shown) <= 8 else [*shown[:4], "…", *shown[-3:]])
