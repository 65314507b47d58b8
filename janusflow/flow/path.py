"""The straight path between noise and image; the one place that states the convention.

`t` runs from 0 (noise `x_0`) to 1 (image `x_1`): `x_t = (1 - t) x_0 + t x_1`, so that the velocity
`dx/dt` is `x_1 - x_0` (rectified flow, arXiv 2209.03003). Axes: B batch; all else is free.
"""

from __future__ import annotations

from torch import Tensor


def expand_like(t: Tensor, x: Tensor) -> Tensor:
    """Gives t, a scalar or (B,), the axes of x (B, …) so that the two broadcast."""
    return t if t.ndim == 0 else t.reshape(-1, *[1] * (x.ndim - 1))


def interpolate(x_0: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
    """The point `x_t` of the path, for t a scalar or (B,) in [0, 1]."""
    t = expand_like(t, x_1)
    return (1 - t) * x_0 + t * x_1


def velocity_target(x_0: Tensor, x_1: Tensor) -> Tensor:
    """The velocity of the straight path, the same at all t."""
    return x_1 - x_0


def predicted_image(x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """Where the path ends if the velocity stays as it is: `x_t + (1 - t) v`."""
    return x_t + (1 - expand_like(t, x_t)) * velocity
