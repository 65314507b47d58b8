"""Guidance: how the velocities with and without a condition become one.

Knows tensors only; who computes the two velocities, and that one is spared where guidance is off,
is `janusflow.models.guided_field`. Axes: B batch; all else is free.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from janusflow.errors import SettingsError
from janusflow.flow.path import expand_like

METHODS = ("cfg", "cfg-zero", "apg")
_SMALLEST_REST = 1e-3
"""Of the path, for APG: predicted images of velocities at its very end are all the same."""


def classifier_free_guidance(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """`v_u + w (v_c - v_u)` (arXiv 2207.12598); a scale of 1 is no guidance."""
    return unconditional + scale * (conditional - unconditional)


def cfg_zero_star(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Guidance from the multiple of `v_u` that is nearest to `v_c` (arXiv 2503.18886)."""
    dims = tuple(range(1, conditional.ndim))
    product = (conditional * unconditional).sum(dims, keepdim=True)
    nearest = product / (unconditional.square().sum(dims, keepdim=True) + 1e-8) * unconditional
    return classifier_free_guidance(conditional, nearest, scale)


def rescale(guided: Tensor, conditional: Tensor, share: float) -> Tensor:
    """Mixes in, by `share`, velocities of the conditional ones' deviation (arXiv 2305.08891)."""
    dims = tuple(range(1, guided.ndim))
    factor = conditional.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
    return guided * (share * factor + 1 - share)


@dataclass(frozen=True)
class Guidance:
    """How a picture is guided; checked when it is made.

    Attributes:
        scale: Weight w, or w as a function of t; where it is 1, guidance is off and costs nothing.
        interval: Guidance is on for t in [a, b] (arXiv 2404.07724), 0 = noise and 1 = image.
        method: "cfg", "cfg-zero" (CFG-Zero*) or "apg" (adaptive projected guidance, arXiv
            2410.02416).
        zero_init_steps: Steps at the start in which the state rests, as CFG-Zero* proposes; no
            velocity is computed in them.
        rescale: Share in [0, 1] of velocities brought to the deviation of the conditional ones.
        apg_momentum: Of the difference of predicted images, over the evaluations of a run.
        apg_norm: The longest difference, by L2 norm of a sample; None = any.
        apg_parallel: Weight of the difference's part along the conditional prediction; 1 keeps it.
    """

    scale: float | Callable[[float], float] = 2.0
    interval: tuple[float, float] = (0.0, 1.0)
    method: str = "cfg"
    zero_init_steps: int = 0
    rescale: float = 0.0
    apg_momentum: float = -0.5
    apg_norm: float | None = None
    apg_parallel: float = 0.0

    def __post_init__(self) -> None:
        if not callable(self.scale):
            check_guidance_scale(self.scale)
        try:
            first, last = (float(end) for end in self.interval)
        except (TypeError, ValueError):
            first, last = 1.0, 0.0
        if not 0 <= first <= last <= 1:
            raise SettingsError(
                f"guidance interval must be two times 0 <= a <= b <= 1, got {self.interval!r}"
            )
        if self.method not in METHODS:
            raise SettingsError(
                f"unknown guidance method {self.method!r}; known: {', '.join(METHODS)}"
            )
        steps = self.zero_init_steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise SettingsError(f"zero_init_steps must be a whole number from 0 on, got {steps!r}")
        if not 0 <= self.rescale <= 1:
            raise SettingsError(f"guidance rescale must be in [0, 1], got {self.rescale!r}")
        if self.apg_norm is not None and not self.apg_norm > 0:
            raise SettingsError(f"apg_norm must be above 0, or None, got {self.apg_norm!r}")

    @property
    def off(self) -> bool:
        """Whether no evaluation is guided at all."""
        return self.scale == 1.0

    def scale_at(self, t: float) -> float:
        """The weight at time t, 1.0 outside the interval.

        Raises:
            SettingsError: If a scale that is a function gives no finite number.
        """
        first, last = self.interval
        if not first <= t <= last:
            return 1.0
        return check_guidance_scale(self.scale(t)) if callable(self.scale) else self.scale


class Guider:
    """Joins velocities during one run; made anew for every run, since APG remembers.

    Args:
        guidance: How.
    """

    def __init__(self, guidance: Guidance) -> None:
        self._guidance = guidance
        self._difference: Tensor | None = None

    def __call__(
        self, x: Tensor, t: Tensor, conditional: Tensor, unconditional: Tensor, scale: float
    ) -> Tensor:
        """The guided velocity (B, …) of the state x at time t, for a weight that is not 1."""
        guidance = self._guidance
        if guidance.method == "cfg":
            guided = classifier_free_guidance(conditional, unconditional, scale)
        elif guidance.method == "cfg-zero":
            guided = cfg_zero_star(conditional, unconditional, scale)
        else:
            guided = self._projected(x, t, conditional, unconditional, scale)
        if guidance.rescale:
            guided = rescale(guided, conditional, guidance.rescale)
        return guided

    def _projected(
        self, x: Tensor, t: Tensor, conditional: Tensor, unconditional: Tensor, scale: float
    ) -> Tensor:
        """Adaptive projected guidance, on predicted images."""
        guidance, dims = self._guidance, tuple(range(1, x.ndim))
        rest = expand_like((1 - t).clamp(min=_SMALLEST_REST).to(x.dtype), x)
        predicted = x + rest * conditional
        difference = rest * (conditional - unconditional)
        if self._difference is not None:
            difference = difference + guidance.apg_momentum * self._difference
        self._difference = difference
        if guidance.apg_norm is not None:
            norm = torch.linalg.vector_norm(difference, dim=dims, keepdim=True)
            difference = difference * (guidance.apg_norm / norm).clamp(max=1)
        along = (difference * predicted).sum(dims, keepdim=True)
        parallel = along / predicted.square().sum(dims, keepdim=True) * predicted
        kept = difference - (1 - guidance.apg_parallel) * parallel
        return conditional + (scale - 1) * kept / rest


def check_guidance_scale(scale: float) -> float:
    """Gives the scale back as a float.

    Raises:
        SettingsError: If it is not a finite number.
    """
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise SettingsError(f"guidance_scale must be a finite number (1.0 = off), got {scale!r}")
    return float(scale)
