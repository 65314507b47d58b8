"""Files that appear whole or not at all; folders that one process at a time writes into."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from janusflow.errors import SettingsError


@contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """Gives a temporary path beside `target` that takes its place when the block ends well.

    The temporary name keeps the suffix, which image writers choose their format by.
    """
    target = Path(target)
    handle, name = tempfile.mkstemp(
        prefix=f".{target.stem}-", suffix=target.suffix, dir=target.parent
    )
    os.close(handle)
    try:
        yield Path(name)
        mask = os.umask(0)
        os.umask(mask)
        Path(name).chmod(0o666 & ~mask)  # mkstemp makes files private
        Path(name).replace(target)
    finally:
        Path(name).unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """Gives a temporary folder beside `target` that takes its place when the block ends well.

    A folder that stood at `target` is replaced as a whole.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        fresh, old = scratch / "new", scratch / "old"
        fresh.mkdir()
        yield fresh
        if target.exists():
            target.replace(old)
        fresh.replace(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def held_alone(folder: str | Path, what: str) -> Iterator[None]:
    """Keeps other processes that ask for `folder`, made if it is not there, out of it meanwhile.

    The system opens the lock of a process that was killed.

    Args:
        folder: What is held.
        what: What is at work in it, for the error.

    Raises:
        SettingsError: If another process holds it.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    lock = FileLock(Path(folder) / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise SettingsError(
            f"another {what} is at work in {folder}; wait for it, or give another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


def write_json(target: str | Path, content: Any) -> None:
    """Writes JSON atomically, indented, keys in their order."""
    with atomic_path(target) as path:
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
