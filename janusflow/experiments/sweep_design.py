"""What a sweep draws: its settings, and the cells of a grid or random design.

A cell is one way of drawing, a setting that has no effect in it being None: cells that cannot
differ are one. Knows no model.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from typing import Any

import numpy as np
import torch

from janusflow.errors import SettingsError
from janusflow.experiments.prompts import PromptSettings
from janusflow.flow.guidance import Guidance, check_guidance_scale
from janusflow.flow.solvers import make_solver
from janusflow.flow.timesteps import time_grid
from janusflow.models.configuration import DRAWING_DEFAULTS
from janusflow.models.token_sampling import token_choice

_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Axes:
    """Values of each setting; a grid has all their combinations."""

    model: list[str] = field(default_factory=lambda: ["tiny"])
    """Checkpoints: folders, hub ids or "tiny"."""
    dtype: list[str] = field(default_factory=lambda: ["float32"])
    head: list[str] = field(default_factory=lambda: ["flow"])
    num_inference_steps: list[int] = field(default_factory=lambda: [30])
    nfe: list[int] | None = None
    """Evaluations, instead of `num_inference_steps`: each solver takes the steps that need so many,
    and is left out where that is no whole number."""
    guidance_scale: list[float | None] = field(default_factory=lambda: [None])
    """1.0 = off; null for the head's published weight."""
    guidance_interval: list[list[float]] = field(default_factory=lambda: [[0.0, 1.0]])
    """First and last time with guidance, 0 = noise and 1 = image."""
    guidance_method: list[str] = field(default_factory=lambda: ["cfg"])
    guidance_rescale: list[float] = field(default_factory=lambda: [0.0])
    solver: list[str] = field(default_factory=lambda: ["euler"])
    shift: list[float] = field(default_factory=lambda: [1.0])
    temperature: list[float] = field(default_factory=lambda: [1.0])
    """Of the VQ head."""
    seed: list[int] = field(default_factory=lambda: [0])
    """Picture i has the noise of seed + i in every cell of a seed; for noise that is nowhere the
    same, keep seeds as far apart as there are pictures."""


@dataclass(frozen=True)
class RandomSettings:
    """Of the design "random": an axis not named here is drawn from its values."""

    num_cells: int = 50
    seed: int = 0
    uniform: dict[str, list[float]] = field(default_factory=dict)
    """Least and greatest value by axis."""
    log_uniform: dict[str, list[float]] = field(default_factory=dict)
    """The same, for values whose ratios count."""


@dataclass(frozen=True)
class ReferenceSettings:
    """The fine solution that `error` and `psnr` compare with: same prompt, noise and guidance."""

    solver: str = "midpoint"
    num_inference_steps: int = 100
    dtype: str = "float32"


@dataclass(frozen=True)
class SweepSettings:
    """A sweep."""

    design: str = "grid"
    """"grid" or "random"."""
    axes: Axes = field(default_factory=Axes)
    random: RandomSettings = field(default_factory=RandomSettings)
    prompts: PromptSettings = field(default_factory=lambda: PromptSettings(num=20))
    images_per_prompt: int = 1
    reference: ReferenceSettings = field(default_factory=ReferenceSettings)
    metrics: list[str] = field(default_factory=lambda: ["shapes", "error", "psnr"])
    """See `janusflow.experiments.sweep_metrics`."""
    vae: str = "default"
    """Autoencoder of all models; see `JanusFlowPipeline.from_pretrained`."""
    batch_size: int = 20
    """Pictures at once; part of the settings, since rounding may depend on it."""
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.design not in ("grid", "random"):
            raise SettingsError(f"design is {self.design!r}; expected 'grid' or 'random'")
        for name in ("images_per_prompt", "batch_size"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is at least 1, not {getattr(self, name)}")
        if self.prompts.num < 1 or self.random.num_cells < 1:
            raise SettingsError("prompts.num and random.num_cells are at least 1")
        if self.reference.dtype not in _DTYPES:
            raise SettingsError(f"reference.dtype is one of {', '.join(_DTYPES)}")


@dataclass(frozen=True)
class Cell:
    """One way of drawing; the settings of `Axes`, None where one has no effect."""

    model: str
    dtype: str
    head: str
    num_inference_steps: int | None
    guidance_scale: float
    guidance_interval: tuple[float, float] | None
    guidance_method: str | None
    guidance_rescale: float | None
    solver: str | None
    shift: float | None
    temperature: float | None
    seed: int

    @property
    def id(self) -> str:
        """Of the settings and nothing else."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]

    def options(self) -> dict[str, Any]:
        """Arguments of the pipeline's call."""
        if self.head == "vq":
            return {
                "head": self.head,
                "guidance_scale": self.guidance_scale,
                "temperature": self.temperature,
            }
        return {
            "head": self.head,
            "guidance": self.guidance(),
            "num_inference_steps": self.num_inference_steps,
            "solver": self.solver,
            "shift": self.shift,
        }

    def guidance(self) -> Guidance:
        """Of the flow head."""
        if self.guidance_scale == 1.0:
            return Guidance(1.0)
        assert self.guidance_interval is not None
        assert self.guidance_method is not None
        assert self.guidance_rescale is not None
        return Guidance(
            scale=self.guidance_scale,
            interval=self.guidance_interval,
            method=self.guidance_method,
            rescale=self.guidance_rescale,
        )

    def reference(self, settings: ReferenceSettings) -> Cell | None:
        """The fine solution of the same equation; None for the VQ head, which has none."""
        if self.head != "flow":
            return None
        return replace(self, **asdict(settings), shift=1.0)

    def check(self) -> None:
        """Refuses what the pipeline would refuse in the middle of the work.

        Raises:
            SettingsError: Naming the setting.
        """
        if self.dtype not in _DTYPES:
            raise SettingsError(f"dtype is {self.dtype!r}; expected {', '.join(_DTYPES)}")
        if self.head not in DRAWING_DEFAULTS:
            raise SettingsError(f"head is {self.head!r}; expected 'flow' or 'vq'")
        if self.seed < 0:
            raise SettingsError(f"seed is at least 0, not {self.seed}")
        if self.head == "vq":
            check_guidance_scale(self.guidance_scale)
            assert self.temperature is not None
            token_choice(self.temperature, None, None, torch.Generator(), 1)
            return
        assert self.solver is not None
        assert self.num_inference_steps is not None
        assert self.shift is not None
        make_solver(self.solver).grid(time_grid(self.num_inference_steps, shift=self.shift))
        self.guidance()


def cells(settings: SweepSettings) -> list[Cell]:
    """All cells, each once, in the order of the design; checked.

    Raises:
        SettingsError: If an axis has no value, a value cannot be had, or there are fewer different
            cells than a random design asks for.
    """
    values = _values(settings.axes)
    if settings.design == "grid":
        combinations = (dict(zip(values, row, strict=True)) for row in product(*values.values()))
        found = list(dict.fromkeys(cell for row in combinations if (cell := _cell(**row))))
    else:
        found = _drawn(values, settings.random)
    if not found:
        raise SettingsError("axes.nfe goes into whole steps of none of axes.solver")
    for cell in found:
        cell.check()
        fine = cell.reference(settings.reference)
        if fine is not None:
            fine.check()
    return found


def _values(axes: Axes) -> dict[str, list[Any]]:
    """Values by axis; either the steps or the evaluations are among them."""
    values = {axis.name: getattr(axes, axis.name) for axis in fields(axes)}
    if axes.nfe is None:
        del values["nfe"]
    elif axes.num_inference_steps != Axes().num_inference_steps:
        raise SettingsError("axes.nfe and axes.num_inference_steps both say the steps; keep one")
    else:
        del values["num_inference_steps"]
    for name, given in values.items():
        if not given:
            raise SettingsError(f"axes.{name} names at least one value")
    return values


def _steps_of(nfe: int, solver: str) -> int | None:
    """Steps of so many evaluations; None where they are no whole number."""
    each = make_solver(solver).evaluations_per_step
    if each is None:
        raise SettingsError(
            f"solver {solver!r} chooses its evaluations itself; give axes.num_inference_steps "
            "instead of axes.nfe"
        )
    return None if nfe % each else nfe // each


def _cell(
    *,
    model: str,
    dtype: str,
    head: str,
    guidance_scale: float | None,
    guidance_interval: list[float],
    guidance_method: str,
    guidance_rescale: float,
    solver: str,
    shift: float,
    temperature: float,
    seed: int,
    num_inference_steps: int | None = None,
    nfe: int | None = None,
) -> Cell | None:
    """A cell without the settings that have no effect; None where `nfe` is no whole steps."""
    if nfe is not None and head == "flow":
        num_inference_steps = _steps_of(nfe, solver)
        if num_inference_steps is None:
            return None
    published = DRAWING_DEFAULTS.get(head, {}).get("guidance_scale")
    scale = published if guidance_scale is None else guidance_scale
    flow, guided = head == "flow", head == "flow" and scale != 1.0
    return Cell(
        model=model,
        dtype=dtype,
        head=head,
        num_inference_steps=num_inference_steps if flow else None,
        guidance_scale=1.0 if scale is None else scale,
        guidance_interval=tuple(guidance_interval) if guided else None,  # type: ignore[arg-type]
        guidance_method=guidance_method if guided else None,
        guidance_rescale=guidance_rescale if guided else None,
        solver=solver if flow else None,
        shift=shift if flow else None,
        temperature=None if flow else temperature,
        seed=seed,
    )


def _drawn(values: dict[str, list[Any]], random: RandomSettings) -> list[Cell]:
    """Different cells drawn at random."""
    _check_ranges(random, [*values])
    found: dict[Cell, None] = {}
    draws = _draws(values, random)
    for _ in range(100 * random.num_cells):
        cell = _cell(**next(draws))
        if cell is not None:
            found[cell] = None
        if len(found) == random.num_cells:
            return list(found)
    raise SettingsError(
        f"random.num_cells is {random.num_cells}, but only {len(found)} different cells were found "
        "in 100 times as many draws; ask for fewer or widen the axes"
    )


def _check_ranges(random: RandomSettings, axes: Sequence[str]) -> None:
    numbers = {"num_inference_steps", "guidance_scale", "guidance_rescale", "shift", "temperature"}
    numbers &= {*axes}
    both = {*random.uniform} & {*random.log_uniform}
    if both:
        raise SettingsError(f"random.uniform and random.log_uniform both name {sorted(both)}")
    for kind in ("uniform", "log_uniform"):
        for name, ends in getattr(random, kind).items():
            if name not in numbers:
                raise SettingsError(
                    f"random.{kind} has {name!r}; ranges are of {', '.join(sorted(numbers))}"
                )
            lowest = 0 if kind == "log_uniform" else -math.inf
            if len(ends) != 2 or not lowest < ends[0] < ends[1] < math.inf:
                raise SettingsError(
                    f"random.{kind}.{name} is {ends}; expected two numbers, the least first"
                    + (" and above 0" if kind == "log_uniform" else "")
                )


def _draws(values: dict[str, list[Any]], random: RandomSettings) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(random.seed)
    while True:
        drawn: dict[str, Any] = {}
        for name, choices in values.items():
            if name in random.uniform:
                low, high = random.uniform[name]
                value = rng.uniform(low, high)
            elif name in random.log_uniform:
                low, high = map(math.log, random.log_uniform[name])
                value = math.exp(rng.uniform(low, high))
            else:
                drawn[name] = choices[rng.integers(len(choices))]
                continue
            drawn[name] = round(value) if name == "num_inference_steps" else float(f"{value:.4g}")
        yield drawn
