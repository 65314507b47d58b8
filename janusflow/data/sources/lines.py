"""Lines of JSON by index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from janusflow.data.samples import BrokenSample, parse_object
from janusflow.errors import SettingsError

_BLOCK = 1 << 24
_SHORTEST = 2  # an object has two bytes; shorter lines are blank


class JsonLines:
    """The objects of a JSONL file, of which only the places are kept, 16 bytes a line."""

    def __init__(self, path: Path) -> None:
        """Finds the lines.

        Raises:
            SettingsError: The file cannot be read, or holds one JSON list.
        """
        self.path = path
        ends, size, start = [], 0, b""
        try:
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    start = start or block.lstrip()[:1]
                    ends.append(size + np.flatnonzero(np.frombuffer(block, np.uint8) == 10))
                    size += len(block)
        except OSError as error:
            raise SettingsError(f"{path} cannot be read: {error.strerror}") from None
        if start == b"[":
            raise SettingsError(
                f"{path} is one JSON list; make it one object a line, for instance with "
                f"`jq -c '.[]' {path} > {path.with_suffix('.jsonl')}`"
            )
        stops = np.concatenate([*ends, np.array([size])]).astype(np.int64)
        starts = np.concatenate([np.zeros(1, np.int64), stops[:-1] + 1])
        filled = stops - starts >= _SHORTEST
        self._starts, self._stops = starts[filled], stops[filled]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The object of a line.

        Raises:
            BrokenSample: The line is no JSON object, or cannot be read any more.
        """
        start, stop = int(self._starts[index]), int(self._stops[index])
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                content = file.read(stop - start)
        except OSError as error:
            raise BrokenSample("unreadable file", f"{self.path}: {error.strerror}") from None
        return parse_object(content)
