"""What a sweep draws: the cells of a grid or random design.

A cell is one way of drawing, a setting that has no effect in it being None: cells that cannot
differ are one. Of models, configs alone are read, and those where a setting is the model's own.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, cached_property
from itertools import product
from typing import Any

import numpy as np
import torch

from janusflow.errors import SettingsError
from janusflow.experiments.sweep_settings import (
    DTYPES,
    Axes,
    RandomSettings,
    ReferenceSettings,
    SweepSettings,
)
from janusflow.flow.guidance import Guidance, check_guidance_scale
from janusflow.flow.solvers import make_solver, solve
from janusflow.flow.timesteps import time_grid
from janusflow.models.configuration import DRAWING_DEFAULTS
from janusflow.models.folders import resolve_model_folder
from janusflow.models.layouts import load_config, model_folder
from janusflow.models.token_sampling import token_choice

_NUMBERS = ("guidance_scale", "guidance_rescale", "shift", "rtol", "temperature", "top_p")
_WHOLE_NUMBERS = ("num_inference_steps", "zero_init_steps", "top_k")
DefaultsOf = Callable[[str, str], dict[str, Any]]
"""What a model draws with, by head, where nothing else is asked for."""


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
    zero_init_steps: int | None
    solver: str | None
    shift: float | None
    rtol: float | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int

    @cached_property
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
                "top_k": self.top_k,
                "top_p": self.top_p,
            }
        return {
            "head": self.head,
            "guidance": self.guidance(),
            "num_inference_steps": self.num_inference_steps,
            "solver": self.solver,
            "shift": self.shift,
            "rtol": self.rtol,
            "atol": self.rtol,
        }

    def guidance(self) -> Guidance:
        """Of the flow head."""
        assert self.zero_init_steps is not None
        if self.guidance_scale == 1.0:
            return Guidance(1.0, zero_init_steps=self.zero_init_steps)
        assert self.guidance_interval is not None
        assert self.guidance_method is not None
        assert self.guidance_rescale is not None
        return Guidance(
            scale=self.guidance_scale,
            interval=self.guidance_interval,
            method=self.guidance_method,
            zero_init_steps=self.zero_init_steps,
            rescale=self.guidance_rescale,
        )

    def reference(self, settings: ReferenceSettings) -> Cell | None:
        """The fine solution of the same equation; None for the VQ head, which has none."""
        if self.head != "flow":
            return None
        fine = make_solver(settings.solver)
        return replace(
            self,
            **asdict(settings),
            zero_init_steps=0,
            shift=1.0,
            rtol=fine.rtol if fine.adaptive else None,
        )

    def check(self) -> None:
        """Refuses what the pipeline would refuse in the middle of the work.

        Raises:
            SettingsError: Naming the setting.
        """
        if self.dtype not in DTYPES:
            raise SettingsError(f"dtype is {self.dtype!r}; expected {', '.join(DTYPES)}")
        if self.seed < 0:
            raise SettingsError(f"seed is at least 0, not {self.seed}")
        if self.head == "vq":
            check_guidance_scale(self.guidance_scale)
            assert self.temperature is not None
            token_choice(self.temperature, self.top_k, self.top_p, torch.Generator(), 1)
            return
        assert self.solver is not None
        assert self.num_inference_steps is not None
        assert self.shift is not None
        make_solver(self.solver).grid(time_grid(self.num_inference_steps, shift=self.shift))
        self.guidance()
        if self.rtol is not None:  # solving what stands still checks the tolerances
            solve(
                lambda x, t: torch.zeros_like(x),
                torch.zeros(1, 1),
                [0.0, 1.0],
                solver=self.solver,
                rtol=self.rtol,
                atol=self.rtol,
            )


def cells(settings: SweepSettings) -> list[Cell]:
    """All cells, each once, in the order of the design; checked.

    Raises:
        SettingsError: If an axis has no value, a value cannot be had, or there are fewer different
            cells than a random design asks for.
        CheckpointError: If the config of a model is asked for what it draws with, and not there.
    """
    values, defaults = _values(settings.axes), cache(drawing_defaults)
    if settings.design == "grid":
        rows = (dict(zip(values, row, strict=True)) for row in product(*values.values()))
        found = list(dict.fromkeys(cell for row in rows if (cell := _cell(defaults, **row))))
    else:
        found = _drawn(values, settings.random, defaults)
    if not found:
        raise SettingsError("axes.nfe goes into whole steps of none of axes.solver")
    for cell in found:
        cell.check()
        fine = cell.reference(settings.reference)
        if fine is not None:
            fine.check()
    return found


def drawing_defaults(model: str, head: str) -> dict[str, Any]:
    """What a model draws with where nothing else is asked for, by its config.

    Raises:
        CheckpointError: If there is no such model.
        SettingsError: If it does not hold the head.
    """
    config = load_config(model_folder(resolve_model_folder(model)))
    if head not in config.generation_heads:
        held = ", ".join(config.generation_heads) or "none"
        raise SettingsError(f"{model} has no generation head {head!r}; it holds: {held}")
    return config.drawing_defaults_of(head)


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
    defaults: DefaultsOf,
    *,
    model: str,
    dtype: str,
    head: str,
    guidance_scale: float | None,
    guidance_interval: list[float],
    guidance_method: str,
    guidance_rescale: float,
    zero_init_steps: int,
    solver: str,
    shift: float,
    rtol: float | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    num_inference_steps: int | None = None,
    nfe: int | None = None,
) -> Cell | None:
    """A cell without the settings that have no effect; None where `nfe` is no whole steps."""
    if head not in DRAWING_DEFAULTS:
        raise SettingsError(
            f"head is {head!r}; expected {' or '.join(map(repr, DRAWING_DEFAULTS))}"
        )

    def own(name: str, given: Any) -> Any:
        return defaults(model, head)[name] if given is None else given

    scale = own("guidance_scale", guidance_scale)
    shared = {"model": model, "dtype": dtype, "head": head, "guidance_scale": scale, "seed": seed}
    nothing = dict.fromkeys(field.name for field in fields(Cell))
    if head == "vq":
        chosen: dict[str, Any] = {"temperature": own("temperature", temperature)}
        if chosen["temperature"] != 0:
            chosen |= {"top_k": own("top_k", top_k), "top_p": own("top_p", top_p)}
        return Cell(**{**nothing, **shared, **chosen})
    if nfe is not None:
        num_inference_steps = _steps_of(nfe, solver)
        if num_inference_steps is None:
            return None
    stepper, guided = make_solver(solver), scale != 1.0
    if stepper.adaptive:
        rtol = stepper.rtol if rtol is None else rtol
    chosen = {
        "num_inference_steps": num_inference_steps,
        "guidance_interval": tuple(guidance_interval) if guided else None,
        "guidance_method": guidance_method if guided else None,
        "guidance_rescale": guidance_rescale if guided else None,
        "zero_init_steps": zero_init_steps,
        "solver": solver,
        "shift": shift,
        "rtol": rtol if stepper.adaptive else None,
    }
    return Cell(**{**nothing, **shared, **chosen})


def _drawn(
    values: dict[str, list[Any]], random: RandomSettings, defaults: DefaultsOf
) -> list[Cell]:
    """Different cells drawn at random."""
    _check_ranges(random, [*values])
    found: dict[Cell, None] = {}
    draws = _draws(values, random)
    for _ in range(100 * random.num_cells):
        cell = _cell(defaults, **next(draws))
        if cell is not None:
            found[cell] = None
        if len(found) == random.num_cells:
            return list(found)
    raise SettingsError(
        f"random.num_cells is {random.num_cells}, but only {len(found)} different cells were found "
        "in 100 times as many draws; ask for fewer or widen the axes"
    )


def _check_ranges(random: RandomSettings, axes: Sequence[str]) -> None:
    numbers = {*_NUMBERS, *_WHOLE_NUMBERS} & {*axes}
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
            drawn[name] = round(value) if name in _WHOLE_NUMBERS else float(f"{value:.4g}")
        yield drawn
