"""Flow schedulers of diffusers as solvers.

There the noise level `sigma = 1 - t` falls and the network gives `dx/dsigma = -velocity`; with
`invert_sigmas` sigma is t and the network gives the velocity. Most schedulers compute in float32
whatever the state is. Axes: B batch; all else is free.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor

from janusflow.errors import SettingsError
from janusflow.flow.ode import Field, Solver, Visit

_LARGEST_GAP = 0.01  # between noise and the first time of schedulers that start a little after it


class DiffusersSolver(Solver):
    """Steps a copy of a scheduler; the object itself stays as it is.

    A scheduler that takes sigmas gets the run's grid, and does to it what its config says (shift,
    …). Any other, and one set to Karras, exponential or beta sigmas, has a grid of its own, from
    noise to image: of the run's grid only the number of steps counts. Those that stop short of the
    image (DEIS and SA-Solver with flow sigmas) are refused. A replaced state makes multistep
    schedulers start again.
    """

    def __init__(self, scheduler: Any) -> None:
        """Takes a scheduler.

        Raises:
            SettingsError: If it is none, or none of flows.
        """
        _check_flow(scheduler)
        self._original = scheduler
        self._name = type(scheduler).__name__
        self._inverted = bool(scheduler.config.get("invert_sigmas"))
        self.draws_noise = _draws_noise(scheduler)
        if self.draws_noise and self._inverted:
            raise SettingsError(
                f"{self._name} takes its noise for the image when invert_sigmas and stochastic "
                "sampling meet; leave invert_sigmas out"
            )

    def grid(self, times: Tensor) -> Tensor:
        """See `Solver.grid`.

        Raises:
            SettingsError: If the scheduler does not go from the first time to 1.
        """
        # A copy, not from_config, which would lose what set_shift and the like have set.
        scheduler = self._scheduler = copy.deepcopy(self._original)
        if _takes_sigmas(scheduler):
            scheduler.set_timesteps(sigmas=(1 - times[:-1]).cpu().numpy())
        else:
            scheduler.set_timesteps(len(times) - 1)
        sigmas = scheduler.sigmas.to(times)
        self._times = sigmas if self._inverted else 1 - sigmas
        found = torch.unique_consecutive(self._times)
        start_fits = (found[0] - times[0]).abs() <= _LARGEST_GAP
        if not (start_fits and found[-1] == 1 == times[-1] and (found.diff() > 0).all()):
            raise SettingsError(
                f"{self._name} steps from t = {found[0]:.3g} to {found[-1]:.3g} here, and the run "
                f"is from {times[0]:.3g} to {times[-1]:.3g}; expected the same and an end at 1: "
                'set shift=1, use_karras_sigmas=False (and the like), final_sigmas_type="zero", '
                "or take a solver by name"
            )
        scheduler.set_begin_index(0)  # timesteps are rounded, and may name no single step
        return found

    def run(self, field: Field, x: Tensor, times: Tensor, visit: Visit) -> Tensor:
        """See `Solver.run`."""
        scheduler, own = self._scheduler, self._times
        sign = 1 if self._inverted else -1
        noise = {"generator": list(self.generators)} if self.draws_noise else {}
        index = 0
        for step, timestep in enumerate(scheduler.timesteps):
            velocity = field(x, own[step])
            x = scheduler.step(sign * velocity, timestep, x, return_dict=False, **noise)[0]
            if step + 2 < len(own) and own[step + 2] == own[step + 1]:
                continue  # Heun's predictor: the same time comes again, corrected
            reached = x
            x = visit(index, times[index + 1], reached)
            index += 1
            if x is not reached:
                for name, fresh in (("lower_order_nums", 0), ("last_sample", None)):
                    if hasattr(scheduler, name):
                        setattr(scheduler, name, fresh)
        return x


class UniPC(DiffusersSolver):
    """diffusers' UniPC (arXiv 2302.04867) of order 2 on the straight path."""

    order = 2
    evaluations_per_step = 1

    def __init__(self) -> None:
        from diffusers.schedulers import UniPCMultistepScheduler  # seconds

        super().__init__(
            UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        )


def _check_flow(scheduler: Any) -> None:
    expected = (
        "expected a FlowMatch… scheduler, or one with use_flow_sigmas=True and "
        'prediction_type="flow_prediction" (UniPC, DPM-Solver)'
    )
    if isinstance(scheduler, type):
        raise SettingsError(f"solver is the class {scheduler.__name__}; pass an object of it")
    config: Any = getattr(getattr(scheduler, "config", None), "get", None)
    if config is None or not hasattr(scheduler, "set_timesteps"):
        raise SettingsError(f"solver must be a name or a scheduler of diffusers, got {scheduler!r}")
    named = any(base.__name__.startswith("FlowMatch") for base in type(scheduler).__mro__)
    told = config("use_flow_sigmas") and config("prediction_type") == "flow_prediction"
    if not (named or told):
        raise SettingsError(f"{type(scheduler).__name__} is no flow scheduler; {expected}")
    if config("use_dynamic_shifting"):
        raise SettingsError(
            f"{type(scheduler).__name__} has use_dynamic_shifting, which shifts by the size of the "
            "image in ways of each model; set it to False, and shift to a number"
        )


def _draws_noise(scheduler: Any) -> bool:
    config = scheduler.config
    return (
        bool(config.get("stochastic_sampling"))
        or str(config.get("algorithm_type")).startswith("sde-")
        or type(scheduler).__name__ == "FlowMatchLCMScheduler"
    )


def _takes_sigmas(scheduler: Any) -> bool:
    own = any(
        scheduler.config.get(f"use_{kind}_sigmas") for kind in ("karras", "exponential", "beta")
    )
    return not own and "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
