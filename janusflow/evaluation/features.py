"""Features of pictures for distances between sets of them, with a name and a hash of the weights.

Features of different hashes are never compared. Axes: N pictures, d features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from janusflow.errors import SettingsError

_AT_ONCE = 32


@dataclass(frozen=True)
class FeatureExtractor:
    """Makes features.

    Attributes:
        name: As it was asked for.
        hash: Of the weights and of how pictures are prepared.
        extract: Features, float32 (N, d), of RGB pictures in [0, 1], float32 (N, 3, H, W).
    """

    name: str
    hash: str
    extract: Callable[[Tensor], np.ndarray]


def feature_extractor(name: str) -> FeatureExtractor:
    """An extractor by its name.

    Args:
        name: "pixels" (colours on a 4 x 4 grid: 48 features without any network), or
            "inception:FILE" with the TorchScript file of clean-fid's Inception-v3, or
            "clip:FOLDER" with a CLIP model of transformers.

    Raises:
        SettingsError: If the name is unknown or the file is not there.
    """
    kind, _, where = name.partition(":")
    if name == "pixels":
        return FeatureExtractor(name, "pixels-4x4", _pixels)
    if kind == "inception" and where:
        return _inception(name, _existing(where))
    if kind == "clip" and where:
        return _clip(name, _existing(where))
    raise SettingsError(
        f"features are {name!r}; expected 'pixels', 'inception:FILE' or 'clip:FOLDER'"
    )


def _existing(where: str) -> Path:
    path = Path(where).expanduser()
    if not path.exists():
        raise SettingsError(f"there is no {path} to extract features with")
    return path


def _pixels(pictures: Tensor) -> np.ndarray:
    return nn.functional.adaptive_avg_pool2d(pictures, 4).flatten(1).numpy()


def _inception(name: str, path: Path) -> FeatureExtractor:
    network = torch.jit.load(str(path), map_location="cpu").eval()

    @torch.no_grad()
    def extract(pictures: Tensor) -> np.ndarray:
        parts = []
        for part in pictures.split(_AT_ONCE):
            resized = torch.stack([_bicubic(picture, 299) for picture in part])
            parts.append(network(255 * resized, return_features=True).float())
        return torch.cat(parts).numpy()

    return FeatureExtractor(name, _hash(path), extract)


def _bicubic(picture: Tensor, side: int) -> Tensor:
    """A picture (3, H, W) resized channel by channel in float, without rounding (clean-fid)."""
    size, method = (side, side), Image.Resampling.BICUBIC
    channels = [Image.fromarray(c.numpy(), mode="F").resize(size, method) for c in picture]
    return torch.from_numpy(np.stack([np.asarray(channel) for channel in channels])).clamp(0, 1)


def _clip(name: str, folder: Path) -> FeatureExtractor:
    from transformers import CLIPModel

    network = CLIPModel.from_pretrained(folder, use_safetensors=True).eval()
    side = network.config.vision_config.image_size
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)

    @torch.no_grad()
    def extract(pictures: Tensor) -> np.ndarray:
        parts = []
        for part in pictures.split(_AT_ONCE):
            resized = torch.stack([_bicubic(picture, side) for picture in part])
            output = network.get_image_features(pixel_values=(resized - mean) / std)
            parts.append(nn.functional.normalize(output.pooler_output, dim=-1))
        return torch.cat(parts).numpy()

    return FeatureExtractor(name, _hash(*sorted(folder.glob("*.safetensors"))), extract)


def _hash(*files: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            while piece := handle.read(2**20):
                digest.update(piece)
    return digest.hexdigest()
