"""Fits the coefficients of a solver to a model's own fine solutions (arXiv 2403.01329).

The model stays as it is; what is trained are a few dozen numbers. They start as those of a known
solver and are moved until a handful of evaluations end where the many ones of `task: pairs` do.
Axes: B pairs, n evaluations, C latent channels, h w latent cells.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from janusflow.data.mixture import DataSettings, open_sources
from janusflow.data.samples import Sample
from janusflow.data.sources import Source
from janusflow.data.sources.pairs import PairsSource
from janusflow.data.stream import SampleStream
from janusflow.errors import SettingsError
from janusflow.files import write_json
from janusflow.flow.fitted_solver import FittedSolver
from janusflow.flow.guidance import Guidance, check_guidance_scale
from janusflow.flow.solvers import solve
from janusflow.flow.timesteps import time_grid
from janusflow.models.checkpoints import describe
from janusflow.models.guided_field import GuidedField
from janusflow.pipeline import JanusFlowPipeline
from janusflow.training.loop import LoopSettings, Objective


@dataclass(frozen=True)
class SolverSettings:
    """What is fitted, to what, and where it starts."""

    task: str = "solver"
    output_dir: str = "runs/solver"
    model: str = "tiny"
    data: DataSettings = field(default_factory=DataSettings)
    """Pairs that the model made by many evaluations, with the same guidance."""
    num_inference_steps: int = 6
    """Evaluations of the solver."""
    start: str = "unipc"
    """A solver of one evaluation a step, on a grid with `shift`, whose coefficients come first."""
    shift: float = 1.0
    guidance_scale: float | None = None
    """The model's own when not given."""
    batch_size: int = 32
    saturation: float = 0.02
    """A pair's mean squared error e counts as e / (e + saturation): pictures that come out as
    another one altogether, which no small change mends, do not outweigh all others."""
    loop: LoopSettings = field(default_factory=LoopSettings)

    def __post_init__(self) -> None:
        for name in ("num_inference_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is at least 1, not {getattr(self, name)}")
        if not self.saturation > 0:
            raise SettingsError(f"saturation is above 0, not {self.saturation}")


class SolverObjective(Objective):
    """Coefficients, and how far from the pairs' latents they end."""

    def __init__(self, settings: SolverSettings) -> None:
        super().__init__()
        self.settings = settings
        self._pipe = JanusFlowPipeline.from_pretrained(settings.model, vae=None)
        self._pipe.model.requires_grad_(False)
        scale = settings.guidance_scale
        if scale is None:
            scale = self._pipe.model.config.drawing_defaults_of("flow")["guidance_scale"]
        self._guidance = Guidance(check_guidance_scale(scale))
        self._pairs = _pairs(settings.data)
        self._rows: dict[int, SampleStream[Sample]] = {}
        self._kept: dict[int, Any] = {}
        times = time_grid(settings.num_inference_steps, shift=settings.shift)
        weights = coefficients_of(settings.start, times)
        self.log_gaps = nn.Parameter(times.diff().log().float())
        self.weights = nn.Parameter(weights.float())
        """Below the diagonal; on it is what the time of the state leaves."""

    def solver(self) -> FittedSolver:
        """With the present coefficients."""
        times = torch.cat([self.log_gaps.new_zeros(1), self.log_gaps.softmax(0).cumsum(0)])
        times = torch.cat([times[:-1], times.new_ones(1)])
        before = self.weights.tril(-1)
        return FittedSolver(times, before + torch.diag(times[1:] - before.sum(1)))

    # Data

    def batch(self, step: int, part: int = 0) -> dict[str, Tensor]:
        """Pairs of a part, from its stream; prompts as token ids (B, L) with their mask."""
        if part not in self._rows:
            loop = self.settings.loop
            self._rows[part] = SampleStream(self._pairs, {}, loop.seed, part, loop.microbatches)
            if part in self._kept:
                self._rows[part].load_state_dict(self._kept.pop(part))
        samples = [self._rows[part].next(step) for _ in range(self.settings.batch_size)]
        prompts = [sample.prompt for sample in samples]
        ids, mask = self._pipe.processor.generation_prompts(prompts, tag="flow")
        x_0, x_1 = zip(*(sample.ends for sample in samples if sample.ends), strict=True)
        return {"x_0": torch.cat(x_0), "x_1": torch.cat(x_1), "ids": ids, "mask": mask}

    def data_state(self) -> dict[int, Any]:
        """Of every stream that this process has read from."""
        return {part: stream.state_dict() for part, stream in self._rows.items()}

    def load_data_state(self, states: dict[int, Any]) -> None:
        """Streams are opened when they are first read from."""
        self._rows.clear()
        self._kept = dict(states)

    # Losses

    def forward(self, *, x_0: Tensor, x_1: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """How many pairs are missed, a near miss counting in part; see `saturation`."""
        model = self._pipe.model.to(x_0.device)  # it is no module of ours: nobody takes it along
        with torch.no_grad():
            prompts = model.encode_prompts("flow", ids, mask, guided=not self._guidance.off)
        field = GuidedField(model.velocity, prompts, self._guidance)
        solver = self.solver()
        ends = solver.run(field, x_0, solver.grid(time_grid(solver.steps)), lambda *step: step[2])
        errors = (ends - x_1).square().flatten(1).mean(1)
        return {"missed": (errors / (errors + self.settings.saturation)).mean()}

    # Hooks of the loop

    def work(self, batch: dict[str, Tensor]) -> dict[str, int]:
        """Pairs."""
        return {"images": len(batch["x_0"])}

    def sources(self) -> dict[str, str]:
        """The model, the data and where the coefficients start."""
        settings = self.settings
        return {
            "model": f"{settings.model}, weights {describe(settings.model).weights_hash[:12]}",
            "coefficients": f"{settings.start}, {settings.num_inference_steps} steps, "
            f"shift {settings.shift:g}, guidance {self._guidance.scale:g}",
            **{f"data {pairs.name}": f"{len(pairs):,} pairs" for pairs in self._pairs},
        }

    def export(self, folder: Path) -> None:
        """Writes `solver.json`, which `solver="fitted:…/solver.json"` draws with."""
        settings = self.settings
        fitted_to = {
            "model": settings.model,
            "weights_hash": describe(settings.model).weights_hash,
            "guidance_scale": self._guidance.scale,
        }
        write_json(folder / "solver.json", {"fitted_to": fitted_to, **self.solver().content()})


def coefficients_of(solver: str, times: Tensor) -> Tensor:
    """Weights (n, n) of all velocities in all states after the first, by a solver of any make.

    Args:
        solver: Of one evaluation a step, whose states are sums as in `FittedSolver`.
        times: Its grid, (n + 1,).

    Raises:
        SettingsError: If it is not of that kind.
    """
    num = len(times) - 1
    asked = 0

    def field(x: Tensor, t: Tensor) -> Tensor:  # the k-th velocity is the k-th unit vector
        nonlocal asked
        unit = torch.zeros_like(x)
        if asked < num:
            unit[:, asked] = 1
        asked += 1
        return unit

    start = torch.zeros(1, num, dtype=torch.float64)
    found = solve(field, start, times, solver=solver, return_trajectory=True)
    assert found.trajectory is not None
    if asked != num:
        raise SettingsError(
            f"start is {solver!r}, which made {asked} evaluations in {num} steps, not one in each; "
            "take euler, ab2, dpm++2m or unipc"
        )
    return torch.cat(list(found.trajectory[1:]))


def _pairs(data: DataSettings) -> list[Source]:
    sources = open_sources(data)
    if not all(isinstance(source, PairsSource) for source in sources):
        raise SettingsError(
            "a solver is fitted to pairs: make them with task pairs, and name their folder as a "
            "source of format pairs"
        )
    return sources
