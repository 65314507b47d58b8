"""Optimizers and the learning-rate schedule.

Muon (https://kellerjordan.github.io/posts/muon) steps the matrices inside the layers and, where it
is asked for, the kernels of convolutions; embeddings, heads, norms and biases always take AdamW.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from janusflow.errors import SettingsError
from janusflow.training.muon import Muon


@dataclass(frozen=True)
class OptimizerSettings:
    """How weights are stepped."""

    name: str = "adamw"
    """"adamw", or "muon" for the layers' matrices with AdamW for all else."""
    kernels: bool = False
    """Whether Muon steps convolutions too; depthwise ones, and a network's first and last, which
    see pixels, stay with AdamW."""
    learning_rate: float = 1e-4
    """Peak rate; Muon's updates are scaled to the size of AdamW's, so both share it."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.0
    warmup_steps: int = 0
    """Steps of linear rise to the peak."""
    decay_fraction: float = 0.0
    """Share of all steps, at the end, over which the rate falls linearly to 0; 0 = constant."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this L2 norm."""

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "muon"):
            raise SettingsError(f"optimizer.name is 'adamw' or 'muon', not {self.name!r}")
        if self.kernels and self.name != "muon":
            raise SettingsError(
                "optimizer.kernels is a choice of Muon's; set optimizer.name to muon"
            )
        if not 0 <= self.decay_fraction <= 1:
            raise SettingsError(f"optimizer.decay_fraction is in [0, 1], not {self.decay_fraction}")


def build_optimizers(
    model: nn.Module, settings: OptimizerSettings, muon_dtype: torch.dtype = torch.bfloat16
) -> list[torch.optim.Optimizer]:
    """One optimizer, or two for Muon: (Muon over matrices and kernels, AdamW over the rest).

    Muon makes its updates orthogonal in `muon_dtype`.

    Raises:
        SettingsError: If nothing is trainable.
    """
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        (matrices if _takes_muon(name, parameter, settings) else rest).append(parameter)
    if not matrices and not rest:
        raise SettingsError("nothing is trainable: every weight is frozen")
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(Muon(matrices, settings.learning_rate, settings.weight_decay, muon_dtype))
    if rest:
        adamw = torch.optim.AdamW(
            rest,
            lr=settings.learning_rate,
            betas=(settings.betas[0], settings.betas[1]),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        optimizers.append(adamw)
    return optimizers


def _takes_muon(name: str, parameter: nn.Parameter, settings: OptimizerSettings) -> bool:
    outer = any(part in name for part in ("embed", "lm_head", "conv_in", "conv_out"))
    matrix = parameter.ndim == 2
    kernel = settings.kernels and parameter.ndim == 4 and parameter.shape[1] > 1
    return settings.name == "muon" and not outer and (matrix or kernel)


def rate_factor(step: int, total_steps: int, settings: OptimizerSettings) -> float:
    """Share of the peak rate at a step: linear warm-up, constant, linear decay to 0."""
    rise = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    decay_steps = settings.decay_fraction * total_steps
    fall = min(1.0, (total_steps - step) / decay_steps) if decay_steps else 1.0
    return min(rise, fall)


def peak_rates(optimizers: Sequence[torch.optim.Optimizer]) -> list[list[float]]:
    """Peak rates of the groups of each optimizer, read before the first step."""
    return [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]


def set_rates(
    optimizers: Sequence[torch.optim.Optimizer], peaks: list[list[float]], factor: float
) -> None:
    """Sets all rates to a share of their peaks."""
    for optimizer, rates in zip(optimizers, peaks, strict=True):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
