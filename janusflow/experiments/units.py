"""Results in pieces: each is computed once and kept in a file of its own.

A run that was killed finds the pieces that it finished and computes the others. Knows names and
arrays; nothing of what they mean.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from janusflow.errors import SettingsError
from janusflow.files import atomic_path, write_json

Arrays = dict[str, np.ndarray]


class Units:
    """The folder of an experiment.

    Args:
        folder: Made when it is not there.
        settings: What the results depend on; kept in `settings.json`.

    Raises:
        SettingsError: If the folder holds results of other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self._units = folder / "units"
        self._units.mkdir(parents=True, exist_ok=True)
        file = folder / "settings.json"
        wanted = json.loads(json.dumps(settings))
        if file.is_file():
            kept = json.loads(file.read_text(encoding="utf-8"))
            if kept != wanted:
                differing = sorted(
                    key for key in {*kept, *wanted} if kept.get(key) != wanted.get(key)
                )
                raise SettingsError(
                    f"{folder} holds results of other settings ({', '.join(differing)}); give "
                    "another folder, or the same settings to go on"
                )
        else:
            write_json(file, settings)

    def __contains__(self, name: str) -> bool:
        return any((self._units / f"{name}{end}").is_file() for end in (".json", ".safetensors"))

    def arrays(self, name: str, compute: Callable[[], Arrays]) -> Arrays:
        """Arrays of the unit `name`, computed if they are not there yet."""
        file = self._units / f"{name}.safetensors"
        if not file.is_file():
            made = {key: np.ascontiguousarray(value) for key, value in compute().items()}
            with atomic_path(file) as scratch:
                save_file(made, scratch)
        return self.read_arrays(name)

    def read_arrays(self, name: str) -> Arrays:
        """Arrays of the unit `name`, which is there."""
        return load_file(self._units / f"{name}.safetensors")

    def values(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """JSON values of the unit `name`, computed if they are not there yet."""
        file = self._units / f"{name}.json"
        if not file.is_file():
            write_json(file, compute())
        return self.read_values(name)

    def read_values(self, name: str) -> dict[str, Any]:
        """JSON values of the unit `name`, which is there."""
        return json.loads((self._units / f"{name}.json").read_text(encoding="utf-8"))
