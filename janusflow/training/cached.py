"""What a frozen network makes of a picture, kept on disk by the picture's content.

A picture that comes again, in another epoch or run, is read instead of computed. Safe for several
processes: files are whole or not there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from janusflow.files import atomic_path

Encode = Callable[[Tensor], Tensor]


class Cached:
    """An encoder with its results kept in a folder.

    Args:
        encode: Pixels (1, 3, H, W) to a tensor, always the same for the same pixels.
        folder: Where results are kept.
        encoder: What tells it from others, such as the hash of its weights.
    """

    def __init__(self, encode: Encode, folder: str | Path, encoder: str) -> None:
        self.encode = encode
        self.folder = Path(folder)
        self.encoder = encoder

    def __call__(self, pixels: Tensor) -> Tensor:
        """What the encoder makes of pixels."""
        content = hashlib.sha256(self.encoder.encode())
        content.update(repr(tuple(pixels.shape)).encode())
        content.update(pixels.contiguous().numpy().tobytes())
        key = content.hexdigest()
        path = self.folder / key[:2] / f"{key}.safetensors"
        try:
            return load_file(path)["encoded"]
        except (FileNotFoundError, SafetensorError, KeyError):
            encoded = self.encode(pixels).cpu().contiguous()
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as scratch:
            save_file({"encoded": encoded}, scratch)
        return encoded
