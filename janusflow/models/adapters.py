"""ConvNeXt adapters between latents and the language model (arXiv 2411.07975, section 3.1).

Axes: B batch, C latent channels, D encoder channels, E language width, h w image-token rows and
columns. The adapters know nothing of the language model but its width.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from janusflow.models.configuration import FlowHeadConfig


class GlobalResponseNorm(nn.Module):
    """Competition between channels (arXiv 2301.00808), with a learned scale around 1.

    `bias + (weight * n + 1) * x`, n = a channel's L2 norm over the picture, divided by the mean of
    that over the channels.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises x (B, h, w, channels)."""
        # By hand, as `vector_norm` over these axes takes a CPU many times longer on small pictures.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        energy = wide.square().sum(dim=(1, 2), keepdim=True)
        response = energy.clamp_min(1e-30).sqrt().to(x.dtype)  # whose gradient is finite at 0
        response = response / (response.mean(dim=-1, keepdim=True) + 1e-6)
        return self.bias + (self.weight * response + 1) * x


class ConvNextBlock(nn.Module):
    """ConvNeXt-V2 block whose output is scaled and shifted by the time embedding."""

    def __init__(self, num_channels: int, time_width: int, config: FlowHeadConfig) -> None:
        super().__init__()
        width = config.mlp_ratio * num_channels
        self.depthwise = nn.Conv2d(
            num_channels,
            num_channels,
            config.kernel_size,
            padding=config.kernel_size // 2,
            groups=num_channels,
        )
        self.norm = nn.RMSNorm(num_channels, eps=config.norm_eps)
        self.expand = nn.Linear(num_channels, width)
        self.activation = nn.GELU()
        self.response_norm = GlobalResponseNorm(width)
        self.contract = nn.Linear(width, num_channels)
        self.dropout = nn.Dropout(config.dropout)
        self.modulation = nn.Linear(time_width, 2 * num_channels)

    def forward(self, x: Tensor, time_embedding: Tensor) -> Tensor:
        """Maps x (B, D, h, w), time_embedding (B, E) to (B, D, h, w)."""
        y = self.depthwise(x).permute(0, 2, 3, 1)  # B h w D
        y = self.activation(self.expand(self.norm(y)))
        y = self.dropout(self.contract(self.response_norm(y)))
        x = x + y.permute(0, 3, 1, 2)
        modulation = self.modulation(nn.functional.silu(time_embedding))
        scale, shift = modulation[:, :, None, None].chunk(2, dim=1)
        return x * (1 + scale) + shift


class LatentEncoder(nn.Module):
    """Latents to image-token features, which are also the long skip to the decoder."""

    def __init__(self, time_width: int, config: FlowHeadConfig) -> None:
        super().__init__()
        channels, patch = config.hidden_size, config.patch_size
        self.patchify = nn.Conv2d(config.latent_channels, channels, patch, stride=patch)
        self.blocks = nn.ModuleList(
            ConvNextBlock(channels, time_width, config) for _ in range(config.num_encoder_blocks)
        )

    def forward(self, latents: Tensor, time_embedding: Tensor) -> Tensor:
        """Maps latents (B, C, H/8, W/8), time_embedding (B, E) to features (B, D, h, w)."""
        x = self.patchify(latents)
        for block in self.blocks:
            x = block(x, time_embedding)
        return x


class VelocityDecoder(nn.Module):
    """Language-model features and the long skip to a velocity of the latents."""

    def __init__(self, time_width: int, config: FlowHeadConfig) -> None:
        super().__init__()
        channels = 2 * config.hidden_size
        self.input_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.blocks = nn.ModuleList(
            ConvNextBlock(channels, time_width, config) for _ in range(config.num_decoder_blocks)
        )
        self.output_norm = nn.RMSNorm(channels, eps=config.norm_eps)
        self.project = nn.Conv2d(channels, config.latent_channels * config.patch_size**2, 1)
        self.unpatchify = nn.PixelShuffle(config.patch_size)

    def forward(self, features: Tensor, skip: Tensor, time_embedding: Tensor) -> Tensor:
        """Maps features (B, h w, D), skip (B, D, h, w), time_embedding (B, E) to a velocity.

        Returns:
            The velocity, (B, C, H/8, W/8).
        """
        x = rearrange(self.input_norm(features), "b (h w) d -> b d h w", h=skip.shape[2])
        x = torch.cat([x, skip], dim=1)
        for block in self.blocks:
            x = block(x, time_embedding)
        x = self.output_norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.unpatchify(self.project(x))
