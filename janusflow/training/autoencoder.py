"""Training of the small KL autoencoder of the bundled model, on the shapes world.

Axes: B batch, H W pixels, h w latent cells. Loss: mean absolute and mean squared error of the
pixels, and the KL divergence of the posterior from a standard normal, per latent value. The KL
term keeps the latents smooth, which the flow head needs more than the last decibel.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from janusflow.data.shapes import draw, sample_scene
from janusflow.errors import SettingsError
from janusflow.models.autoencoder import scale_factor
from janusflow.training.found_parts import find_autoencoder
from janusflow.training.loop import LoopSettings, Objective


@dataclass(frozen=True)
class AutoencoderSettings:
    """Sizes, batch and loss weights of an autoencoder run."""

    task: str = "autoencoder"
    output_dir: str = "runs/autoencoder"
    encoder: str | None = None
    """Folder of an autoencoder that is taken over with its sizes; its encoder is frozen and its
    decoder trained on, so that a model trained on its latents stays valid. None = all of it is
    trained from nothing."""
    image_size: int = 64
    latent_channels: int = 4
    block_out_channels: list[int] = field(default_factory=lambda: [16, 32, 64, 128])
    """Channels by level; each level but the first halves the side."""
    layers_per_block: int = 1
    batch_size: int = 16
    kl_weight: float = 1e-4
    squared_weight: float = 2.0
    latent_noise: float = 0.1
    """Noise on the latents, in their standard deviations: the decoder learns to forgive small
    errors of the flow."""
    object_weight: float = 4.0
    """Pixels of objects count so many times more than those of the background."""
    object_margin: int = 0
    """Pixels around objects that count as theirs; with none, edges lean outward."""
    loop: LoopSettings = field(default_factory=LoopSettings)


def to_pixels(pictures: list[Image.Image]) -> Tensor:
    """RGB pictures of one size as float32 (B, 3, H, W) in [-1, 1]."""
    stacked = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def object_weights(pixels: Tensor, weight: float, margin: int = 0) -> Tensor:
    """Weights of the pixels of shapes pictures (B, 3, H, W).

    Returns:
        `weight` on objects and up to `margin` pixels around them, 1 elsewhere, (B, 1, H, W).

    Raises:
        SettingsError: If the margin is negative.
    """
    if margin < 0:
        raise SettingsError(f"object_margin is at least 0, not {margin}")
    # Corners are always background.
    on_object = ((pixels - pixels[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.1).float()
    on_object = nn.functional.max_pool2d(on_object, 2 * margin + 1, stride=1, padding=margin)
    return 1 + (weight - 1) * on_object


def preview_pixels(seed: int, size: int) -> Tensor:
    """128 pictures that training does not see, (128, 3, H, W) in [-1, 1]."""
    rng = np.random.default_rng([seed, 2**31])
    return to_pixels([draw(sample_scene(rng), size) for _ in range(128)])


def preview_reconstructions(pixels: Tensor, decoded: Tensor, file: Path) -> float:
    """Writes a sheet of the first 16 above their reconstructions; returns the PSNR in decibels."""
    decoded = decoded.clamp(-1, 1)
    squared = (decoded - pixels).div(2).square().flatten(1).mean(1)
    pairs = torch.cat([pixels[:16], decoded[:16]]).add(1).mul(127.5).round().byte()
    sheet = torch.cat([torch.cat(list(row), 2) for row in pairs.split(16)], 1)
    Image.fromarray(sheet.permute(1, 2, 0).cpu().numpy()).save(file)
    return round(float(-10 * squared.log10().mean()), 3)


def new_autoencoder(settings: AutoencoderSettings) -> AutoencoderKL:
    """An untrained one."""
    levels = len(settings.block_out_channels)
    return AutoencoderKL(
        block_out_channels=tuple(settings.block_out_channels),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=settings.layers_per_block,
        latent_channels=settings.latent_channels,
        norm_num_groups=8,
        sample_size=settings.image_size,
        mid_block_add_attention=False,
    )


class AutoencoderObjective(Objective):
    """Reconstructs freshly drawn scenes."""

    def __init__(self, settings: AutoencoderSettings) -> None:
        super().__init__()
        self.settings = settings
        if settings.encoder is None:
            self.vae = new_autoencoder(settings)
        else:
            self.vae = find_autoencoder(settings.encoder)
            self.vae.encoder.requires_grad_(False)
            if self.vae.quant_conv is not None:
                self.vae.quant_conv.requires_grad_(False)

    def batch(self, step: int, part: int = 0) -> dict[str, Tensor]:
        """Pixels (B, 3, H, W) and the noise of the latents (B, C, h, w)."""
        loop = self.settings.loop
        rng = np.random.default_rng([loop.seed, loop.sample(step, part)])
        size, num = self.settings.image_size, self.settings.batch_size
        pixels = to_pixels([draw(sample_scene(rng), size) for _ in range(num)])
        side = size // scale_factor(self.vae)
        channels = self.vae.config.latent_channels
        noise = rng.standard_normal((num, channels, side, side), np.float32)
        return {"pixels": pixels, "noise": torch.from_numpy(noise)}

    def forward(self, *, pixels: Tensor, noise: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Reconstruction losses and KL divergence."""
        posterior = self.vae.encode(pixels).latent_dist
        std = posterior.std + self.settings.latent_noise * posterior.mean.detach().std()
        decoded = self.vae.decode(posterior.mean + std * noise).sample.float()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        error = decoded - pixels
        weight = object_weights(pixels, self.settings.object_weight, self.settings.object_margin)
        return {
            "absolute": (weight * error.abs()).mean(),
            "squared": self.settings.squared_weight * (weight * error.square()).mean(),
            "kl": self.settings.kl_weight * kl,
        }

    def sources(self) -> dict[str, str]:
        """The autoencoder whose decoder trains on."""
        return {} if self.settings.encoder is None else {"encoder": self.settings.encoder}

    def preview(self, step: int, folder: Path) -> dict[str, float]:
        """PSNR in decibels on scenes that training does not see, and a sheet of them."""
        pixels = preview_pixels(self.settings.loop.seed, self.settings.image_size)
        pixels = pixels.to(next(self.vae.parameters()).device)
        decoded = self.vae.decode(self.vae.encode(pixels).latent_dist.mean).sample
        return {"psnr": preview_reconstructions(pixels, decoded, folder / "preview.png")}

    def export(self, folder: Path) -> None:
        """Saves the autoencoder with the scaling factor that gives its latents unit deviation."""
        self.vae.register_to_config(_name_or_path="")  # else the folder it was loaded from
        if self.settings.encoder is not None:  # which has its scaling factor
            self.vae.save_pretrained(folder)
            return
        rng = np.random.default_rng([self.settings.loop.seed, 2**31 + 1])
        pixels = to_pixels([draw(sample_scene(rng), self.settings.image_size) for _ in range(512)])
        with torch.no_grad():
            device = next(self.vae.parameters()).device
            latents = self.vae.encode(pixels.to(device)).latent_dist.mean
        self.vae.register_to_config(scaling_factor=round(float(1 / latents.std()), 5))
        self.vae.save_pretrained(folder)
