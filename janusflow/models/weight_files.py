"""Weights on disk: listing, reading in pieces, writing, hashing.

Tensors are read and written in pieces of a few megabytes, so that no file is ever in memory as a
whole. Knows files and tensors; what a tensor is for is the layouts' business.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from janusflow.errors import CheckpointError

UNUSED_FILE = "unused.safetensors"
PIECE_BYTES = 8 * 2**20
SHARD_BYTES = 5 * 10**9

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        file: The file that holds it.
        shape: Its shape.
        dtype: Its type as stored.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Part:
    """One of `count` equal parts, along the first axis, of a stored tensor."""

    name: str
    index: int = 0
    count: int = 1


class WeightFiles:
    """The tensors of a folder: all its safetensors files, or its `.bin` files if it has none.

    Attributes:
        files: The files, in the order of their names.
        tensors: All tensors by name; `unused.safetensors` is left out.
    """

    def __init__(self, folder: str | Path, files: Sequence[Path] | None = None) -> None:
        """Lists the tensors, without reading one.

        Args:
            folder: The folder.
            files: Take these instead of what is found there.

        Raises:
            CheckpointError: If there are no weights, a file is missing or broken, or two files
                hold the same tensor.
        """
        self.files = list(files) if files is not None else _find_files(Path(folder))
        self.tensors: dict[str, StoredTensor] = {}
        self._open: tuple[Path, dict[str, Tensor]] | None = None
        for file in self.files:
            for name, stored in self._list(file):
                if name in self.tensors:
                    other = self.tensors[name].file.name
                    raise CheckpointError(f"{other} and {file.name} both hold the tensor {name}")
                self.tensors[name] = stored
        self._open = None

    def _list(self, file: Path) -> Iterator[tuple[str, StoredTensor]]:
        if file.suffix == ".bin":
            for name, tensor in self._load_bin(file).items():
                yield name, StoredTensor(file, tuple(tensor.shape), tensor.dtype)
            return
        with _safetensors(file) as handle:
            for name in handle.keys():  # noqa: SIM118 - a handle is no dict
                header = handle.get_slice(name)
                code = header.get_dtype()
                if code not in _DTYPES:
                    raise CheckpointError(f"{file}: tensor {name} has the unknown type {code}")
                yield name, StoredTensor(file, tuple(header.get_shape()), _DTYPES[code])

    def _load_bin(self, file: Path) -> dict[str, Tensor]:
        """A `.bin` file's tensors, mapped into memory; plain tensors only, never code."""
        if self._open is None or self._open[0] != file:
            self._open = None
            try:
                content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:  # torch raises many kinds, most of several lines
                reason = str(error).strip().split("\n")[0].split(". ")[0]
                raise CheckpointError(
                    f"{file} is damaged or holds more than tensors, and is not loaded: {reason}"
                ) from error
            if not isinstance(content, dict) or not all(
                isinstance(value, Tensor) for value in content.values()
            ):
                raise CheckpointError(f"{file} holds more than tensors by name; it is not loaded")
            self._open = (file, content)
        return self._open[1]

    def pieces(self, part: Part) -> Iterator[Tensor]:
        """A part of a tensor in pieces of consecutive rows; each is valid until the next.

        Files are opened anew for each piece: what was read of a mapped file would otherwise stay
        resident.
        """
        stored = self.tensors[part.name]
        if not stored.shape:
            yield self._rows(part.name, None)
            return
        rows = stored.shape[0] // part.count
        step = max(1, PIECE_BYTES * stored.shape[0] // max(1, stored.nbytes))
        first, last = part.index * rows, (part.index + 1) * rows
        for start in range(first, last, step):
            yield self._rows(part.name, slice(start, min(start + step, last)))

    def _rows(self, name: str, rows: slice | None) -> Tensor:
        file = self.tensors[name].file
        if file.suffix == ".bin":
            tensor = self._load_bin(file)[name]
            return tensor if rows is None else tensor[rows]
        with _safetensors(file) as handle:
            return handle.get_tensor(name) if rows is None else handle.get_slice(name)[rows]

    def copy(self, part: Part, target: Tensor) -> None:
        """Copies a part into a contiguous tensor of as many elements, of any type and device."""
        flat, offset = target.view(-1), 0
        for piece in self.pieces(part):
            flat[offset : offset + piece.numel()].copy_(piece.reshape(-1))
            offset += piece.numel()
        assert offset == flat.numel(), part

    def sha256(self) -> str:
        """Hash of names, types, shapes and bytes, whichever files hold them."""
        digest = hashlib.sha256()
        for name, stored in sorted(self.tensors.items()):
            digest.update(f"{name} {_CODES[stored.dtype]} {list(stored.shape)}\n".encode())
            for piece in self.pieces(Part(name)):
                digest.update(_bytes_of(piece))
        return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _safetensors(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except Exception as error:  # SafetensorError, OSError
        raise CheckpointError(
            f"{file} is truncated or no safetensors file ({error}); download it again"
        ) from error


def _find_files(folder: Path) -> list[Path]:
    for suffix, stem in ((".safetensors", "model"), (".bin", "pytorch_model")):
        whole, index = folder / f"{stem}{suffix}", folder / f"{stem}{suffix}.index.json"
        if whole.is_file():
            return [whole]
        if index.is_file():
            return _indexed_files(index)
        pattern = "*.safetensors" if suffix == ".safetensors" else f"{stem}*.bin"
        found = sorted(file for file in folder.glob(pattern) if file.name != UNUSED_FILE)
        if found:
            return found
    raise CheckpointError(
        f"{folder} holds no weights; expected *.safetensors or pytorch_model*.bin"
    )


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of weights: {error!r}") from error
    if any(Path(name).name != name for name in names):
        raise CheckpointError(f"{index} names files outside its folder")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of {len(names)} weight files: "
            f"{', '.join(missing[:3])}; download it again"
        )
    return [index.parent / name for name in names]


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written: the parts of others, one after another.

    Attributes:
        shape: Its shape.
        dtype: Its type, which the parts have too.
        parts: What it is made of.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_weights(
    folder: Path,
    plan: Mapping[str, PlannedTensor],
    source: WeightFiles,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes `model.safetensors`, or numbered files and their index, as transformers does."""
    shards: list[dict[str, PlannedTensor]] = [{}]
    size = 0
    for name, planned in plan.items():
        if shards[-1] and size + planned.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = planned
        size += planned.nbytes
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", shards[0], source)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, shard, source)
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(planned.nbytes for planned in plan.values())
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_safetensors(file: Path, plan: Mapping[str, PlannedTensor], source: WeightFiles) -> None:
    """Writes one safetensors file piece by piece; the library would hold all of it in memory."""
    # Widest types first, as the library has it, so that every tensor is aligned.
    ordered = sorted(plan.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, planned in ordered:
        header[name] = {
            "dtype": _CODES[planned.dtype],
            "shape": list(planned.shape),
            "data_offsets": [offset, offset + planned.nbytes],
        }
        offset += planned.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little"))
        handle.write(text)
        for _, planned in ordered:
            _write_parts(handle, planned, source)


def _write_parts(handle: BinaryIO, planned: PlannedTensor, source: WeightFiles) -> None:
    for part in planned.parts:
        for piece in source.pieces(part):
            handle.write(_bytes_of(piece))
