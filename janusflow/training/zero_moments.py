"""Moments of DeepSpeed's ZeRO 1, of which every process has a slice, as one optimizer has them."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch

_MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's, by PyTorch's names."""


class ZeroMoments:
    """What a checkpoint keeps of an optimizer, and gives back to it.

    DeepSpeed lays the weights of a group end to end; each process steps a slice of that and keeps
    the slice's moments. All processes have to call the methods.

    Args:
        optimizer: DeepSpeed's, of stage 1, over AdamW.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._groups = optimizer.bit16_groups
        self._slices = optimizer.single_partition_of_fp32_groups

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The weights by group, whole."""
        return [{"params": group} for group in self._groups]

    def state_dict(self) -> dict[str, Any]:
        """As that of a torch optimizer: moments of all weights, whole; none before any step."""
        from deepspeed.utils import safe_get_full_optimizer_state

        state: dict[int, dict[str, Any]] = {}
        for group, own in zip(self._groups, self._slices, strict=True):
            moments = self._optimizer.optimizer.state.get(own, {})
            for weight in group if moments else ():
                whole = {  # on the CPU: no device has room for all of them
                    name: safe_get_full_optimizer_state(weight, name).cpu() for name in _MOMENTS
                }
                state[len(state)] = {"step": moments["step"].clone(), **whole}
        return {"state": state, "param_groups": self.param_groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes moments of all weights, and the weights themselves as the model has them now."""
        from deepspeed.utils import (
            lazy_init_hp_params_optimizer_state,
            safe_set_full_optimizer_state,
        )

        self._optimizer.refresh_fp32_params()
        state = state_dict["state"]
        steps = torch.stack([torch.as_tensor(moments["step"]) for moments in state.values()])
        slices = self._optimizer.optimizer.state
        for group, own in zip(self._groups, self._slices, strict=True):
            slices[own] = {name: torch.zeros_like(own) for name in _MOMENTS}
            lazy_init_hp_params_optimizer_state(group, own, slices)
            slices[own]["step"] = steps.max().to(own.device)
        for number, weight in enumerate(chain(*self._groups)):
            for name in _MOMENTS if number in state else ():
                safe_set_full_optimizer_state(weight, state[number][name].to(weight.device), name)
