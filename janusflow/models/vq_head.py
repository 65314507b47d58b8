"""The VQ head: pictures as discrete tokens, as the Janus models draw them (arXiv 2410.13848).

Axes: B pictures, N tokens of one (rows of the grid one after another), D width of a code, E width
of the language model, K codes. The parts are transformers'; what its quantizer leaves out is here:
codes are looked up by direction, so both sides are brought to length 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import (
    JanusVQVAE,
    JanusVQVAEAlignerMLP,
    JanusVQVAEHead,
)

from janusflow.errors import SettingsError

_DECODED_AT_ONCE = 8
_TOKENS_COMPARED_AT_ONCE = 4096


def nearest_codes(features: Tensor, codebook: Tensor) -> Tensor:
    """Numbers (…) of the codes (K, D) that are nearest in direction to features (…, D)."""
    vectors = nn.functional.normalize(features.float(), dim=-1).flatten(0, -2)
    codes = nn.functional.normalize(codebook.float(), dim=-1)
    nearest = [(part @ codes.mT).argmax(-1) for part in vectors.split(_TOKENS_COMPARED_AT_ONCE)]
    return torch.cat(nearest).view(features.shape[:-1])


class VQHead(nn.Module):
    """Tokenizer of pictures, embeddings of its tokens, and logits over them."""

    def __init__(self, config: JanusVQVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = JanusVQVAE._from_config(config)
        self.embeddings = nn.Embedding(config.num_embeddings, config.embed_dim)
        self.aligner = JanusVQVAEAlignerMLP(config)
        self.head = JanusVQVAEHead(config)

    @property
    def num_image_tokens(self) -> int:
        """N."""
        return self.config.num_patches**2

    @property
    def image_size(self) -> int:
        """Side of a picture in pixels."""
        return self.config.num_patches * 2 ** (len(self.config.channel_multiplier) - 1)

    def embed(self, tokens: Tensor) -> Tensor:
        """Language-model inputs (…, E) of tokens (…)."""
        return self.aligner(self.embeddings(tokens))

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Logits (…, K) of last hidden states (…, E)."""
        return self.head(hidden_states)

    @torch.no_grad()
    def encode(self, pixel_values: Tensor, at_once: int = _DECODED_AT_ONCE) -> Tensor:
        """Tokens (B, N) of pictures (B, 3, H, W) in [-1, 1], by the codes nearest in direction.

        The network takes `at_once` pictures in a call.
        """
        tokenizer = self.tokenizer
        parts = [
            tokenizer.quant_conv(tokenizer.encoder(part.to(tokenizer.dtype)))
            for part in pixel_values.split(at_once)
        ]
        features = torch.cat(parts).flatten(2).mT  # B N D
        return nearest_codes(features, tokenizer.quantize.embedding.weight)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Pixels in [-1, 1], float32 on the CPU, (B, 3, H, W), of tokens (B, N).

        Raises:
            SettingsError: If there are not N tokens a picture.
        """
        if tokens.ndim != 2 or tokens.shape[1] != self.num_image_tokens:
            raise SettingsError(
                f"image tokens have shape {tuple(tokens.shape)}; expected (pictures, "
                f"{self.num_image_tokens})"
            )
        parts = [self.tokenizer.decode(part) for part in tokens.split(_DECODED_AT_ONCE)]
        return torch.cat([part.float().clamp(-1, 1).cpu() for part in parts])
