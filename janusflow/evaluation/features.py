"""Features of pictures for distances between sets of them, with a name and a hash of the weights.

Features of different hashes are never compared. Axes: N pictures, d features.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from janusflow.errors import SettingsError

if TYPE_CHECKING:
    from janusflow.pipeline import JanusFlowPipeline

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
    network = _load_clip(folder)
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


@dataclass(frozen=True)
class ClipScorer:
    """Judges how well pictures fit texts.

    Attributes:
        hash: Of the weights.
        score: `max(100 cos, 0)` of the features (arXiv 2104.08718), float32 (N,), of RGB pictures
            in [0, 1], float32 (N, 3, H, W), and N texts.
    """

    hash: str
    score: Callable[[Tensor, Sequence[str]], np.ndarray]


def clip_scorer(where: str) -> ClipScorer:
    """A scorer by its weights; pictures and texts are prepared as the folder says.

    Args:
        where: Folder of a CLIP model of transformers, with its tokenizer and image processor.

    Raises:
        SettingsError: If it is not there, or something is missing in it.
    """
    from transformers import CLIPImageProcessorPil, CLIPTokenizer

    folder = _existing(where)
    network = _load_clip(folder)
    try:
        prepare = CLIPImageProcessorPil.from_pretrained(folder)
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise SettingsError(_not_clip(folder, error)) from error
    longest = network.config.text_config.max_position_embeddings

    @cache
    def feature_of(text: str) -> Tensor:
        ids = tokenizer(text, truncation=True, max_length=longest, return_tensors="pt")
        return nn.functional.normalize(network.get_text_features(**ids).pooler_output, dim=-1)

    @torch.no_grad()
    def score(pictures: Tensor, texts: Sequence[str]) -> np.ndarray:
        parts = []
        for part in pictures.split(_AT_ONCE):
            pixels = prepare(_as_pil(part), return_tensors="pt")
            parts.append(network.get_image_features(**pixels).pooler_output)
        seen = nn.functional.normalize(torch.cat(parts), dim=-1)
        read = torch.cat([feature_of(text) for text in texts])
        return (100 * (seen * read).sum(-1)).clamp(min=0).numpy()

    return ClipScorer(_hash(*sorted(folder.glob("*.safetensors"))), score)


def tower_extractor(pipe: JanusFlowPipeline) -> FeatureExtractor:
    """Features by a model's own vision tower: the mean over patches of its last states, in float32.

    They say nothing about the flow head beside another: its training pulls towards them (REPA).
    """
    tower = copy.deepcopy(pipe.model.vision_model).float()
    # The model's way of looking at pictures, up to the aligner.
    eyes: Any = SimpleNamespace(config=pipe.model.config, vision_model=tower, aligner=nn.Identity())

    @torch.no_grad()
    def extract(pictures: Tensor) -> np.ndarray:
        parts = []
        for part in pictures.split(_AT_ONCE):
            pixels = pipe.processor.image_processor(_as_pil(part)).to(pipe.device)
            parts.append(type(pipe.model).get_image_features(eyes, pixels).mean(1).cpu())
        return torch.cat(parts).numpy()

    return FeatureExtractor("own vision tower", module_hash(tower), extract)


def module_hash(module: nn.Module) -> str:
    """SHA-256 of a module's weights and buffers: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _as_pil(pictures: Tensor) -> list[Image.Image]:
    channels_last = (255 * pictures).round().byte().permute(0, 2, 3, 1)
    return [Image.fromarray(picture) for picture in channels_last.numpy()]


def _load_clip(folder: Path) -> Any:
    from transformers import CLIPModel

    try:
        return CLIPModel.from_pretrained(folder, use_safetensors=True).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise SettingsError(_not_clip(folder, error)) from error


def _not_clip(folder: Path, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0]
    return f"{folder} holds no CLIP model of transformers with safetensors: {reason}"


def _hash(*files: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            while piece := handle.read(2**20):
                digest.update(piece)
    return digest.hexdigest()
