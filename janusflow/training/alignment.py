"""Representation alignment, `L_REPA` (arXiv 2410.06940, 2411.07975).

A small network reads states of the language model at the image tokens of a noisy picture, and
learns to say what the understanding encoder sees in the clean one. Axes: G pictures, N image tokens
drawn, M tokens of the encoder, E width of the language model, F width of the encoder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from einops import rearrange
from torch import Tensor, nn

from janusflow.errors import SettingsError


@dataclass(frozen=True)
class AlignmentSettings:
    """How strongly, and where."""

    weight: float = 1.0
    """Of the loss; 0 = none."""
    layer: int = 6
    """States after so many layers of the language model."""
    width: int = 2048
    """Of the network's hidden layers; that of arXiv 2410.06940, JanusFlow's own is unpublished."""

    def __post_init__(self) -> None:
        if self.layer < 1 or self.width < 1:
            raise SettingsError("alignment.layer and alignment.width are at least 1")


class AlignmentHead(nn.Sequential):
    """Three linear layers with SiLU in between, (…, E) to (…, F)."""

    def __init__(self, language_width: int, encoder_width: int, width: int) -> None:
        super().__init__(
            nn.Linear(language_width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, encoder_width),
        )


def alignment_loss(predicted: Tensor, features: Tensor) -> Tensor:
    """Minus the mean cosine similarity; no gradient reaches the features.

    Args:
        predicted: Of the network, (G, N, F).
        features: Of the clean pictures by the encoder, (G, M, F); where M is not N, both square
            grids of the same picture, they are averaged over (or spread to) the drawn grid.
    """
    features = _on_grid(features.detach().float(), predicted.shape[1])
    return -nn.functional.cosine_similarity(predicted.float(), features, dim=-1).mean()


def _on_grid(features: Tensor, num_tokens: int) -> Tensor:
    have, want = math.isqrt(features.shape[1]), math.isqrt(num_tokens)
    if have == want:
        return features
    grid = rearrange(features, "g (h w) f -> g f h w", h=have)
    return rearrange(nn.functional.adaptive_avg_pool2d(grid, want), "g f h w -> g (h w) f")
