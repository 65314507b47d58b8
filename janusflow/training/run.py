"""From a config file to a training run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from janusflow.errors import SettingsError
from janusflow.settings import fill, read_yaml

_TASKS = {  # module, settings, objective
    "autoencoder": ("autoencoder", "AutoencoderSettings", "AutoencoderObjective"),
    "vq-tokenizer": ("vq_tokenizer", "VQTokenizerSettings", "VQTokenizerObjective"),
    "joint": ("joint", "JointSettings", "JointObjective"),
    "stage": ("stage", "StageSettings", "StageObjective"),
    "distillation": ("distillation", "DistillationSettings", "DistillationObjective"),
}
_PREPARATIONS = {  # module, settings, function: what makes something to train from
    "assemble": ("assemble", "AssembleSettings", "assemble"),
    "pairs": ("pairs", "PairsRunSettings", "make_pairs"),
}


def run(config: str | Path, overrides: Sequence[str] = ()) -> bool:
    """Trains what a YAML config describes; see `janusflow.training.loop.train`.

    Raises:
        SettingsError: If the config is unreadable or a setting unknown or unfit.
    """
    import torch

    from janusflow.training.loop import train
    from janusflow.training.processes import begin

    values = read_yaml(config)
    task = values.get("task")
    if task in _PREPARATIONS:
        module_name, settings_name, function_name = _PREPARATIONS[task]
        module = import_module(f"janusflow.training.{module_name}")
        prepare = getattr(module, function_name)
        with begin().main_process_first():
            prepare(fill(getattr(module, settings_name), values, overrides))
        return True
    if task not in _TASKS:
        known = ", ".join([*_PREPARATIONS, *_TASKS])
        raise SettingsError(f"{config}: task is {task!r}; expected one of {known}")
    module_name, settings_name, objective_name = _TASKS[task]
    module = import_module(f"janusflow.training.{module_name}")
    settings: Any = fill(getattr(module, settings_name), values, overrides)
    torch.manual_seed(settings.loop.seed)  # what starts at random starts alike in all processes
    with begin().main_process_first():  # which leaves what it encodes for the others to read
        objective = getattr(module, objective_name)(settings)
    return train(objective, settings.loop, Path(settings.output_dir), asdict(settings))
