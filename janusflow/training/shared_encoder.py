"""A model that looks at pictures through the encoder of its flow head: one encoder for both tasks.

JanusFlow's ablation of decoupled encoders (arXiv 2411.07975) needs it. It is an experiment's model
and no layout of checkpoints holds it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from janusflow.errors import CheckpointError
from janusflow.models.configuration import JanusFlowConfig
from janusflow.models.modeling import JanusFlowForConditionalGeneration
from janusflow.models.placeholders import find_placeholders


class SharedEncoderConfig(JanusFlowConfig):
    """Of a model with a flow head; a picture takes as many tokens to look at as to draw."""

    def understanding_tokens_at(self, image_size: int) -> int:
        """Tokens of the language model for a picture with sides of `image_size` pixels."""
        flow = self.flow_config
        return (image_size // (flow.vae_scale_factor * flow.patch_size)) ** 2


class SharedEncoderModel(JanusFlowForConditionalGeneration):
    """Looks at the latents of a clean picture as it does in drawing at t = 1.

    Args:
        config: Of the model.
        encode: Scaled latents (images, C, H/8, W/8) of pixels (images, 3, H, W) in [-1, 1].
    """

    def __init__(self, config: SharedEncoderConfig, encode: Callable[[Tensor], Tensor]) -> None:
        super().__init__(config)
        self.require_head("flow")
        self.vision_model.requires_grad_(False)
        self.aligner.requires_grad_(False)
        self._encode = encode

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Language-model embeddings (images, N, E) of pictures (images, 3, H, W) in [-1, 1]."""
        with torch.no_grad():
            latents = self._encode(pixel_values).float()
        t = torch.ones(len(latents), device=latents.device)
        return self.flow_head.tokens(latents, t).embeddings[:, 1:]

    def _placeholders(self, input_ids: Tensor, pixel_values: Tensor) -> tuple[Tensor, int]:
        num_tokens = self.config.num_understanding_tokens
        return find_placeholders(input_ids, num_tokens, self.config.image_token_id), num_tokens

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Refuses: loaded again, it would look through another encoder.

        Raises:
            CheckpointError: Always.
        """
        raise CheckpointError("a model with one shared encoder has no layout to be saved in")
