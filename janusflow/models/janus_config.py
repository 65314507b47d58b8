"""Configs of Janus and Janus-Pro, as published and as converted for transformers, in our words.

The published one shares its language model and vision tower with JanusFlow's (`published_config`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig
from transformers.models.janus.configuration_janus import JanusConfig, JanusVQVAEConfig

from janusflow.errors import CheckpointError
from janusflow.models.configuration import JanusFlowConfig
from janusflow.models.published_config import (
    OVERRIDES,
    Section,
    header_to_published,
    read_common,
    read_vision,
    vision_to_published,
    with_overrides,
)

_VISION, _ALIGNER = "vision_config", "aligner_config"
_VQ, _VQ_ALIGNER, _VQ_HEAD = "gen_vision_config", "gen_aligner_config", "gen_head_config"
JANUS_SECTIONS = ("language_config", _VISION, _ALIGNER, _VQ, _VQ_ALIGNER, _VQ_HEAD)

# Sizes that the published config names "VQ-16".
_VQ_16 = {
    "base_channels": 128,
    "channel_multiplier": [1, 1, 2, 2, 4],
    "latent_channels": 256,
    "num_res_blocks": 2,
}


def config_from_janus(content: Mapping[str, Any], token_ids: Mapping[str, int]) -> JanusFlowConfig:
    """Turns a published Janus config into ours.

    Args:
        content: The published config.json.
        token_ids: Ids of special tokens in the folder's tokenizer, which win over the config's.

    Raises:
        CheckpointError: If a section asks for what the model does not have.
    """
    overrides = content.get(OVERRIDES, {})
    text, common = read_common(content, token_ids)
    width = text.hidden_size
    vision, pixels = read_vision(content, _VISION, width)
    vision = {**vision, **overrides.get("vision_config", {})}
    codes = Section(content, _VQ, "VQ-16")
    head = Section(content, _VQ_HEAD, "vision_head")
    head.expect(image_token_embed=width, n_embed=width, image_token_size=codes["image_token_size"])
    vq = {
        **_VQ_16,
        "num_embeddings": codes["image_token_size"],
        "embed_dim": codes["n_embed"],
        "num_hidden_layers": _read_mlp(content, _VQ_ALIGNER, codes["n_embed"], width),
        "num_patches": vision["image_size"] // vision.get("patch_size", 16),
        "projection_dim": width,
        "image_token_embed_dim": width,
    }
    depth = _read_mlp(content, _ALIGNER, vision.get("hidden_size"), width)
    return JanusFlowConfig(
        text_config=text,
        vision_config={**vision, "depth": depth},
        vq_config={**vq, **overrides.get("vq_config", {})},
        learned_begin_embedding=False,
        **common,
        **pixels,
    )


def _read_mlp(content: Mapping[str, Any], name: str, inputs: int | None, outputs: int) -> int:
    """Number of linear layers of an aligner; the width of its inputs may be unknown."""
    section = Section(content, name, "MlpProjector")
    kind = section.params.get("projector_type", "mlp_gelu")
    section.expect(n_embed=outputs, **({} if inputs is None else {"input_dim": inputs}))
    if kind == "linear":
        return 1
    if kind != "mlp_gelu":
        raise CheckpointError(
            f"{name}.params.projector_type is {kind!r}; the model knows 'mlp_gelu' and 'linear'"
        )
    return section.params.get("depth", 1)


def config_to_janus(
    config: JanusFlowConfig, token_ids: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Turns our config into a published Janus one; see `config_to_published`.

    Args:
        config: Of a model with a VQ head.
        token_ids: Ids in the tokenizer that is going to stand beside it.

    Raises:
        CheckpointError: If the published layout has no place for one of the model's parts.
    """
    _check_janus(config)
    text: Any = config.text_config
    vision: Any = config.vision_config
    vq: Any = config.vq_config

    def section(cls: str, kind: str, **params: Any) -> dict[str, Any]:
        return {"cls": cls, "model_type": kind, "params": params}

    def mlp(kind: str, depth: int, inputs: int) -> dict[str, Any]:
        return section(
            "MlpProjector",
            kind,
            depth=depth,
            input_dim=inputs,
            n_embed=text.hidden_size,
            projector_type="mlp_gelu",
        )

    sections = {
        **header_to_published(config),
        _VISION: section("CLIPVisionTower", "vision", **vision_to_published(config)),
        _ALIGNER: mlp("aligner", vision.depth, vision.hidden_size),
        _VQ: section(
            "VQ-16", "gen_vision", image_token_size=vq.num_embeddings, n_embed=vq.embed_dim
        ),
        _VQ_ALIGNER: mlp("gen_aligner", vq.num_hidden_layers, vq.embed_dim),
        _VQ_HEAD: section(
            "vision_head",
            "gen_head",
            image_token_embed=text.hidden_size,
            image_token_size=vq.num_embeddings,
            n_embed=text.hidden_size,
        ),
    }
    return with_overrides(sections, config, config_from_janus, token_ids or {})


def config_from_transformers(
    content: Mapping[str, Any], token_ids: Mapping[str, int]
) -> JanusFlowConfig:
    """Turns the config of a Janus model that was converted for transformers into ours.

    Args:
        content: Its config.json.
        token_ids: Ids of special tokens in the folder's tokenizer, which win over the config's.
    """
    read = JanusConfig.from_dict(dict(content))
    text: Any = read.text_config
    ids = {key: token_ids.get(key, getattr(text, key)) for key in ("bos_token_id", "eos_token_id")}
    values = {**_values(text), **ids, "tie_word_embeddings": read.tie_word_embeddings}
    values["pad_token_id"] = None  # ours stands beside the language model, not in it
    dtype = content.get("torch_dtype") or content.get("dtype")
    return JanusFlowConfig(
        text_config=LlamaConfig(**values),
        vision_config=read.vision_config,
        vq_config=read.vq_config,
        learned_begin_embedding=False,
        image_token_id=token_ids.get("image_token_id", read.image_token_id),
        pad_token_id=token_ids.get("pad_token_id", text.pad_token_id),
        drawing_defaults=content.get(OVERRIDES, {}).get("drawing_defaults"),
        **({"dtype": dtype} if dtype else {}),
    )


def config_to_transformers(config: JanusFlowConfig) -> dict[str, Any]:
    """Turns our config into that of transformers' `JanusForConditionalGeneration`.

    Raises:
        CheckpointError: If that model has no place for one of ours' parts.
    """
    _check_janus(config)
    text: Any = config.text_config
    vision: Any = config.vision_config
    vq: Any = config.vq_config
    if config.pixel_mean is not None:
        raise CheckpointError("transformers' Janus has no second normalisation (pixel_mean)")
    if vq.num_patches != vision.image_size // vision.patch_size:
        raise CheckpointError(
            f"transformers' Janus draws as many tokens as it sees; here it draws {vq.num_patches} "
            f"a side and sees {vision.image_size // vision.patch_size}"
        )
    made = JanusConfig(
        text_config=LlamaConfig(**{**_values(text), "pad_token_id": config.pad_token_id}),
        vision_config=type(vision)(**_values(vision)),
        vq_config=JanusVQVAEConfig(**_values(vq)),
        image_token_id=config.image_token_id,
        tie_word_embeddings=text.tie_word_embeddings,
        architectures=["JanusForConditionalGeneration"],
        **({"dtype": config.dtype} if config.dtype is not None else {}),
    )
    if config.drawing_defaults is None:
        return made.to_dict()
    return {**made.to_dict(), OVERRIDES: {"drawing_defaults": config.drawing_defaults}}


def _values(config: Any) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key != "model_type"}


def _check_janus(config: JanusFlowConfig) -> None:
    if config.vq_config is None or config.flow_config is not None:
        raise CheckpointError(
            f"a Janus checkpoint holds the VQ head alone; this model holds: "
            f"{', '.join(config.generation_heads) or 'none'}"
        )
    if config.learned_begin_embedding:
        raise CheckpointError("a Janus checkpoint has no place for a learned begin embedding")
