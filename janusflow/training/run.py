"""From a config file to a training run."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from janusflow.errors import SettingsError
from janusflow.settings import fill, read_yaml

_TASKS = {  # module, settings, objective
    "autoencoder": ("autoencoder", "AutoencoderSettings", "AutoencoderObjective"),
    "vq-tokenizer": ("vq_tokenizer", "VQTokenizerSettings", "VQTokenizerObjective"),
    "joint": ("joint", "JointSettings", "JointObjective"),
}


def run(config: str | Path, overrides: Sequence[str] = ()) -> bool:
    """Trains what a YAML config describes; see `janusflow.training.loop.train`.

    Raises:
        SettingsError: If the config is unreadable or a setting unknown or unfit.
    """
    from janusflow.training.loop import Objective, train, write_settings

    values = read_yaml(config)
    task = values.get("task")
    if task not in _TASKS:
        known = ", ".join(_TASKS)
        raise SettingsError(f"{config}: task is {task!r}; expected one of {known}")
    module_name, settings_name, objective_name = _TASKS[task]
    module = import_module(f"janusflow.training.{module_name}")
    settings: Any = fill(getattr(module, settings_name), values, overrides)
    objective: Objective = getattr(module, objective_name)(settings)
    output_dir = Path(settings.output_dir)
    write_settings(output_dir, settings)
    return train(objective, settings.loop, output_dir)
