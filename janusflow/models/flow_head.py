"""The flow head: everything of a velocity prediction but the language model.

Axes: B batch, C latent channels, D encoder channels, E language width, N image tokens (h w). One
call is `tokens` (latents and time to language-model inputs), the language model, `velocity` (its
last hidden states back to latent space).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from einops import rearrange
from torch import Tensor, nn

from janusflow.errors import SettingsError
from janusflow.models.adapters import LatentEncoder, VelocityDecoder
from janusflow.models.configuration import FlowHeadConfig


@dataclass(frozen=True)
class FlowTokens:
    """Language-model inputs for one evaluation, and what the decoder needs beside its outputs.

    Attributes:
        embeddings: The time token, then the image tokens, (B, 1 + N, E).
        skip: The encoder's features, (B, D, h, w).
        time_embedding: (B, E).
    """

    embeddings: Tensor
    skip: Tensor
    time_embedding: Tensor


class FlowHead(nn.Module):
    """Adapters, aligners and time embedding around a language model of width `language_width`."""

    def __init__(self, config: FlowHeadConfig, language_width: int) -> None:
        super().__init__()
        self.config = config
        self.frequencies = Timesteps(
            config.time_frequencies, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        self.time_embedding = TimestepEmbedding(config.time_frequencies, language_width)
        self.encoder = LatentEncoder(language_width, config)
        self.encoder_aligner = nn.Linear(config.hidden_size, language_width)
        self.decoder_norm = nn.RMSNorm(language_width, eps=config.norm_eps)
        self.decoder_aligner = nn.Linear(language_width, config.hidden_size)
        self.decoder = VelocityDecoder(language_width, config)

    def embed_time(self, t: Tensor) -> Tensor:
        """Embeds times t (B,), 0 = noise and 1 = image, as (B, E) in the weights' dtype.

        The sinusoid of `1000 t` is computed in float32: in bfloat16, 533.33 would be 532.
        """
        sinusoid = self.frequencies(1000 * t.float())
        return self.time_embedding(sinusoid.to(self.encoder_aligner.weight.dtype))

    def tokens(self, latents: Tensor, t: Tensor) -> FlowTokens:
        """Makes language-model inputs from latents (B, C, H/8, W/8) at times t (B,)."""
        time_embedding = self.embed_time(t)
        skip = self.encoder(latents.to(self.encoder_aligner.weight.dtype), time_embedding)
        image_tokens = self.encoder_aligner(rearrange(skip, "b d h w -> b (h w) d"))
        embeddings = torch.cat([time_embedding[:, None], image_tokens], dim=1)
        return FlowTokens(embeddings, skip, time_embedding)

    def velocity(self, hidden_states: Tensor, tokens: FlowTokens) -> Tensor:
        """Decodes last hidden states (B, 1 + N, E) to a float32 velocity (B, C, H/8, W/8)."""
        features = self.decoder_aligner(self.decoder_norm(hidden_states[:, 1:]))
        return self.decoder(features, tokens.skip, tokens.time_embedding).float()

    def check_latents(self, latents: Tensor) -> None:
        """Refuses latents that the head cannot take.

        Raises:
            SettingsError: If the shape is not (B, C, H/8, W/8) with sides that patches divide.
        """
        config, shape = self.config, tuple(latents.shape)
        whole = len(shape) == 4 and all(side % config.patch_size == 0 for side in shape[2:])
        if not whole or shape[1] != config.latent_channels or 0 in shape:
            raise SettingsError(
                f"latents have shape {shape}; expected (batch, {config.latent_channels}, height, "
                f"width) with height and width multiples of {config.patch_size}, such as "
                f"{config.latent_size} x {config.latent_size} for {config.image_size} px"
            )
