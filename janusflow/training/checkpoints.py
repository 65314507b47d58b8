"""Training checkpoints: one folder a step, safetensors and JSON, written atomically.

A checkpoint holds weights, averages, the optimizers' moments and the step. All randomness of
training is a function of (seed, step), so nothing else is needed to go on exactly.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from janusflow.files import atomic_folder, write_json
from janusflow.training.ema import EMA

Optimizers = list[torch.optim.Optimizer]


def save(
    folder: Path, step: int, model: nn.Module, ema: EMA, optimizers: Optimizers, *, keep: int = 2
) -> Path:
    """Writes `folder/step-{step}` and removes all but the newest `keep` checkpoints."""
    target = folder / f"step-{step:07d}"
    with atomic_folder(target) as scratch:
        save_file(_packed(model.state_dict()), scratch / "model.safetensors")
        save_file(_packed(ema.averages), scratch / "ema.safetensors")
        for index, optimizer in enumerate(optimizers):
            save_file(_packed(_moments(optimizer)), scratch / f"optimizer-{index}.safetensors")
        write_json(scratch / "state.json", {"step": step, "ema_updates": ema.num_updates})
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in a run's folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / "state.json").exists())


def restore(path: Path, model: nn.Module, ema: EMA, optimizers: Optimizers) -> int:
    """Loads a checkpoint in place, strictly, and returns its step."""
    model.load_state_dict(load_file(path / "model.safetensors"))
    averages = load_file(path / "ema.safetensors")
    for name, average in ema.averages.items():
        average.copy_(averages[name])
    for index, optimizer in enumerate(optimizers):
        _restore_moments(optimizer, load_file(path / f"optimizer-{index}.safetensors"))
    state = json.loads((path / "state.json").read_text())
    ema.num_updates = state["ema_updates"]
    return state["step"]


def _packed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value)
        for index, moments in state.items()
        for name, value in moments.items()
    }


def _restore_moments(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
