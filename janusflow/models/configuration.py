"""Configuration of a JanusFlow model: the only source of sizes.

Defaults are those of the published JanusFlow-1.3B (arXiv 2411.07975).
"""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import LlamaConfig, PreTrainedConfig
from transformers.models.janus.configuration_janus import JanusVisionConfig, JanusVQVAEConfig

from janusflow.errors import SettingsError

# Spelled out here because the defaults of `LlamaConfig` are those of another model.
_JANUS_LANGUAGE_MODEL = {
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "tie_word_embeddings": False,
}


class FlowHeadConfig(PreTrainedConfig):
    """Sizes of the flow head: latents, adapters and time embedding.

    Args:
        image_size: Side of the pictures it was trained on, in pixels.
        vae_scale_factor: Pixels per latent cell and side.
        latent_channels: Channels of the autoencoder's latents.
        patch_size: Latent cells per image token and side.
        hidden_size: Channels of the encoder adapter; the decoder adapter has twice as many.
        num_encoder_blocks: ConvNeXt blocks of the encoder adapter.
        num_decoder_blocks: ConvNeXt blocks of the decoder adapter.
        kernel_size: Side of the depthwise convolutions.
        mlp_ratio: Width of a block's MLP over its channels.
        time_frequencies: Width of the sinusoid that embeds `1000 t`.
        norm_eps: Epsilon of all norms of the head.
        dropout: Dropout inside the blocks.
    """

    model_type = "janusflow_flow_head"
    base_config_key = "flow_config"

    image_size: int = 384
    vae_scale_factor: int = 8
    latent_channels: int = 4
    patch_size: int = 2
    hidden_size: int = 768
    num_encoder_blocks: int = 2
    num_decoder_blocks: int = 2
    kernel_size: int = 7
    mlp_ratio: int = 4
    time_frequencies: int = 768
    norm_eps: float = 1e-6
    dropout: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        cell = self.vae_scale_factor * self.patch_size
        if self.image_size % cell:
            raise SettingsError(
                f"flow_config.image_size {self.image_size} is no multiple of {cell} "
                f"(vae_scale_factor {self.vae_scale_factor} x patch_size {self.patch_size})"
            )

    @property
    def latent_size(self) -> int:
        """Side of the latents of a picture of `image_size`."""
        return self.image_size // self.vae_scale_factor

    @property
    def num_image_tokens(self) -> int:
        """Tokens of the language model for a picture of `image_size`."""
        return (self.latent_size // self.patch_size) ** 2


DRAWING_DEFAULTS: dict[str, dict[str, Any]] = {
    "flow": {"guidance_scale": 2.0},
    "vq": {"guidance_scale": 5.0, "temperature": 1.0, "top_k": None, "top_p": None},
}
"""What the published models draw with (arXiv 2411.07975, arXiv 2410.13848)."""


class JanusFlowConfig(PreTrainedConfig):
    """One language model, one understanding path, and the generation heads that it holds.

    Args:
        text_config: The Llama language model.
        vision_config: The SigLIP tower (`image_size`, `patch_size`, …) and its aligner
            (`depth` linear layers into `projection_dim`).
        flow_config: The flow head, or None for a model without one.
        vq_config: The VQ head with its tokenizer of pictures (`num_patches` tokens a side), or None
            for a model without one.
        learned_begin_embedding: Whether a learned vector stands in for the embedding of
            `<begin_of_image>` in understanding (JanusFlow) or not (Janus).
        image_token_id: Id of the placeholder that image features replace. None, for weights that
            came without a tokenizer: placeholders are then found as runs of equal ids.
        pad_token_id: Id that fills padded places, which are always masked.
        pixel_mean: Mean of a second normalisation in front of the tower, by channel, or None.
        pixel_std: Deviation of that normalisation, or None.
        drawing_defaults: By head, what it draws with where nothing else is asked for, such as
            `{"vq": {"guidance_scale": 2.0}}`; the values of `DRAWING_DEFAULTS` where it says
            nothing.
    """

    model_type = "janusflow"
    sub_configs: ClassVar = {
        "text_config": LlamaConfig,
        "vision_config": JanusVisionConfig,
        "flow_config": FlowHeadConfig,
        "vq_config": JanusVQVAEConfig,
    }

    text_config: Any = None  # a mapping or config when given, a config ever after
    vision_config: Any = None
    flow_config: Any = None
    vq_config: Any = None
    learned_begin_embedding: bool = True
    image_token_id: int | None = None
    pad_token_id: int | None = None
    pixel_mean: list[float] | None = None
    pixel_std: list[float] | None = None
    drawing_defaults: dict[str, dict[str, Any]] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = LlamaConfig(**{**_JANUS_LANGUAGE_MODEL, **(self.text_config or {})})
        if not isinstance(self.vision_config, PreTrainedConfig):
            values = {"depth": 1, "projection_dim": self.text_config.hidden_size}
            self.vision_config = JanusVisionConfig(**{**values, **(self.vision_config or {})})
        if isinstance(self.flow_config, dict):
            self.flow_config = FlowHeadConfig(**self.flow_config)
        if isinstance(self.vq_config, dict):
            width, vision = self.text_config.hidden_size, self.vision_config
            values = {
                "num_patches": vision.image_size // vision.patch_size,
                "projection_dim": width,
                "image_token_embed_dim": width,
            }
            self.vq_config = JanusVQVAEConfig(**{**values, **self.vq_config})
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        super().__post_init__(**kwargs)
        if self.vision_config.projection_dim != self.text_config.hidden_size:
            raise SettingsError(
                f"vision_config.projection_dim {self.vision_config.projection_dim} must equal "
                f"text_config.hidden_size {self.text_config.hidden_size}"
            )
        if self.vq_config is not None:
            for key in ("projection_dim", "image_token_embed_dim"):
                if getattr(self.vq_config, key) != self.text_config.hidden_size:
                    raise SettingsError(
                        f"vq_config.{key} {getattr(self.vq_config, key)} must equal "
                        f"text_config.hidden_size {self.text_config.hidden_size}"
                    )

        for head, values in (self.drawing_defaults or {}).items():
            unknown = set(values) - set(DRAWING_DEFAULTS.get(head, ()))
            if head not in DRAWING_DEFAULTS or unknown:
                known = {name: list(entries) for name, entries in DRAWING_DEFAULTS.items()}
                raise SettingsError(f"drawing_defaults are {self.drawing_defaults}; known: {known}")

    def drawing_defaults_of(self, head: str) -> dict[str, Any]:
        """What a head draws with where nothing else is asked for."""
        return {**DRAWING_DEFAULTS[head], **(self.drawing_defaults or {}).get(head, {})}

    @property
    def num_understanding_tokens(self) -> int:
        """Tokens of the language model for one picture that is looked at."""
        return self.understanding_tokens_at(self.vision_config.image_size)

    def understanding_tokens_at(self, image_size: int) -> int:
        """Those of a picture with sides of `image_size` pixels."""
        return (image_size // self.vision_config.patch_size) ** 2

    @property
    def generation_heads(self) -> tuple[str, ...]:
        """Names of the heads that the model holds."""
        heads = {"flow": self.flow_config, "vq": self.vq_config}
        return tuple(name for name, config in heads.items() if config is not None)
