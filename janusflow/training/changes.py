"""What may change between the parts of a run, and what may not.

A run that goes on with another batch or another loss is no longer the run that its settings
describe. Settings that say how long, how often, where to or how fast are free; every other change
is refused by name, unless it is accepted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from janusflow.errors import SettingsError

FREE = (
    "output_dir",
    "preview",
    "loop.steps",  # a run that is done may be taken further; with a decaying rate, it rises again
    "loop.log_every",
    "loop.save_every",
    "loop.preview_every",
    "loop.validate_every",
    "loop.max_minutes",
    "loop.keep_last",
    "loop.best",
    "loop.trackers",
    "loop.accept_changes",
    "loop.workers",
    "loop.compile",  # from here on, the same up to rounding
    "loop.gradient_checkpointing",
    "loop.ema_device",
)
"""Settings, or whole sections, that do not change what is learned."""


def changed(before: dict[str, Any], now: dict[str, Any], free: Sequence[str] = ()) -> list[str]:
    """Names what differs, as `loop.seed: 0 -> 1`; settings that only one of them knows do not."""
    old, new = dict(flat(before)), dict(flat(now))
    return [
        f"{name}: {old[name]} -> {value}"
        for name, value in new.items()
        if name in old
        and old[name] != value
        and not any(name == f or name.startswith(f"{f}.") for f in (*FREE, *free))
    ]


def refuse(names: list[str], checkpoint: Path) -> None:
    """Says what has changed since a checkpoint, and what to do.

    Raises:
        SettingsError: If `names` has any.
    """
    if names:
        raise SettingsError(
            f"{checkpoint} was made with other settings ({'; '.join(names)}); set them back, take "
            "another --output-dir, or go on with the new ones by --loop.accept_changes true"
        )


def flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings of all sections with their dotted names."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
