"""Optimizers and the learning-rate schedule.

Muon (https://kellerjordan.github.io/posts/muon) steps the matrices inside the layers; embeddings,
heads, norms, biases and convolutions always take AdamW.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import distributed, nn

from janusflow.errors import SettingsError
from janusflow.training.shared_muon import SharedMuon


@dataclass(frozen=True)
class OptimizerSettings:
    """How weights are stepped."""

    name: str = "adamw"
    """"adamw", or "muon" for the layers' matrices with AdamW for all else."""
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
        if not 0 <= self.decay_fraction <= 1:
            raise SettingsError(f"optimizer.decay_fraction is in [0, 1], not {self.decay_fraction}")


def build_optimizers(model: nn.Module, settings: OptimizerSettings) -> list[torch.optim.Optimizer]:
    """One optimizer, or two for Muon: (Muon over matrices, AdamW over the rest).

    Raises:
        SettingsError: If nothing is trainable.
    """
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        inner = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        (matrices if inner and settings.name == "muon" else rest).append(parameter)
    if not matrices and not rest:
        raise SettingsError("nothing is trainable: every weight is frozen")
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        kind = SharedMuon if distributed.is_initialized() else torch.optim.Muon
        muon = kind(
            matrices,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        optimizers.append(muon)
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
