"""Exponential moving average of the trainable weights, in float32.

Averages lie beside the weights, or on the CPU where the device has no room for them; of weights
in shards, each process averages its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from janusflow.errors import SettingsError
from janusflow.training.processes import laid_out_like, local


class EMA:
    """Keeps `average = decay * average + (1 - decay) * weight` for every trainable weight.

    Early on the decay is held at (1 + n) / (10 + n) after n updates, so that the random start is
    forgotten quickly.

    Args:
        model: Weights to follow.
        decay: In [0, 1).
        device: Where the averages lie; beside the weights when not given.

    Raises:
        SettingsError: If a trainable weight is not float32: steps as small as training's get lost
            in the rounding of fewer bits, and so do averages.
    """

    def __init__(self, model: nn.Module, decay: float, device: str | None = None) -> None:
        self.decay = decay
        self.num_updates = 0
        self.averages: dict[str, Tensor] = {}
        for name, weight in model.named_parameters():
            if not weight.requires_grad:
                continue
            if weight.dtype != torch.float32:
                raise SettingsError(
                    f"{name} is to be trained in {weight.dtype}; trainable weights have to be "
                    "float32 (loop.precision bf16 still computes in bfloat16)"
                )
            self.averages[name] = local(weight.detach()).clone().to(device)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the averages towards the model's present weights."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        weights = self._weights(model)
        torch._foreach_lerp_(
            list(self.averages.values()),
            [weights[name].to(average.device) for name, average in self.averages.items()],
            1 - decay,
        )

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Lends the averages to the model inside the block, which keeps its weights meanwhile."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    def load(self, model: nn.Module, averages: dict[str, Tensor], num_updates: int) -> None:
        """Takes whole averages by name, and how often they were updated."""
        weights = dict(model.named_parameters())
        for name, average in self.averages.items():
            average.copy_(local(laid_out_like(averages[name], weights[name])))
        self.num_updates = num_updates

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        weights = self._weights(model)
        for name, average in self.averages.items():
            kept = weights[name].clone()
            weights[name].copy_(average)
            average.copy_(kept)

    def _weights(self, model: nn.Module) -> dict[str, Tensor]:
        weights = dict(model.named_parameters())
        return {name: local(weights[name].detach()) for name in self.averages}
