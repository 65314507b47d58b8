"""What a few recorded runs of a model tell: straightness, guidance, resolution, precision.

All runs start from the same noise. One model is held at a time; what is kept of a run lies on the
CPU: three times the latents an evaluation, besides the latents at each step. Axes: T steps,
B pictures (one a prompt), S times that are shown, C latent channels, h w latent cells, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from janusflow.errors import SettingsError
from janusflow.evaluation.metrics import psnr
from janusflow.experiments.prompts import PromptSettings, load_prompts
from janusflow.flow.diagnostics import (
    Recorder,
    dtype_gap,
    endpoint_error,
    fitted_order,
    guidance_sensitivity,
)
from janusflow.flow.guidance import Guidance, check_guidance_scale
from janusflow.flow.noise import image_noise
from janusflow.flow.path import predicted_image
from janusflow.flow.solvers import ODESolution, Solver, make_solver, solve
from janusflow.flow.timesteps import time_grid
from janusflow.models.autoencoder import AutoencoderKL, decode
from janusflow.models.conversion import weights_hash
from janusflow.models.folders import resolve_model_folder
from janusflow.models.guided_field import GuidedField
from janusflow.pipeline import JanusFlowPipeline
from janusflow.requests import check_count
from janusflow.version import versions

if TYPE_CHECKING:
    import pandas as pd

DTYPES = ("float32", "bfloat16")
_SHOWN_TIMES = 6
_SHOWN_PICTURES = 4


@dataclass(frozen=True)
class DiagnoseSettings:
    """A diagnosis."""

    model: str = "tiny"
    vae: str = "default"
    """See `JanusFlowPipeline.from_pretrained`."""
    prompts: PromptSettings = field(default_factory=lambda: PromptSettings(num=8))
    """All are drawn at once; picture i has the noise of `prompts.seed` + i."""
    num_inference_steps: int = 30
    guidance_scale: float = 2.0
    solver: str = "euler"
    """Of the recorded run; a deterministic one that evaluates at the start of each step."""
    guidance_delta: float = 0.1
    """Difference of scales that the guidance sensitivity is measured over."""
    error_solvers: list[str] = field(
        default_factory=lambda: ["euler", "ab2", "midpoint", "heun", "rk4"]
    )
    """Solvers whose distance to the reference is measured."""
    error_evaluations: list[int] = field(default_factory=lambda: [4, 8, 16, 32, 64])
    """Evaluations that each of them may make; it takes as many steps as these allow."""
    reference_solver: str = "midpoint"
    reference_steps: int = 200
    bfloat16: bool = True
    """Whether the recorded run is compared between float32 and bfloat16."""
    dtype: str = "float32"
    """Of all runs but the reference, which is in float32."""
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_count("prompts.num", self.prompts.num)
        check_count("num_inference_steps", self.num_inference_steps)
        check_count("reference_steps", self.reference_steps)
        for count in self.error_evaluations:
            check_count("each of error_evaluations", count)
        delta = check_guidance_scale(self.guidance_delta)
        check_guidance_scale(self.guidance_scale + delta)
        if delta == 0:
            raise SettingsError("guidance_delta is 0; give a difference of guidance scales: 0.1")
        if self.dtype not in DTYPES:
            raise SettingsError(f"dtype is {self.dtype!r}; expected {' or '.join(DTYPES)}")
        _check_solver("solver", self.solver)
        if not self.error_solvers:
            raise SettingsError("error_solvers is empty; name at least one, such as euler")
        reference = _check_solver("reference_solver", self.reference_solver, counted=True)
        finest = self.reference_steps * (reference.evaluations_per_step or 0)
        for name in self.error_solvers:
            counts = [nfe for _, nfe in self.budgets(name)]
            if len(counts) < 2:
                raise SettingsError(
                    f"error_evaluations {self.error_evaluations} leave {name!r} {len(counts)} "
                    "number of steps; an order needs two or more, take 8, 16 and 32"
                )
            if counts[-1] >= finest:
                raise SettingsError(
                    f"the reference makes {finest} evaluations, no more than the {counts[-1]} of "
                    f"{name!r}; raise reference_steps or lower error_evaluations"
                )

    def budgets(self, solver: str) -> list[tuple[int, int]]:
        """Steps and evaluations of a solver, within each of `error_evaluations`, ascending."""
        each = _check_solver("error_solvers", solver, counted=True).evaluations_per_step or 1
        return [(n, n * each) for n in sorted({max(1, e // each) for e in self.error_evaluations})]


@dataclass(frozen=True)
class Diagnosis:
    """What came out.

    Attributes:
        steps: One row a picture and step: `PathDiagnostics.rows()`.
        pictures: One row a picture: prompt, seed, and what is known of its whole path.
        errors: One row a solver, number of steps and picture: distance to the reference, of the
            latents (relative) and of the pixels (PSNR, dB).
        precision: One row a picture and time: the relative gap of bfloat16 to float32; or None.
        summary: Medians and quartiles over pictures, fitted orders, settings, versions, weights.
        shown_times: The times that are shown, (S,).
        speed: At these, the norm over channels of the first picture's guided velocity, (S, h, w).
        previews: Predicted images at these, then the pictures drawn, uint8 (rows, S + 1, H, W, 3).
    """

    steps: pd.DataFrame
    pictures: pd.DataFrame
    errors: pd.DataFrame
    precision: pd.DataFrame | None
    summary: dict[str, Any]
    shown_times: list[float]
    speed: np.ndarray
    previews: np.ndarray


@torch.no_grad()
def diagnose(settings: DiagnoseSettings, *, progress: bool = False) -> Diagnosis:
    """Records, repeats and compares runs.

    Args:
        settings: What is diagnosed.
        progress: Show how many of the runs are done.

    Raises:
        SettingsError: If there are no prompts, the model has no flow head or no autoencoder, the
            solver does not evaluate at the start of each step, or a library is not installed.
        CheckpointError: If the model cannot be loaded.
    """
    missing = [name for name in ("jinja2", "matplotlib", "pandas") if find_spec(name) is None]
    if missing:
        raise SettingsError(f"this needs {', '.join(missing)}: pip install 'janusflow[eval]'")
    prompts, _ = load_prompts(settings.prompts)
    ends = sum(len(settings.budgets(solver)) for solver in settings.error_solvers)
    with tqdm(total=ends + 3 + settings.bfloat16, disable=not progress, unit="run") as bar:
        return _diagnose(settings, prompts, bar.update)


def _diagnose(
    settings: DiagnoseSettings, prompts: list[str], tick: Callable[[], object]
) -> Diagnosis:
    import pandas as pd

    own, scale = (settings.solver, settings.num_inference_steps), settings.guidance_scale
    fine = settings.reference_solver, settings.reference_steps
    bench = _Bench(settings, prompts, tick)
    vae = bench.pipe(settings.dtype).vae
    if vae is None:
        raise SettingsError(f"{settings.model} has no autoencoder to show its paths; give a vae")
    recorder = Recorder()
    guided = bench.field(settings.dtype, scale, recorder)
    run = bench.run(guided, *own)
    passes = guided.num_forward_passes
    del guided  # and with it, later, the model
    states, times = _path(run)
    path = recorder.diagnostics(states, times)
    stronger = bench.run(bench.field(settings.dtype, scale + settings.guidance_delta), *own)
    shown_times, speed, previews = _shown(bench.field(settings.dtype, scale), vae, run)
    ends = {
        (solver, steps): bench.run(bench.field(settings.dtype, scale), solver, steps, path=False)
        for solver in settings.error_solvers
        for steps, _ in settings.budgets(solver)
    }
    trajectories = {settings.dtype: states}
    for dtype in sorted(DTYPES, key=lambda dtype: dtype != settings.dtype):  # that at hand first
        if dtype == "float32":
            reference = bench.run(bench.field(dtype, scale), *fine, path=False).latents.cpu()
        if settings.bfloat16 and dtype not in trajectories:
            trajectories[dtype], _ = _path(bench.run(bench.field(dtype, scale), *own))
    pictures = pd.DataFrame(path.summary())
    pictures.insert(1, "prompt", prompts)
    pictures.insert(2, "seed", bench.seeds)
    pictures["guidance_sensitivity"] = guidance_sensitivity(
        run.latents, stronger.latents, settings.guidance_delta
    ).numpy()
    errors = pd.DataFrame(_error_rows(ends, reference, vae))
    precision = None
    if settings.bfloat16:
        gap = dtype_gap(trajectories["bfloat16"], trajectories["float32"])
        precision = pd.DataFrame(_precision_rows(gap, times))
    summary = {
        "straightness_of_all": path.mean_straightness,
        **{name: quartiles(pictures[name]) for name in pictures.columns[3:]},
        "nfe": run.nfe,
        "num_forward_passes": passes,
        "orders": _orders(errors),
        "bfloat16_gap_at_the_end": None if precision is None else quartiles(gap[-1].tolist()),
        "prompts": prompts,
        "seeds": bench.seeds,
        "settings": asdict(settings),
        "weights": weights_hash(resolve_model_folder(settings.model)),
        "versions": versions(),
    }
    return Diagnosis(
        pd.DataFrame(path.rows()),
        pictures,
        errors,
        precision,
        summary,
        shown_times,
        speed,
        previews,
    )


class _Bench:
    """Runs from the same noise, with the model of the dtype that was asked for last at hand."""

    def __init__(
        self, settings: DiagnoseSettings, prompts: list[str], tick: Callable[[], object]
    ) -> None:
        self._settings = settings
        self._texts = prompts
        self._tick = tick
        self._dtype = ""
        self._pipe: Any = None
        config = self.pipe(settings.dtype).model.flow_config
        shape = config.latent_channels, config.latent_size, config.latent_size
        self._noise, seeds = image_noise(len(prompts), shape, seed=settings.prompts.seed)
        self.seeds = list(seeds or ())

    def pipe(self, dtype: str) -> JanusFlowPipeline:
        """The pipeline, loaded if another was at hand."""
        if self._dtype != dtype:
            self._pipe = self._prompts = None  # before there is a second one
            self._pipe = JanusFlowPipeline.from_pretrained(
                self._settings.model,
                vae=self._settings.vae if dtype == self._settings.dtype else None,
                torch_dtype=getattr(torch, dtype),
                device=self._settings.device,
            )
            self._prompts = self._pipe.encode_prompts(self._texts, head="flow")
            self._dtype = dtype
        return self._pipe

    def field(self, dtype: str, scale: float, recorder: Recorder | None = None) -> GuidedField:
        """The guided velocity."""
        velocity = self.pipe(dtype).model.velocity
        assert self._prompts is not None
        return GuidedField(velocity, self._prompts, Guidance(scale), on_evaluation=recorder)

    def run(self, field: GuidedField, solver: str, steps: int, *, path: bool = True) -> ODESolution:
        """From the noise to pictures; without the path, their latents alone are kept."""
        x_0 = self._noise.to(self._settings.device)
        found = solve(field, x_0, time_grid(steps), solver=solver, return_trajectory=path)
        self._tick()
        return found


def _path(run: ODESolution) -> tuple[Tensor, Tensor]:
    """States (T + 1, B, C, h, w) and times (T + 1,)."""
    assert run.trajectory is not None
    assert run.times is not None
    return run.trajectory, run.times


def _shown(
    field: GuidedField, vae: AutoencoderKL, run: ODESolution
) -> tuple[list[float], np.ndarray, np.ndarray]:
    """Some times of a run, |v| at these by latent cell, and pictures; see `Diagnosis`."""
    states, times = _path(run)
    last = len(times) - 2
    chosen = sorted({round(i * last / (_SHOWN_TIMES - 1)) for i in range(_SHOWN_TIMES)})
    speed, foreseen = [], []
    for index in chosen:
        t, x_t = times[index], states[index].to(run.latents)
        velocity = field(x_t, t)
        speed.append(torch.linalg.vector_norm(velocity[0], dim=0).cpu().numpy())
        foreseen.append(predicted_image(x_t, velocity, t)[:_SHOWN_PICTURES])
    columns = [_pixels(vae, latents) for latents in [*foreseen, run.latents[:_SHOWN_PICTURES]]]
    pixels = np.round(255 * np.stack(columns, axis=1)).astype(np.uint8)
    return times[chosen].tolist(), np.stack(speed), pixels


def _error_rows(
    ends: dict[tuple[str, int], ODESolution], reference: Tensor, vae: AutoencoderKL
) -> list[dict[str, Any]]:
    right = _pixels(vae, reference.to(vae.device))
    return [
        {
            "solver": solver,
            "num_inference_steps": steps,
            "nfe": run.nfe,
            "sample": sample,
            "error": error,
            "psnr": decibels,
        }
        for (solver, steps), run in ends.items()
        for sample, (error, decibels) in enumerate(
            zip(
                endpoint_error(run.latents, reference).tolist(),
                psnr(_pixels(vae, run.latents), right).tolist(),
                strict=True,
            )
        )
    ]


def _precision_rows(gap: Tensor, times: Tensor) -> list[dict[str, Any]]:
    return [
        {"sample": sample, "t": t, "gap": value}
        for sample, column in enumerate(gap.T.tolist())
        for t, value in zip(times.tolist(), column, strict=True)
    ]


def _orders(errors: pd.DataFrame) -> dict[str, float]:
    """By solver, fitted through the medians over pictures at all its numbers of evaluations."""
    found = {}
    for solver, part in errors.groupby("solver", sort=False):
        medians = part.groupby("nfe")["error"].median()
        found[str(solver)] = fitted_order(medians.index.tolist(), medians.tolist())
    return found


def quartiles(values: Any) -> dict[str, float]:
    """Lower quartile, median and upper quartile of numbers."""
    lower, median, upper = np.quantile(np.asarray(values, float), (0.25, 0.5, 0.75)).tolist()
    return {"lower_quartile": lower, "median": median, "upper_quartile": upper}


def _pixels(vae: AutoencoderKL, latents: Tensor) -> np.ndarray:
    """Pictures in [0, 1], float32 (B, H, W, 3)."""
    return (decode(vae, latents) / 2 + 0.5).permute(0, 2, 3, 1).numpy()


def _check_solver(setting: str, name: str, *, counted: bool = False) -> Solver:
    solver = make_solver(name)
    if solver.adaptive or solver.draws_noise:
        raise SettingsError(
            f"{setting} names {name!r}, which {'draws noise' if solver.draws_noise else 'adapts'}; "
            "take one of fixed steps without noise, such as euler, midpoint or heun"
        )
    if counted and solver.evaluations_per_step is None:
        raise SettingsError(
            f"{setting} names {name!r}, whose evaluations are not the same in each step; take "
            "another, such as euler, midpoint or heun"
        )
    return solver
