"""Small data sets in the published layouts, made by the tests that read them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def picture(index: int = 0, size: tuple[int, int] = (12, 8), form: str = "PNG") -> bytes:
    """The file of a picture whose red is `index`."""
    file = io.BytesIO()
    Image.new("RGB", size, (index % 256, 60, 90)).save(file, form)
    return file.getvalue()


def noise(seed: int, size: tuple[int, int], form: str = "JPEG") -> bytes:
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def write_files(folder: Path, files: Mapping[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def write_folder(folder: Path, num: int) -> Path:
    """`num` pictures with captions: 0000.png + 0000.txt, …"""
    files: dict[str, bytes | str] = {}
    for index in range(num):
        files |= {f"{index:04}.png": picture(index), f"{index:04}.txt": f"caption {index}\n"}
    return write_files(folder, files)


def write_lines(path: Path, rows: Sequence[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_shard(path: Path, members: Mapping[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            held = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(held)
            tar.addfile(member, io.BytesIO(held))
    return path


def llava(*said: str) -> list[dict[str, str]]:
    """What human and gpt say in turn."""
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(said)]
