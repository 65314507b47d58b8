"""JSONL of conversations, in LLaVA's layout or the HF one, with pictures in files beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from janusflow.data.samples import (
    BrokenSample,
    Sample,
    conversation_of,
    conversation_sample,
    decode_picture,
    read_file,
)
from janusflow.data.sources.base import Source, SourceSettings
from janusflow.data.sources.lines import JsonLines
from janusflow.errors import SettingsError


@dataclass(frozen=True)
class ConversationsSettings(SourceSettings):
    """A file of conversations, one a line."""

    kinds: ClassVar[tuple[str, ...]] = ("understanding", "text")

    path: str = ""
    """Lines of `{"image": …, "conversations": [{"from": "human", "value": "<image>…"}, …]}` or
    `{"messages": [{"role": …, "content": …}], "images": […]}`."""
    image_root: str = ""
    """The folder that pictures are named from; by default that of the file."""


class ConversationsSource(Source):
    """Conversations by their line."""

    def __init__(self, name: str, settings: ConversationsSettings) -> None:
        """Finds the lines.

        Raises:
            SettingsError: There is no such file or image root, or nothing in the file.
        """
        super().__init__(name, settings)
        path = Path(settings.path)
        if not settings.path or not path.is_file():
            raise SettingsError(f"path is {settings.path!r}; expected a JSONL file")
        self._root = Path(settings.image_root or path.parent)
        if not self._root.is_dir():
            raise SettingsError(f"image_root is {settings.image_root!r}; there is no such folder")
        self._lines = JsonLines(path)
        if not len(self._lines):
            raise SettingsError(f"{path} is empty; expected one conversation a line")

    def __len__(self) -> int:
        return len(self._lines)

    def label(self, index: int) -> str:
        """The file and the line, blank ones not counted, from 0."""
        return f"{self._lines.path.name}:{index}"

    def read(self, index: int) -> Sample:
        """See `Source`."""
        messages, beside = conversation_of(self._lines[index])
        return conversation_sample(self.kind, messages, beside, self._load, self.label(index))

    def _load(self, picture: Any) -> Image.Image:
        if not isinstance(picture, str):
            raise BrokenSample("bad conversation", f"a picture is a path, got {picture!r:.80}")
        return decode_picture(read_file(self._root / picture))
