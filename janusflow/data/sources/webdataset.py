"""WebDataset shards: tar files in which a sample's members share the name before the first dot.

Where samples begin is found once and kept beside each shard, in `NAME.tar.index.npz`.
"""

from __future__ import annotations

import logging
import re
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from janusflow.data.samples import (
    BrokenSample,
    Sample,
    caption_sample,
    conversation_of,
    conversation_sample,
    decode_picture,
    parse_object,
)
from janusflow.data.sources.base import CaptionSettings, Source
from janusflow.errors import SettingsError
from janusflow.files import atomic_path

logger = logging.getLogger(__name__)

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_KEY = re.compile(r"((?:.*/)?[^./][^.]*)\.(.+)")  # "a/0001.seg.png" = "a/0001", "seg.png"
_PICTURES = ("avif", "jpeg", "jpg", "png", "webp")
_BLOCK = 512  # of a tar file
_LAYOUT = 1  # of the index


@dataclass(frozen=True)
class WebDatasetSettings(CaptionSettings):
    """Shards of pictures with captions or conversations.

    A sample's members are pictures (jpg, png, webp, …) and a txt with the caption, or a json with
    the caption or a conversation.
    """

    path: str | list[str] = ""
    """Tar files: `shards-{000..009}.tar`, a pattern such as `shards/*.tar`, or a list of these."""
    text_column: str = "caption"
    """The caption's key in json members, where there is no txt."""


class WebDatasetSource(Source):
    """Samples in the order of the shards and of their members."""

    def __init__(self, name: str, settings: WebDatasetSettings) -> None:
        """Finds the samples of all shards.

        Raises:
            SettingsError: There is no such shard, or it cannot be read.
        """
        super().__init__(name, settings)
        self._settings = settings
        patterns = [settings.path] if isinstance(settings.path, str) else settings.path
        self._shards = [path for pattern in patterns for path in _expand(pattern)]
        if not self._shards:
            raise SettingsError("path is empty; expected tar files")
        borders = [_borders(path) for path in self._shards]
        # Shard s holds the samples _first[s] … _first[s + 1] - 1; each begins where the one before
        # it ends, so a shard has one border more than samples.
        self._first = np.cumsum([0, *(len(places) - 1 for places in borders)])
        self._borders = np.concatenate(borders)

    def __len__(self) -> int:
        return int(self._first[-1])

    def _place(self, index: int) -> tuple[Path, int, int]:
        """The shard of a sample, and from where to where it lies in it."""
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        border = index + shard
        return self._shards[shard], int(self._borders[border]), int(self._borders[border + 1])

    def label(self, index: int) -> str:
        """The shard and the sample's key, or its place where there is none to be read."""
        path, start, stop = self._place(index)
        try:
            return f"{path.name}:{_read_members(path, start, stop)[0]}"
        except BrokenSample:
            return f"{path.name}:byte {start}"

    def read(self, index: int) -> Sample:
        """See `Source`."""
        path, start, stop = self._place(index)
        key, members = _read_members(path, start, stop)
        for suffix, (content, size) in members.items():
            if len(content) < size:
                detail = f"{suffix} has {len(content)} of its {size} bytes: the shard is cut off"
                raise BrokenSample("unreadable shard", detail)
        pictures = [
            content
            for suffix, (content, _) in members.items()
            if suffix.lower().rpartition(".")[2] in _PICTURES
        ]
        row = parse_object(members["json"][0]) if "json" in members else {}
        name, messages = f"{path.name}:{key}", conversation_of(row)[0]
        if self.kind != "generation" and messages is not None:
            return conversation_sample(self.kind, messages, pictures, decode_picture, name)
        if self.kind == "text":
            raise BrokenSample("bad conversation", f"no conversation in {', '.join(members)}")
        if not pictures:
            raise BrokenSample("missing file", f"no picture among {', '.join(members)}")
        caption = row.get(self._settings.text_column)
        if "txt" in members:
            caption = members["txt"][0].decode("utf-8-sig", errors="replace")
        return caption_sample(
            self.kind, lambda: decode_picture(pictures[0]), caption, self._settings.question, name
        )


def _read_members(path: Path, start: int, stop: int) -> tuple[str, dict[str, tuple[bytes, int]]]:
    """The key of the sample between two places, and its members: what there is, and its size."""
    key, members = "", {}
    try:
        with path.open("rb") as file:
            file.seek(start)
            for member, name, suffix in _headers(file):
                if member.offset >= stop:
                    break
                file.seek(member.offset_data)
                key, members[suffix] = name, (file.read(member.size), member.size)
    except OSError as error:
        raise BrokenSample("unreadable shard", f"{path}: {error.strerror}") from None
    if not members:
        raise BrokenSample("unreadable shard", f"no file begins at byte {start} of {path}")
    return key, members


def _headers(file: BinaryIO) -> Iterator[tuple[tarfile.TarInfo, str, str]]:
    """Files from here on, with their keys and suffixes, until the tar ends or makes no sense."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                match = _KEY.fullmatch(member.name)
                if member.isfile() and match:
                    yield member, match[1], match[2]
    except (tarfile.TarError, ValueError):  # ValueError: nonsense in a number or a name
        return


def _expand(pattern: str) -> list[Path]:
    """The shards that a pattern names, in order."""
    if found := _RANGE.search(pattern):
        first, last = found.groups()
        numbers = range(int(first), int(last) + 1)
        names = [_RANGE.sub(str(n).zfill(len(first)), pattern, count=1) for n in numbers]
        shards = [path for name in names for path in _expand(name)]
    elif Path(pattern).is_file():
        shards = [Path(pattern)]
    else:
        whole = Path(pattern)
        below = Path(whole.anchor or ".")
        shards = sorted(below.glob(whole.relative_to(whole.anchor).as_posix())) if pattern else []
    if not shards or any(path.suffix != ".tar" for path in shards):
        wrong = next((str(path) for path in shards if path.suffix != ".tar"), pattern)
        raise SettingsError(
            f"path is {wrong!r}; expected tar files that exist and are not compressed"
        )
    return shards


def _borders(path: Path) -> np.ndarray:
    """Where the samples of a shard begin, and where the last one ends, int64 (samples + 1,)."""
    try:
        status = path.stat()
        stamp = [_LAYOUT, status.st_size, status.st_mtime_ns]
        index = path.with_name(f"{path.name}.index.npz")
        borders = _kept(index, stamp)
        if borders is not None:
            return borders
        borders = np.array(_find(path, status.st_size), np.int64)
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from None
    try:
        with atomic_path(index) as scratch:
            np.savez(scratch, stamp=np.array(stamp, np.int64), borders=borders)
    except OSError as error:
        logger.warning("%s cannot be kept (%s): each run will look again", index, error.strerror)
    return borders


def _kept(index: Path, stamp: list[int]) -> np.ndarray | None:
    try:
        with np.load(index, allow_pickle=False) as kept:
            return kept["borders"] if kept["stamp"].tolist() == stamp else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # there is none, or it is damaged: it is made again


def _find(path: Path, size: int) -> list[int]:
    borders, last, end = [], None, 0
    with path.open("rb") as file:
        for member, key, _ in _headers(file):
            if key != last:
                borders.append(member.offset)
            last = key
            end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
        file.seek(min(end, size))
        # A tar ends in zeros. Anything else is damage: it counts as a sample, a broken one.
        if not borders or file.read(_BLOCK).strip(b"\0"):
            borders.append(end)
            end = size
    return [*borders, min(end, size)]
