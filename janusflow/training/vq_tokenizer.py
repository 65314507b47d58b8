"""Training of the small VQ tokenizer of pictures, on the shapes world.

Axes: B batch, D width of a code, h w tokens. Loss: the errors of the pixels that the KL
autoencoder has too, and, both sides of length 1, the distances of features and codes to each other
(arXiv 1711.00937; lookup by direction as in arXiv 2110.04627). No adversary and no perceptual
network: shapes on plain ground need neither.
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
from janusflow.training.found_parts import find_vq_tokenizer
from janusflow.training.loop import LoopSettings, Objective


@dataclass(frozen=True)
class VQTokenizerSettings:
    """Sizes, batch and loss weights of a tokenizer run."""

    task: str = "vq-tokenizer"
    output_dir: str = "runs/vq-tokenizer"
    encoder: str | None = None
    """Folder of a tokenizer that is taken over with its sizes; encoder and codes are frozen and its
    decoder trained on, so that a model trained on its tokens stays valid. None = all of it is
    trained from nothing."""
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
    object_margin: int = 0
    """Pixels around objects that count as theirs; with none, edges lean outward."""
    commitment_weight: float = 0.25
    """Of features that are far from their code, against codes that are far from their features."""
    loop: LoopSettings = field(default_factory=LoopSettings)


def new_tokenizer(settings: VQTokenizerSettings) -> JanusVQVAE:
    """An untrained one."""
    levels = len(settings.channel_multiplier)
    torch.manual_seed(settings.loop.seed)
    tokenizer = JanusVQVAE(
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
    # Directions all around; the length does not matter.
    nn.init.normal_(tokenizer.quantize.embedding.weight)
    return tokenizer


class VQTokenizerObjective(Objective):
    """Reconstructs freshly drawn scenes from discrete codes."""

    def __init__(self, settings: VQTokenizerSettings) -> None:
        super().__init__()
        self.settings = settings
        if settings.encoder is None:
            self.tokenizer = new_tokenizer(settings)
        else:
            self.tokenizer = find_vq_tokenizer(settings.encoder)
            for part in (
                self.tokenizer.encoder,
                self.tokenizer.quant_conv,
                self.tokenizer.quantize,
            ):
                part.requires_grad_(False)

    @property
    def codebook(self) -> nn.Parameter:
        """Codes (K, D)."""
        return self.tokenizer.quantize.embedding.weight

    def batch(self, step: int, part: int = 0) -> dict[str, Tensor]:
        """Pixels (B, 3, H, W)."""
        loop = self.settings.loop
        rng = np.random.default_rng([loop.seed, 6, loop.sample(step, part)])
        scenes = [sample_scene(rng) for _ in range(self.settings.batch_size)]
        pixels = to_pixels([draw(scene, self.settings.image_size) for scene in scenes])
        return {"pixels": pixels}

    def features(self, pixels: Tensor) -> Tensor:
        """Features of length 1, (B, D, h, w)."""
        tokenizer = self.tokenizer
        return nn.functional.normalize(
            tokenizer.quant_conv(tokenizer.encoder(pixels)).float(), dim=1
        )

    def forward(self, *, pixels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Reconstruction losses and distances of codes and features."""
        features = self.features(pixels)
        tokens = nearest_codes(features.detach().movedim(1, -1), self.codebook)
        codes = nn.functional.normalize(self.codebook[tokens], dim=-1).movedim(-1, 1)
        passed = features + (codes - features).detach()  # the gradient goes straight through
        decoded = self.tokenizer.decoder(self.tokenizer.post_quant_conv(passed)).float()
        error = decoded - pixels
        weight = object_weights(pixels, self.settings.object_weight, self.settings.object_margin)
        to_codes = (features - codes.detach()).square().mean()
        return {
            "absolute": (weight * error.abs()).mean(),
            "squared": self.settings.squared_weight * (weight * error.square()).mean(),
            "codes": (codes - features.detach()).square().mean(),
            "commitment": self.settings.commitment_weight * to_codes,
        }

    def sources(self) -> dict[str, str]:
        """The tokenizer whose decoder trains on."""
        return {} if self.settings.encoder is None else {"encoder": self.settings.encoder}

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
