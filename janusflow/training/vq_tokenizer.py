"""Training of the small VQ tokenizer of pictures, on the shapes world.

Axes: B batch, D width of a code, h w tokens. Loss: the errors of the pixels that the KL
autoencoder has too, and, both sides of length 1, the distances of features and codes to each other
(arXiv 1711.00937; lookup by direction as in arXiv 2110.04627). No adversary and no perceptual
network: shapes on plain ground need neither.

A run has two parts, each a config: first without codes, then from the first's end, codes placed by
k-means among its features. Codes that were learned from nothing fell together.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from janusflow.data.shapes import draw, sample_scene
from janusflow.errors import SettingsError
from janusflow.models.vq_head import nearest_codes
from janusflow.training.autoencoder import (
    object_weights,
    preview_pixels,
    preview_reconstructions,
    to_pixels,
)
from janusflow.training.loop import LoopSettings, Objective

_BATCHES_OF_FEATURES = 32
"""From which codes are placed."""


@dataclass(frozen=True)
class VQTokenizerSettings:
    """Sizes, batch and loss weights of a tokenizer run."""

    task: str = "vq-tokenizer"
    output_dir: str = "runs/vq-tokenizer"
    start_from: str | None = None
    """Folder that an earlier run exported; its sizes must be these."""
    quantize: bool = True
    """Whether features are exchanged for their codes, or passed on with `feature_noise`."""
    feature_noise: float = 0.1
    """Deviation of noise on features of length 1 that are not quantized."""
    image_size: int = 64
    num_codes: int = 1024
    code_width: int = 8
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
    commitment_weight: float = 0.02
    """Of features that are far from their code, against codes that are far from their features."""
    loop: LoopSettings = field(default_factory=LoopSettings)


def spread_codes(features: Tensor, num_codes: int, seed: int) -> Tensor:
    """Codes (K, D) by k-means of features (N, D).

    Raises:
        SettingsError: If there are fewer features than codes.
    """
    if len(features) < num_codes:
        raise SettingsError(
            f"{num_codes} codes need as many features at least, got {len(features)}"
        )
    rng = np.random.default_rng(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of codes that no feature is nearest to
        codes, _ = kmeans2(features.double().numpy(), num_codes, iter=10, minit="++", rng=rng)
    return torch.from_numpy(codes).float()


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
                num_embeddings=settings.num_codes,
                latent_channels=settings.latent_channels,
                base_channels=settings.base_channels,
                channel_multiplier=settings.channel_multiplier,
                num_res_blocks=settings.num_res_blocks,
                num_patches=settings.image_size // 2 ** (levels - 1),
            )
        )
        nn.init.normal_(self.codebook)  # directions all around; the length does not matter
        if settings.start_from is not None:
            self._start_from(Path(settings.start_from))
        self.tokenizer.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def _start_from(self, folder: Path) -> None:
        """Takes the weights of an earlier run, and codes among its features."""
        if not (folder / "config.json").is_file():
            raise SettingsError(f"start_from names {folder}, which holds no tokenizer")
        weights = JanusVQVAE.from_pretrained(folder).state_dict()
        try:
            self.tokenizer.load_state_dict(weights)
        except RuntimeError as error:
            raise SettingsError(f"the tokenizer in {folder} has other sizes") from error
        pixels = [self.batch(-1 - step)["pixels"] for step in range(_BATCHES_OF_FEATURES)]
        features = torch.cat([self.features(part) for part in pixels]).movedim(1, -1)
        codes = spread_codes(features.flatten(0, -2), len(self.codebook), self.settings.loop.seed)
        self.codebook.copy_(codes)

    @property
    def codebook(self) -> nn.Parameter:
        """Codes (K, D)."""
        return self.tokenizer.quantize.embedding.weight

    def batch(self, step: int) -> dict[str, Tensor]:
        """Pixels (B, 3, H, W) and noise of features (B, D, h, w)."""
        rng = np.random.default_rng([self.settings.loop.seed, 6, step % 2**63])
        scenes = [sample_scene(rng) for _ in range(self.settings.batch_size)]
        pixels = to_pixels([draw(scene, self.settings.image_size) for scene in scenes])
        side = self.tokenizer.config.num_patches
        shape = (len(scenes), self.settings.code_width, side, side)
        return {
            "pixels": pixels.contiguous(memory_format=torch.channels_last),
            "noise": torch.from_numpy(rng.standard_normal(shape, np.float32)),
        }

    def features(self, pixels: Tensor) -> Tensor:
        """Features of length 1, (B, D, h, w)."""
        tokenizer = self.tokenizer
        return nn.functional.normalize(
            tokenizer.quant_conv(tokenizer.encoder(pixels)).float(), dim=1
        )

    def forward(self, *, pixels: Tensor, noise: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Reconstruction losses and distances of codes and features."""
        features = self.features(pixels)
        tokens = nearest_codes(features.detach().movedim(1, -1), self.codebook)
        codes = nn.functional.normalize(self.codebook[tokens], dim=-1).movedim(-1, 1)
        if self.settings.quantize:
            passed = features + (codes - features).detach()  # the gradient goes straight through
        else:
            passed = features + self.settings.feature_noise * noise
        decoded = self.tokenizer.decoder(self.tokenizer.post_quant_conv(passed)).float()
        error = decoded - pixels
        weight = object_weights(pixels, self.settings.object_weight)
        to_codes = (features - codes.detach()).square().mean()
        losses = {
            "absolute": (weight * error.abs()).mean(),
            "squared": self.settings.squared_weight * (weight * error.square()).mean(),
        }
        if self.settings.quantize:
            losses["codes"] = (codes - features.detach()).square().mean()
            losses["commitment"] = self.settings.commitment_weight * to_codes
        return losses

    def preview(self, step: int, folder: Path) -> dict[str, float]:
        """PSNR in decibels on scenes that training does not see, share of codes in use, a sheet."""
        pixels = preview_pixels(self.settings.loop.seed, self.settings.image_size)
        pixels = pixels.to(self.codebook.device)
        features = self.features(pixels)
        sheet = folder / "preview.png"
        if not self.settings.quantize:
            decoded = self.tokenizer.decoder(self.tokenizer.post_quant_conv(features))
            return {"psnr": preview_reconstructions(pixels, decoded, sheet)}
        tokens = nearest_codes(features.movedim(1, -1), self.codebook).flatten(1)
        psnr = preview_reconstructions(pixels, self.tokenizer.decode(tokens), sheet)
        return {"psnr": psnr, "codes_used": round(len(tokens.unique()) / len(self.codebook), 4)}

    def export(self, folder: Path) -> None:
        """Saves the tokenizer."""
        self.tokenizer.save_pretrained(folder)
