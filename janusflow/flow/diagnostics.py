"""What a recorded run tells about a flow: how straight, how guided, how well resolved.

Takes tensors, gives float64 tensors on the CPU; draws nothing and knows nothing of models. A norm
`|·|` is the Euclidean one over all axes of a sample. Axes: T steps, B samples; all else is free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from janusflow.errors import SettingsError
from janusflow.flow.path import expand_like, predicted_image
from janusflow.flow.timesteps import check_times

_SAME_TIME = 1e-6  # diffusers' schedulers hold their times in float32


@dataclass(frozen=True)
class GuidanceDiagnostics:
    """What guidance does at each evaluation: float64, (T, B); NaN without an unconditional pass.

    Attributes:
        conditional_norm: `|v_c|`.
        unconditional_norm: `|v_u|`.
        guidance_gap: `|v_c - v_u| / |v_c|`.
        guidance_cosine: `cos(v_c, v_u)`.
    """

    conditional_norm: Tensor
    unconditional_norm: Tensor
    guidance_gap: Tensor
    guidance_cosine: Tensor


@dataclass(frozen=True)
class PathDiagnostics(GuidanceDiagnostics):
    """What a run tells at the start of each step, (T, B), and as a whole, (B,); float64.

    Attributes:
        t: Times of the steps' starts, (T,).
        velocity_norm: `|v|` of the velocity followed, guidance applied, (T, B).
        preview_error: `|x̂ - x_1|`, how far the preview is from where the run ended, (T, B).
        velocity_change: `|Δv / Δt|` to the next step, (T, B); NaN at the last.
        local_error: `h/2 |v_{n+1} - v_n|`, an Euler step's own error, (T, B); NaN at the last.
        chord: `|x_1 - x_0|`, (B,).
        straightness: See `straightness`, (B,).
        path_length_ratio: See `path_length_ratio`, (B,).
    """

    t: Tensor
    velocity_norm: Tensor
    preview_error: Tensor
    velocity_change: Tensor
    local_error: Tensor
    chord: Tensor
    straightness: Tensor
    path_length_ratio: Tensor

    @property
    def mean_straightness(self) -> float:
        """`S / E|x_1 - x_0|²` of the batch: straightness weighted by the squared chord."""
        weight = self.chord.square()
        return float((self.straightness * weight).sum() / weight.sum())

    def rows(self) -> list[dict[str, float]]:
        """One row a sample and step: sample, step, t, and each attribute known at steps."""
        columns = {name: value for name, value in vars(self).items() if value.ndim == 2}
        return _tidy("step", self.t, columns)

    def summary(self) -> list[dict[str, float]]:
        """One row a sample: sample, chord, straightness, path_length_ratio."""
        names = ("chord", "straightness", "path_length_ratio")
        return [
            {"sample": sample, **{name: getattr(self, name)[sample].item() for name in names}}
            for sample in range(len(self.chord))
        ]


@dataclass(frozen=True)
class _Evaluation:
    t: float
    velocity: Tensor
    v_cond: Tensor
    v_uncond: Tensor | None


class Recorder:
    """Keeps what each evaluation of a guided field was made of, for one run.

    Call it where the field has its parts; it gives the velocity back:
    `return recorder(t, guided, v_cond, v_uncond)`. Holds up to three times the state an evaluation,
    on the CPU, in the dtype given.
    """

    def __init__(self) -> None:
        self._evaluations: list[_Evaluation] = []

    def __call__(
        self,
        t: Tensor | float,
        velocity: Tensor,
        v_cond: Tensor | None = None,
        v_uncond: Tensor | None = None,
    ) -> Tensor:
        """Records one evaluation.

        Args:
            t: Its time.
            velocity: What the solver is given, (B, …).
            v_cond: Velocity under the prompt, (B, …); that same one when there is no guidance.
            v_uncond: Velocity without it, (B, …); none where guidance is off.

        Returns:
            The velocity, as it came.
        """
        kept = _copy(velocity)
        self._evaluations.append(
            _Evaluation(
                float(t),
                kept,
                kept if v_cond is None else _copy(v_cond),
                None if v_uncond is None else _copy(v_uncond),
            )
        )
        return velocity

    def rows(self) -> list[dict[str, float]]:
        """One row a sample and evaluation, those within steps too, with `GuidanceDiagnostics`."""
        if not self._evaluations:
            return []
        times = torch.tensor([one.t for one in self._evaluations], dtype=torch.float64)
        found = guidance_diagnostics(*_parts(self._evaluations))
        return _tidy("evaluation", times, vars(found))

    def diagnostics(self, trajectory: Tensor, times: Tensor) -> PathDiagnostics:
        """Of the run that was recorded, from what was evaluated at the start of each step.

        Args:
            trajectory: Its states, (T + 1, B, …).
            times: Its times, (T + 1,).

        Raises:
            SettingsError: If the solver did not evaluate at the start of some step.
        """
        starts = [self._last_at(t) for t in times[:-1].tolist()]
        velocity = torch.stack([one.velocity for one in starts])
        return path_diagnostics(trajectory, times, velocity, *_parts(starts))

    def _last_at(self, t: float) -> _Evaluation:
        # A solver may look ahead to a time (Heun); it comes to the state itself after that.
        for one in reversed(self._evaluations):
            if abs(one.t - t) < _SAME_TIME:
                return one
        raise SettingsError(
            f"none of {len(self._evaluations)} recorded evaluations is at t = {t:g}, the start of "
            "a step; record with a solver of fixed steps, such as euler, midpoint or heun, and a "
            "new Recorder for each run"
        )


def path_diagnostics(
    trajectory: Tensor,
    times: Tensor,
    velocity: Tensor,
    v_cond: Tensor | None = None,
    v_uncond: Tensor | None = None,
) -> PathDiagnostics:
    """All that a recorded run tells.

    Args:
        trajectory: States, (T + 1, B, …).
        times: Increasing times, (T + 1,).
        velocity: The velocity followed, guidance applied, at each step's start, (T, B, …).
        v_cond: Its conditional part, (T, B, …); the velocity itself when there is no guidance.
        v_uncond: Its unconditional part, (T, B, …), NaN where it was skipped; if there is one.

    Raises:
        SettingsError: If shapes do not fit, or `check_times` refuses the times.
    """
    trajectory, times = _checked_path(trajectory, times)
    parts = {"velocity": velocity, "v_cond": v_cond, "v_uncond": v_uncond}
    expected = (len(times) - 1, *trajectory.shape[1:])
    for name, part in parts.items():
        if part is not None and tuple(part.shape) != expected:
            raise SettingsError(
                f"{name} has shape {tuple(part.shape)}; expected {expected}, one velocity for each "
                "step's start"
            )
    v = _exact(velocity)
    h, jump = times.diff()[:-1, None], _norm(v.diff(dim=0))
    unknown = torch.full_like(v[:1].flatten(2)[..., 0], math.nan)
    return PathDiagnostics(
        **vars(guidance_diagnostics(velocity if v_cond is None else v_cond, v_uncond)),
        t=times[:-1],
        velocity_norm=_norm(v),
        preview_error=_norm(previews(trajectory, times, v) - trajectory[-1]),
        velocity_change=torch.cat([jump / h, unknown]),
        local_error=torch.cat([h / 2 * jump, unknown]),
        chord=_norm(trajectory[-1:] - trajectory[:1])[0],
        straightness=straightness(trajectory, times),
        path_length_ratio=path_length_ratio(trajectory),
    )


def guidance_diagnostics(v_cond: Tensor, v_uncond: Tensor | None) -> GuidanceDiagnostics:
    """Conditional against unconditional velocity, both (T, B, …), at each evaluation."""
    c = _exact(v_cond)
    u = torch.full_like(c, math.nan) if v_uncond is None else _exact(v_uncond)
    c_norm, u_norm = _norm(c), _norm(u)
    cosine = (c * u).flatten(2).sum(2) / (c_norm * u_norm)
    return GuidanceDiagnostics(c_norm, u_norm, _norm(c - u) / c_norm, cosine)


def previews(trajectory: Tensor, times: Tensor, velocity: Tensor) -> Tensor:
    """The image `x̂ = x_t + (1 - t) v` foreseen at each step's start, (T, B, …).

    Args:
        trajectory: States, (T + 1, B, …).
        times: (T + 1,).
        velocity: At each step's start, (T, B, …).
    """
    return predicted_image(trajectory[:-1], velocity, times[:-1])


def straightness(trajectory: Tensor, times: Tensor) -> Tensor:
    """`∫ |(x_1 - x_0) - v|² dt / |x_1 - x_0|²` (arXiv 2209.03003), float64 (B,); 0 is straight.

    `v` is what carried the state over each interval, Δx/Δt, whatever the solver. A part of a path
    (an edit's) is measured as if its own time ran from 0 to 1.

    Args:
        trajectory: States, (T + 1, B, …).
        times: Increasing times, (T + 1,).

    Raises:
        SettingsError: If the two do not fit, or `check_times` refuses the times.
    """
    trajectory, times = _checked_path(trajectory, times)
    chord = trajectory[-1:] - trajectory[:1]
    share = times.diff() / (times[-1] - times[0])
    bend = chord - trajectory.diff(dim=0) / expand_like(share, trajectory)
    return (share[:, None] * _norm(bend).square()).sum(0) / _norm(chord)[0].square()


def path_length_ratio(trajectory: Tensor) -> Tensor:
    """Length of the path (T + 1, B, …) over its chord, float64 (B,); 1 is straight."""
    trajectory = _exact(trajectory)
    return _norm(trajectory.diff(dim=0)).sum(0) / _norm(trajectory[-1:] - trajectory[:1])[0]


def endpoint_error(x: Tensor, reference: Tensor) -> Tensor:
    """`|x - reference| / |reference|` of each sample of (B, …), float64 (B,).

    Raises:
        SettingsError: If the shapes differ.
    """
    _check_same_shape(x, reference)
    return _relative_gap(x[None], reference[None])[0]


def dtype_gap(trajectory: Tensor, reference: Tensor) -> Tensor:
    """How a run in a lower precision leaves its reference: `|x_t - r_t| / |r_t|`, (T + 1, B).

    Args:
        trajectory: States of a run, in bfloat16 say, (T + 1, B, …).
        reference: The same run in float32, from the same noise.

    Raises:
        SettingsError: If the shapes or the noises differ.
    """
    _check_same_shape(trajectory, reference)
    gap = _relative_gap(trajectory, reference)
    if gap[0].max() > 0:
        raise SettingsError(
            "the two runs start from different noise; give both the same latents or seed"
        )
    return gap


def fitted_order(nfes: Sequence[float], errors: Sequence[float]) -> float:
    """The p that fits `error ∝ nfe^-p` best: minus the least-squares slope on log axes.

    Raises:
        SettingsError: If there are not at least two different counts, one error for each, all
            above 0.
    """
    n, e = (torch.as_tensor(values, dtype=torch.float64) for values in (nfes, errors))
    if n.shape != e.shape or len(set(n.tolist())) < 2 or not (min(n.min(), e.min()) > 0):
        raise SettingsError(
            f"an order needs errors above 0 at two or more counts; got {n.tolist()}, {e.tolist()}"
        )
    away = n.log() - n.log().mean()
    return float(-(away @ e.log()) / (away @ away))


def guidance_sensitivity(latents_a: Tensor, latents_b: Tensor, delta: float) -> Tensor:
    """`|x_1(w + δ) - x_1(w)| / |δ|` of runs from the same noise, float64 (B,).

    Args:
        latents_a: Ends at the guidance scale w, (B, …).
        latents_b: Ends at `w + delta`.
        delta: Difference of the scales.

    Raises:
        SettingsError: If delta is 0 or the shapes differ.
    """
    if delta == 0:
        raise SettingsError("delta is 0; give the difference of the two guidance scales")
    _check_same_shape(latents_a, latents_b)
    return _norm((_exact(latents_b) - _exact(latents_a))[None])[0] / abs(delta)


def _copy(x: Tensor) -> Tensor:
    return x.detach().to("cpu", copy=True)


def _exact(x: Tensor) -> Tensor:
    return x.detach().cpu().double()


def _norm(x: Tensor) -> Tensor:
    """Of (T, B, …): float64 (T, B)."""
    return torch.linalg.vector_norm(x.flatten(2), dim=2)


def _relative_gap(x: Tensor, reference: Tensor) -> Tensor:
    reference = _exact(reference)
    return _norm(_exact(x) - reference) / _norm(reference)


def _check_same_shape(x: Tensor, reference: Tensor) -> None:
    if x.shape != reference.shape:
        raise SettingsError(
            f"shapes {tuple(x.shape)} and {tuple(reference.shape)} differ; compare runs of the "
            "same samples at the same times"
        )


def _checked_path(trajectory: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    times = _exact(check_times(times))
    if len(trajectory) != len(times):
        raise SettingsError(
            f"{len(trajectory)} states and {len(times)} times; expected a state at each time, the "
            "first and the last too"
        )
    return _exact(trajectory), times


def _parts(evaluations: Sequence[_Evaluation]) -> tuple[Tensor, Tensor | None]:
    """Conditional and unconditional velocities, (T, B, …), NaN where the latter were skipped."""
    v_cond = torch.stack([one.v_cond for one in evaluations])
    if all(one.v_uncond is None for one in evaluations):
        return v_cond, None
    return v_cond, torch.stack(
        [
            torch.full_like(one.v_cond, math.nan) if one.v_uncond is None else one.v_uncond
            for one in evaluations
        ]
    )


def _tidy(counter: str, times: Tensor, columns: dict[str, Tensor]) -> list[dict[str, float]]:
    """Rows of columns (T, B), sample by sample."""
    lists = {name: column.tolist() for name, column in columns.items()}
    samples = next(iter(columns.values())).shape[1]
    return [
        {"sample": sample, counter: step, "t": t}
        | {name: values[step][sample] for name, values in lists.items()}
        for sample in range(samples)
        for step, t in enumerate(times.tolist())
    ]
