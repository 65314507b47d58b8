"""Editing of pictures along the flow: SDEdit, inpainting, FlowEdit, inversion.

Works on plain fields and knows nothing of language models: a prompt is whatever field the caller
hands in. None of it is part of JanusFlow: **the published model was not trained for editing**, and
these methods ask of its velocity only what sampling asks. Axes: B images, C latent channels, h w
latent cells, H W pixels. `x_img` is the picture's latents (B, C, h, w), where the path would end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from janusflow.errors import SettingsError
from janusflow.flow.diagnostics import endpoint_error
from janusflow.flow.noise import image_noise
from janusflow.flow.path import interpolate
from janusflow.flow.solvers import Field, ODESolution, StepCallback, solve
from janusflow.flow.timesteps import check_times, time_grid


def start_of_edit(x_img: Tensor, noise: Tensor, strength: float) -> tuple[Tensor, float]:
    """The picture under noise, from where SDEdit (arXiv 2108.01073) draws on.

    The published model was not trained for it. Sample on over `edit_times` of the same strength.

    Args:
        x_img: Latents, (B, C, h, w).
        noise: `x_0`, of the same shape.
        strength: `1 - t0` in (0, 1]: 1 starts at the noise alone, near 0 at the picture.

    Returns:
        `t0 x_img + (1 - t0) noise`, and `t0`.

    Raises:
        SettingsError: If strength is out of its range or the shapes differ.
    """
    t0 = 1.0 - _checked_strength(strength)
    _check_alike("noise", noise, x_img)
    return interpolate(noise, x_img, torch.tensor(t0, dtype=torch.float64)), t0


def edit_times(num_inference_steps: int, strength: float, *, shift: float = 1.0) -> Tensor:
    """Times of an edit: `int(num_inference_steps · strength)` intervals from `1 - strength` to 1.

    As in diffusers, `num_inference_steps` counts the steps of a whole path, of which an edit takes
    its share, at least one. But it starts at `1 - strength` exactly and not at the next point of
    the whole path's grid: what an edit keeps of the picture then does not hang on the number of
    steps or the shift, so that these can be compared at one strength. The intervals in between
    are as the shift spaces them there: without one they are equal, and where the share is a whole
    number they are those of the whole path; strength 1 is `time_grid` itself.

    Returns:
        float64, one more than there are intervals.

    Raises:
        SettingsError: If strength is not in (0, 1], or `time_grid` refuses the rest.
    """
    time_grid(num_inference_steps, shift=shift)  # refuses what sampling refuses, in its own words
    strength = _checked_strength(strength)
    taken = max(1, int(round(num_inference_steps * strength, 9)))  # 100 · 0.29 is 28.999…96
    # The shift's curve from t0 on, stretched over [0, 1], is the curve of this weaker shift.
    rest = time_grid(taken, shift=shift / (shift - (shift - 1) * strength))
    return (1.0 - strength) + strength * rest


@dataclass(frozen=True)
class Inpainting:
    """Puts the known part back at its noise level after each step: give it to `solve` as `on_step`.

    The imputation of arXiv 2011.13456; the published model was not trained for it. At t = 1 the
    known cells are those of `x_img`, bit by bit. Start from the same noise, plain or by
    `start_of_edit`. Solvers that remember steps (ab2, dpm++2m) begin anew after each replacement.

    Attributes:
        x_img: Latents, (B, C, h, w).
        noise: `x_0` of the run, of the same shape.
        mask: bool, (B, 1, h, w) or (1, 1, h, w): false keeps a cell, true draws it; `latent_mask`.

    Raises:
        SettingsError: If the tensors do not fit each other.
    """

    x_img: Tensor
    noise: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        _check_alike("noise", self.noise, self.x_img)
        batch, _, *cells = self.x_img.shape
        shapes = [(rows, 1, *cells) for rows in (batch, 1)]
        if self.mask.dtype != torch.bool or tuple(self.mask.shape) not in shapes:
            raise SettingsError(
                f"mask is {self.mask.dtype} {tuple(self.mask.shape)}; expected torch.bool of shape "
                f"{shapes[0]} or {shapes[1]}, as latent_mask makes it from pixels"
            )

    def __call__(self, index: int, t: Tensor, x: Tensor) -> Tensor:
        """The state with its known cells at `(1 - t) noise + t x_img`; a `StepCallback`."""
        return torch.where(self.mask, x, interpolate(self.noise, self.x_img, t).to(x.dtype))


def latent_mask(mask_pixels: Tensor, latent_size: tuple[int, int]) -> Tensor:
    """The cells to draw: those that hold a masked pixel, be it one.

    Args:
        mask_pixels: (B, 1, H, W), bool or in [0, 1]; from 0.5 on a pixel is masked.
        latent_size: (h, w).

    Returns:
        bool (B, 1, h, w).

    Raises:
        SettingsError: If the mask has other axes.
    """
    if mask_pixels.ndim != 4 or mask_pixels.shape[1] != 1:
        raise SettingsError(f"mask has shape {tuple(mask_pixels.shape)}; expected (B, 1, H, W)")
    masked = (mask_pixels >= 0.5).float()
    return functional.adaptive_max_pool2d(masked, latent_size).bool()


def flow_edit(
    source_field: Field,
    target_field: Field,
    x_img: Tensor,
    times: Tensor,
    generators: Sequence[torch.Generator],
    *,
    n_avg: int = 1,
    on_step: StepCallback | None = None,
) -> ODESolution:
    """Moves a picture from one prompt's flow to another's: FlowEdit (arXiv 2412.08629).

    The published model was not trained for it. Each step is Euler's, of the difference between the
    target's velocity and the source's under the same fresh noise; there is no inversion.

    Args:
        source_field: Velocity under what the picture shows.
        target_field: Velocity under what it shall show.
        x_img: Latents, (B, C, h, w), float32 or float64; not modified.
        times: Increasing times from `t0` to 1, (T + 1,); see `edit_times`.
        generators: On the CPU, one a picture, for the noises of its steps: they make an edit the
            same in any batch.
        n_avg: Noises that a step averages over.
        on_step: Called after every step with the edited picture's latents.

    Returns:
        The edited latents; `2 n_avg` evaluations a step.

    Raises:
        SettingsError: If n_avg is below 1, the generators are not one a picture, or `check_times`
            refuses the times.
    """
    check_n_avg(n_avg)
    times = check_times(times)
    batch, channels, height, width = x_img.shape
    x = x_img
    for index, (t, t_next) in enumerate(pairwise(times)):
        change = torch.zeros_like(x)
        for _ in range(n_avg):
            noise, _ = image_noise(batch, (channels, height, width), generator=generators)
            source = interpolate(noise.to(x_img), x_img, t)
            # In this order equal fields see equal states, and leave the picture as it is.
            target = source + (x - x_img)
            change += target_field(target, t).to(x.dtype) - source_field(source, t).to(x.dtype)
        x = x + (t_next - t).to(x.dtype) * change / n_avg
        if on_step is not None:
            replaced = on_step(index, t_next, x)
            x = x if replaced is None else replaced
    return ODESolution(x, 2 * n_avg * (len(times) - 1), times)


def invert(
    field: Field,
    x_img: Tensor,
    times: Tensor,
    *,
    noise: Tensor,
    gamma: float = 0.5,
    solver: str = "euler",
    rtol: float | None = None,
    atol: float | None = None,
    on_step: StepCallback | None = None,
) -> ODESolution:
    """The noise that a picture comes from, by controlled inversion (arXiv 2410.10792).

    The published model was not trained for it. Integrates `-v + γ (u* + v)` backwards from the
    picture, where `u* = (noise - x)/t` leads straight to the given noise.

    Args:
        field: Velocity, usually under no prompt.
        x_img: Latents, (B, C, h, w), float32 or float64; not modified.
        times: Increasing times, (T + 1,), as for sampling; walked through from the last to the
            first.
        noise: Typical noise of the same shape, towards which the inversion is drawn.
        gamma: In [0, 1]: 0 is the flow alone, 1 ends at `noise`.
        solver: As in `solve`; with gamma above 0 not one that evaluates at t = 0.
        rtol: Of an adaptive solver.
        atol: As `rtol`.
        on_step: Called after every step with (index, 1 - t, state).

    Returns:
        The noise, at the first time's noise level; its `times` are 1 - t.

    Raises:
        SettingsError: If gamma is out of its range, the shapes differ, or the solver does not fit.
    """
    check_share("gamma", gamma)
    _check_alike("noise", noise, x_img)

    def backward(x: Tensor, tau: Tensor) -> Tensor:
        t = 1 - tau
        drift = -field(x, t).to(x.dtype)
        if gamma == 0:
            return drift
        if t == 0:
            raise SettingsError(
                f"solver {solver!r} evaluates at t = 0, where the pull to the noise has no value; "
                "use euler or midpoint, or gamma=0"
            )
        return drift + gamma * ((noise - x) / t - drift)

    back = 1 - check_times(times).flip(0)
    return solve(backward, x_img, back, solver=solver, rtol=rtol, atol=atol, on_step=on_step)


def regenerate(
    field: Field,
    x_0: Tensor,
    x_img: Tensor,
    times: Tensor,
    *,
    eta: float = 0.9,
    stop: float = 0.25,
    solver: str = "euler",
    rtol: float | None = None,
    atol: float | None = None,
    on_step: StepCallback | None = None,
) -> ODESolution:
    """Samples from inverted noise, first held near the picture it came from (arXiv 2410.10792).

    The published model was not trained for it. Integrates `v + η ((x_img - x)/(1 - t) - v)` while
    `t < stop`, and `v` from there on.

    Args:
        field: Velocity under what the picture shall show.
        x_0: What `invert` gave, (B, C, h, w), float32 or float64; not modified.
        x_img: The picture's latents, of the same shape.
        times: Increasing times, (T + 1,).
        eta: In [0, 1]: 0 is plain sampling.
        stop: The time in [0, 1] up to which the picture pulls.
        solver: As in `solve`.
        rtol: Of an adaptive solver.
        atol: As `rtol`.
        on_step: Called after every step.

    Raises:
        SettingsError: If eta or stop is out of its range, or the shapes differ.
    """
    check_share("eta", eta)
    check_share("stop", stop)
    _check_alike("x_0", x_0, x_img)

    def held(x: Tensor, t: Tensor) -> Tensor:
        velocity = field(x, t).to(x.dtype)
        if t >= stop:
            return velocity
        return velocity + eta * ((x_img - x) / (1 - t) - velocity)

    return solve(held, x_0, times, solver=solver, rtol=rtol, atol=atol, on_step=on_step)


def reconstruction_error(x_img: Tensor, x: Tensor) -> Tensor:
    """How far inverting and sampling again missed the picture: `|x - x_img|/|x_img|`, (B,)."""
    return endpoint_error(x, x_img)


def check_n_avg(n_avg: int) -> None:
    """Refuses what is no number of noises to average over.

    Raises:
        SettingsError: If it is no whole number of at least 1.
    """
    if isinstance(n_avg, bool) or not isinstance(n_avg, int) or n_avg < 1:
        raise SettingsError(f"n_avg must be a whole number of at least 1, got {n_avg!r}")


def check_share(name: str, value: float) -> None:
    """Refuses what is no number in [0, 1].

    Raises:
        SettingsError: Naming the setting.
    """
    if isinstance(value, bool) or not (isinstance(value, int | float) and 0 <= value <= 1):
        raise SettingsError(f"{name} must be a number from 0 to 1, got {value!r}")


def _checked_strength(strength: float) -> float:
    if isinstance(strength, bool) or not (
        isinstance(strength, int | float) and math.isfinite(strength) and 0 < strength <= 1
    ):
        raise SettingsError(
            f"strength must be above 0 and at most 1 (1 = from noise alone), got {strength!r}"
        )
    return float(strength)


def _check_alike(name: str, given: Tensor, x_img: Tensor) -> None:
    if given.shape != x_img.shape:
        raise SettingsError(
            f"{name} has shape {tuple(given.shape)}; expected {tuple(x_img.shape)}, as the "
            "picture's latents have"
        )
