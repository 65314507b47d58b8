"""From a config file to a training run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from janusflow.errors import SettingsError
from janusflow.settings import fill, read_yaml


def run(config: str | Path, overrides: Sequence[str] = ()) -> bool:
    """Trains what a YAML config describes; see `janusflow.training.loop.train`.

    Raises:
        SettingsError: If the config is unreadable or a setting unknown or unfit.
    """
    from janusflow.training.loop import Objective, train, write_settings

    values = read_yaml(config)
    settings: Any
    objective: Objective
    if values.get("task") == "autoencoder":
        from janusflow.training.autoencoder import AutoencoderObjective, AutoencoderSettings

        settings = fill(AutoencoderSettings, values, overrides)
        objective = AutoencoderObjective(settings)
    elif values.get("task") == "joint":
        from janusflow.training.joint import JointObjective, JointSettings

        settings = fill(JointSettings, values, overrides)
        objective = JointObjective(settings)
    else:
        raise SettingsError(
            f"{config}: task is 'autoencoder' or 'joint', not {values.get('task')!r}"
        )
    output_dir = Path(settings.output_dir)
    write_settings(output_dir, settings)
    return train(objective, settings.loop, output_dir)
