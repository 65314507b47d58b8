"""What experiments draw: held-out prompts of the shapes world, or a text file's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from janusflow.data.shapes.language import Request, held_out_requests
from janusflow.errors import SettingsError

SHAPES = "shapes"


@dataclass(frozen=True)
class PromptSettings:
    """What is drawn."""

    source: str = SHAPES
    """"shapes" for held-out prompts of the shapes world, or a text file with a prompt a line."""
    num: int = 120
    """How many; of a file, the first."""
    seed: int = 0
    """Chooses the prompts of the shapes world; in a comparison, picture i has the noise of seed
    + i."""


def load_prompts(settings: PromptSettings) -> tuple[list[str], list[Request] | None]:
    """Texts, and for the shapes world what they ask for.

    Raises:
        SettingsError: If there is no such file, or no prompt in it.
    """
    if settings.source == SHAPES:
        requests = held_out_requests(settings.num, settings.seed)
        return [request.text for request in requests], requests
    file = Path(settings.source).expanduser()
    if not file.is_file():
        raise SettingsError(f"prompts.source is {settings.source!r}: no such file, nor 'shapes'")
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    prompts = [line for line in lines if line][: settings.num]
    if not prompts:
        raise SettingsError(f"{file} holds no prompts; one a line is expected")
    return prompts, None
