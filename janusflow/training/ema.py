"""Exponential moving average of the trainable weights, in float32 on the weights' device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class EMA:
    """Keeps `average = decay * average + (1 - decay) * weight` for every trainable weight.

    Early on the decay is held at (1 + n) / (10 + n) after n updates, so that the random start is
    forgotten quickly.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.averages = {
            name: weight.detach().float().clone()
            for name, weight in model.named_parameters()
            if weight.requires_grad
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the averages towards the model's present weights."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        weights = dict(model.named_parameters())
        torch._foreach_lerp_(
            list(self.averages.values()),
            [weights[name].detach().float() for name in self.averages],
            1 - decay,
        )

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Lends the averages to the model inside the block."""
        weights = {n: w for n, w in model.named_parameters() if n in self.averages}
        kept = {name: weight.detach().clone() for name, weight in weights.items()}
        try:
            self._copy(self.averages, weights)
            yield
        finally:
            self._copy(kept, weights)

    @staticmethod
    @torch.no_grad()
    def _copy(source: dict[str, torch.Tensor], target: dict[str, nn.Parameter]) -> None:
        for name, weight in target.items():
            weight.copy_(source[name])
