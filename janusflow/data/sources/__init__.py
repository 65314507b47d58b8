"""Sources of samples for training, each with random access by index."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from janusflow.data.sources.base import Source, SourceSettings
from janusflow.data.sources.conversations import ConversationsSettings, ConversationsSource
from janusflow.data.sources.folder import FolderSettings, FolderSource
from janusflow.data.sources.huggingface import HuggingFaceSettings, HuggingFaceSource
from janusflow.data.sources.pairs import PairsSettings, PairsSource
from janusflow.data.sources.shapes import ShapesSettings, ShapesSource
from janusflow.data.sources.webdataset import WebDatasetSettings, WebDatasetSource
from janusflow.errors import SettingsError
from janusflow.settings import fill

__all__ = ["FORMATS", "Source", "SourceSettings", "open_source", "source_settings"]

FORMATS: dict[str, tuple[type[SourceSettings], Any]] = {
    "folder": (FolderSettings, FolderSource),
    "conversations": (ConversationsSettings, ConversationsSource),
    "webdataset": (WebDatasetSettings, WebDatasetSource),
    "huggingface": (HuggingFaceSettings, HuggingFaceSource),
    "pairs": (PairsSettings, PairsSource),
    "shapes": (ShapesSettings, ShapesSource),
}


def source_settings(name: str, values: Mapping[str, Any]) -> SourceSettings:
    """The checked settings of a source.

    Raises:
        SettingsError: The format, a key or a value is wrong; the message names the source.
    """
    given = values.get("format")
    if given not in FORMATS:
        raise SettingsError(
            f"source {name!r}: format is {given!r}; expected one of {', '.join(FORMATS)}"
        )
    try:
        return fill(FORMATS[given][0], dict(values))
    except SettingsError as error:
        raise SettingsError(f"source {name!r}: {error}") from None


def open_source(name: str, settings: SourceSettings) -> Source:
    """Opens a source.

    Raises:
        SettingsError: It cannot be opened; the message names the source.
    """
    try:
        return FORMATS[settings.format][1](name, settings)
    except SettingsError as error:
        raise SettingsError(f"source {name!r}: {error}") from error
