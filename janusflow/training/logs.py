"""Where the figures of a run go: the console, `log.jsonl`, and accelerate's trackers.

The main process writes. A run that goes on cuts `log.jsonl` back to its checkpoint first, so that
the file reads as if nothing had happened. Nothing here knows what the figures mean.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from janusflow.errors import SettingsError
from janusflow.files import atomic_path
from janusflow.training.changes import flat


def check_trackers(names: list[str]) -> None:
    """Looks whether accelerate knows these trackers and their packages are installed.

    Raises:
        SettingsError: If not.
    """
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(LOGGER_TYPE_TO_CLASS)
            raise SettingsError(f"loop.trackers has {name!r}; accelerate knows {known}")
        if name not in [str(tracker) for tracker in get_available_trackers()]:
            package = "janusflow[train]" if name == "tensorboard" else name
            raise SettingsError(
                f"loop.trackers has {name!r}, which is not installed; "
                f"install it with `pip install '{package}'`, or leave it out"
            )


class Logs:
    """The logs of a run that starts after `step`.

    Args:
        accelerator: Holds the trackers.
        output_dir: Folder of `log.jsonl`.
        step: Steps done; later records are removed.
        config: Settings, for the trackers.
    """

    def __init__(
        self, accelerator: Accelerator, output_dir: Path, step: int, config: dict[str, Any]
    ) -> None:
        self.accelerator = accelerator
        self.file = output_dir / "log.jsonl"
        if accelerator.is_main_process and self.file.exists():
            cut(self.file, step)
        if accelerator.log_with:
            accelerator.init_trackers(
                "janusflow",
                config=_plain(config),
                init_kwargs={"tensorboard": {"purge_step": step + 1}},
            )

    def say(self, text: str) -> None:
        """Prints a line."""
        self.accelerator.print(text, flush=True)

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Adds figures of a step to all logs."""
        if self.accelerator.is_main_process:
            print(f"step {step}: " + ", ".join(f"{k} {v}" for k, v in figures.items()), flush=True)
            with self.file.open("a", encoding="utf-8") as log:
                log.write(json.dumps({"step": step, **figures}) + "\n")
        if self.accelerator.log_with:
            self.accelerator.log(figures, step=step)

    def close(self) -> None:
        """Ends the trackers."""
        if self.accelerator.log_with:
            self.accelerator.end_training()


def cut(file: Path, step: int) -> None:
    """Removes records after `step`, and a line that was torn by the end of its process."""
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record["step"] <= step:
            kept.append(line + "\n")
    with atomic_path(file) as scratch:
        scratch.write_text("".join(kept), encoding="utf-8")


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """Flat settings, of kinds that every tracker takes."""
    return {
        name: value if isinstance(value, bool | int | float | str | None) else str(value)
        for name, value in flat(config)
    }
