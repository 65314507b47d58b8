"""Low-rank adapters through PEFT (arXiv 2106.09685), and the model with them merged in.

Adapters stand inside the model's own linear layers; what is saved is an ordinary model again, in
any layout.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from janusflow.errors import SettingsError

_LANGUAGE_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraSettings:
    """Adapters of linear layers; the layers themselves stay as they are."""

    rank: int = 0
    """Of the update of a layer; 0 = no adapters."""
    alpha: int = 16
    """The update counts alpha / rank times."""
    dropout: float = 0.0
    layers: list[str] = field(
        default_factory=lambda: [f"language_model.*.{name}" for name in _LANGUAGE_LAYERS]
    )
    """Names of linear layers as `model.named_modules()` has them, `*` for anything in between, such
    as `flow_head.*_aligner`."""

    def __post_init__(self) -> None:
        if self.rank < 0 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise SettingsError(
                "lora.rank is 0 or more, lora.alpha above 0 and lora.dropout in [0, 1), got "
                f"{self.rank}, {self.alpha} and {self.dropout}"
            )


def add_adapters(model: nn.Module, settings: LoraSettings) -> list[nn.Parameter]:
    """Puts adapters into a model; at first they change nothing.

    Returns:
        Their weights. Those of the model are left as trainable or frozen as they were.

    Raises:
        SettingsError: If PEFT is not installed, or a pattern matches no linear layer.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise SettingsError("lora needs peft: pip install 'janusflow[train]'") from error
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets = []
    for pattern in settings.layers:
        found = [name for name in linear if fnmatchcase(name, pattern)]
        if not found:
            raise SettingsError(f"lora.layers has {pattern!r}, which is no linear layer's name")
        targets += found
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    inject_adapter_in_model(
        LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=targets,
        ),
        model,
    )
    adapters = []
    for name, weight in model.named_parameters():
        if "lora_" in name:
            adapters.append(weight)
        weight.requires_grad_("lora_" in name or name.replace(".base_layer", "") not in frozen)
    return adapters


@torch.no_grad()
def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights by the names of a model without adapters, those of adapters added in."""
    from peft.tuners.lora import LoraLayer

    weights = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            layer: Any = module
            base = f"{name}.base_layer."
            delta = layer.get_delta_weight("default")
            weights[f"{base}weight"] = weights[f"{base}weight"] + delta
    return {
        name.replace(".base_layer.", "."): weight
        for name, weight in weights.items()
        if ".lora_" not in name
    }
