"""A folder of pictures with captions: `cat.png` + `cat.txt`, or `metadata.jsonl`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from janusflow.data.samples import (
    BrokenSample,
    Sample,
    caption_sample,
    decode_picture,
    read_file,
)
from janusflow.data.sources.base import CaptionSettings, Source
from janusflow.data.sources.lines import JsonLines
from janusflow.errors import SettingsError

SUFFIXES = frozenset([".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"])
METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class FolderSettings(CaptionSettings):
    """A folder of pictures, its subfolders included."""

    kinds: ClassVar[tuple[str, ...]] = ("generation", "understanding")

    path: str = ""
    """The folder. With a `metadata.jsonl` as Hugging Face's imagefolder has it (`file_name` and a
    text), that lists the pictures; else the caption of `cat.png` is the text of `cat.txt`."""
    text_column: str = "text"
    """The caption's key in `metadata.jsonl`."""


class FolderSource(Source):
    """Pictures and captions by their place in the sorted folder, or in its `metadata.jsonl`."""

    def __init__(self, name: str, settings: FolderSettings) -> None:
        """Looks through the folder.

        Raises:
            SettingsError: There is no such folder, or no picture in it.
        """
        super().__init__(name, settings)
        self._settings = settings
        self._folder = Path(settings.path)
        if not settings.path or not self._folder.is_dir():
            raise SettingsError(f"path is {settings.path!r}; expected a folder of pictures")
        self._lines: JsonLines | None = None
        self._files: list[str] = []
        if (self._folder / METADATA).is_file():
            self._lines = JsonLines(self._folder / METADATA)
        else:
            self._files = sorted(
                path.relative_to(self._folder).as_posix()
                for path in self._folder.rglob("*")
                if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
            )
        if not len(self):
            raise SettingsError(
                f"there are no pictures in {self._folder}; expected files such as cat.png + "
                f"cat.txt, or a {METADATA} with file_name and {settings.text_column}"
            )

    def __len__(self) -> int:
        return len(self._files) if self._lines is None else len(self._lines)

    def label(self, index: int) -> str:
        """The picture's path below the folder's parent, or its line of `metadata.jsonl`."""
        try:
            return f"{self._folder.name}/{self._entry(index)[0]}"
        except BrokenSample:
            return f"{self._folder.name}/{METADATA}:{index}"

    def _entry(self, index: int) -> tuple[str, Any]:
        """A picture's path below the folder, and its caption in `metadata.jsonl`."""
        if self._lines is None:
            return self._files[index], None
        row = self._lines[index]
        if not isinstance(row.get("file_name"), str):
            raise BrokenSample("bad JSON", f"no file_name among {', '.join(row)}")
        return row["file_name"], row.get(self._settings.text_column)

    def read(self, index: int) -> Sample:
        """See `Source`."""
        file, caption = self._entry(index)
        path = self._folder / file
        if self._lines is None:
            caption = _caption(path.with_suffix(".txt"))
        return caption_sample(
            self.kind,
            lambda: decode_picture(read_file(path)),
            caption,
            self._settings.question,
            f"{self._folder.name}/{file}",
        )


def _caption(path: Path) -> str:
    try:
        return read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BrokenSample("no caption", f"{path} is not UTF-8: {error}") from None
    except BrokenSample as broken:
        raise BrokenSample("no caption", broken.detail) from None
