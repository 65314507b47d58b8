"""Classifier-free guidance of velocities (arXiv 2207.12598)."""

from __future__ import annotations

import math

from torch import Tensor

from janusflow.errors import SettingsError


def classifier_free_guidance(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """`v_u + w (v_c - v_u)`; a scale of 1 is no guidance."""
    return unconditional + scale * (conditional - unconditional)


def check_guidance_scale(scale: float) -> float:
    """Gives the scale back as a float.

    Raises:
        SettingsError: If it is not a finite number.
    """
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise SettingsError(f"guidance_scale must be a finite number (1.0 = off), got {scale!r}")
    return float(scale)
