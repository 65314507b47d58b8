"""Training of the small VQ tokenizer of pictures, on the shapes world.

Axes: B batch, D width of a code, h w tokens. The codes are the corners of a cube, brought to length
1, and stay where they are (arXiv 2406.07548): a bit of a token is the sign of a feature. Learned
codes of this size fell together. Janus looks codes up by direction, which comes to the same. Loss:
the errors of the pixels that the KL autoencoder has too; no adversary and no perceptual network:
shapes on plain ground need neither.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from janusflow.data.shapes import draw, sample_scene
from janusflow.models.vq_head import nearest_codes
from janusflow.training.autoencoder import (
    object_weights,
    preview_pixels,
    preview_reconstructions,
    to_pixels,
)
from janusflow.training.loop import LoopSettings, Objective


@dataclass(frozen=True)
class VQTokenizerSettings:
    """Sizes, batch and loss weights of a tokenizer run."""

    task: str = "vq-tokenizer"
    output_dir: str = "runs/vq-tokenizer"
    image_size: int = 64
    code_width: int = 10
    """Bits of a token: 2 to this power are the codes."""
    base_channels: int = 32
    channel_multiplier: list[int] = field(default_factory=lambda: [2, 2, 2, 2])
    """By level; each level but the first halves the side. Norms have 32 groups, as published, and
    a group needs two channels at least to keep what is constant over the picture."""
    latent_channels: int = 64
    num_res_blocks: int = 1
    batch_size: int = 16
    squared_weight: float = 2.0
    object_weight: float = 4.0
    """Pixels of objects count so many times more than those of the background."""
    loop: LoopSettings = field(default_factory=LoopSettings)


def cube_corners(width: int) -> Tensor:
    """All vectors of ±1, (2^D, D), the bits of their numbers."""
    bits = torch.arange(2**width)[:, None] >> torch.arange(width) & 1
    return 2.0 * bits - 1


class VQTokenizerObjective(Objective):
    """Reconstructs freshly drawn scenes from discrete codes."""

    def __init__(self, settings: VQTokenizerSettings) -> None:
        super().__init__()
        self.settings = settings
        levels = len(settings.channel_multiplier)
        torch.manual_seed(settings.loop.seed)
        self.tokenizer = JanusVQVAE(
            JanusVQVAEConfig(
                embed_dim=settings.code_width,
                num_embeddings=2**settings.code_width,
                latent_channels=settings.latent_channels,
                base_channels=settings.base_channels,
                channel_multiplier=settings.channel_multiplier,
                num_res_blocks=settings.num_res_blocks,
                num_patches=settings.image_size // 2 ** (levels - 1),
            )
        )
        self.codebook.requires_grad_(False)
        self.codebook.data.copy_(cube_corners(settings.code_width))
        self.tokenizer.to(memory_format=torch.channels_last)
        self._spread_features()

    @torch.no_grad()
    def _spread_features(self) -> None:
        """Sets the last layer of the encoder so that the first features have all signs.

        They are the encoder's first principal components, whitened: as random layers leave them,
        all patches have nearly the same features, one code for all, and no gradient to leave it.
        """
        pixels = preview_pixels(self.settings.loop.seed, self.settings.image_size)
        states = self.tokenizer.encoder(pixels[:32]).movedim(1, -1).flatten(0, -2).double()
        mean = states.mean(0)
        _, scale, directions = torch.linalg.svd(states - mean, full_matrices=False)
        width = self.settings.code_width
        weight = directions[:width] / (scale[:width, None] / len(states) ** 0.5)
        self.tokenizer.quant_conv.weight.copy_(weight[:, :, None, None])
        self.tokenizer.quant_conv.bias.copy_(-weight @ mean)

    @property
    def codebook(self) -> nn.Parameter:
        """Codes (K, D)."""
        return self.tokenizer.quantize.embedding.weight

    def batch(self, step: int) -> dict[str, Tensor]:
        """Pixels (B, 3, H, W)."""
        rng = np.random.default_rng([self.settings.loop.seed, 6, step])
        scenes = [sample_scene(rng) for _ in range(self.settings.batch_size)]
        pixels = to_pixels([draw(scene, self.settings.image_size) for scene in scenes])
        return {"pixels": pixels.contiguous(memory_format=torch.channels_last)}

    def features(self, pixels: Tensor) -> Tensor:
        """Features of length 1, (B, D, h, w)."""
        tokenizer = self.tokenizer
        return nn.functional.normalize(
            tokenizer.quant_conv(tokenizer.encoder(pixels)).float(), dim=1
        )

    def forward(self, *, pixels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Reconstruction losses."""
        features = self.features(pixels)
        codes = features.detach().sign() / features.shape[1] ** 0.5
        passed = features + (codes - features).detach()  # the gradient goes straight through
        decoded = self.tokenizer.decoder(self.tokenizer.post_quant_conv(passed)).float()
        error = decoded - pixels
        weight = object_weights(pixels, self.settings.object_weight)
        return {
            "absolute": (weight * error.abs()).mean(),
            "squared": self.settings.squared_weight * (weight * error.square()).mean(),
        }

    def preview(self, step: int, folder: Path) -> dict[str, float]:
        """PSNR in decibels on scenes that training does not see, share of codes in use, a sheet."""
        pixels = preview_pixels(self.settings.loop.seed, self.settings.image_size)
        pixels = pixels.to(self.codebook.device)
        tokens = nearest_codes(self.features(pixels).movedim(1, -1), self.codebook).flatten(1)
        psnr = preview_reconstructions(
            pixels, self.tokenizer.decode(tokens), folder / "preview.png"
        )
        return {"psnr": psnr, "codes_used": round(len(tokens.unique()) / len(self.codebook), 4)}

    def export(self, folder: Path) -> None:
        """Saves the tokenizer."""
        self.tokenizer.save_pretrained(folder)
