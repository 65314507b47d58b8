"""The published config of JanusFlow: its sections and what they say in our words.

Of the published layout, this module knows config.json, and `layouts` the names of weights. What
Janus has in common with it, `janus_config` takes from here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from transformers import LlamaConfig

from janusflow.errors import CheckpointError
from janusflow.models.configuration import JanusFlowConfig

_UNDERSTANDING, _ENCODER, _DECODER = (
    "vision_und_enc_config",
    "vision_gen_enc_config",
    "vision_gen_dec_config",
)
SECTIONS = ("language_config", _UNDERSTANDING, _ENCODER, _DECODER)

# Sizes that the published config only names.
_TOWERS: dict[str, dict[str, Any]] = {
    "siglip_large_patch16_384": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "mlp_ratio": 4.0,
        "patch_size": 16,
    }
}
# Our word for a tower without a published name; its sizes stand in the section below, which holds
# whatever else the published sections have no words for. Published code reads neither.
_UNNAMED_TOWER = "siglip_custom"
OVERRIDES = "janusflow"


class Section:
    """A section of the published config, read with messages that name the place."""

    def __init__(self, content: Mapping[str, Any], name: str, kind: str) -> None:
        section = content[name]
        if section.get("cls", kind) != kind:
            raise CheckpointError(f"{name}.cls is {section['cls']!r}; expected {kind!r}")
        self.name = name
        self.params: Mapping[str, Any] = section.get("params") or {}

    def __getitem__(self, key: str) -> Any:
        if key not in self.params:
            raise CheckpointError(f"{self.name}.params has no {key!r}")
        return self.params[key]

    def expect(self, **values: Any) -> None:
        """Refuses a parameter that is given with another value than the one that is known."""
        for key, expected in values.items():
            found = self.params.get(key, expected)
            if found != expected:
                raise CheckpointError(
                    f"{self.name}.params.{key} is {found!r}; the model knows {expected!r} only"
                )


def config_from_published(
    content: Mapping[str, Any], token_ids: Mapping[str, int]
) -> JanusFlowConfig:
    """Turns a published config into ours.

    Args:
        content: The published config.json.
        token_ids: Ids of special tokens in the folder's tokenizer, which win over the config's.

    Raises:
        CheckpointError: If a section asks for what the model does not have.
    """
    overrides = content.get(OVERRIDES, {})
    text, common = read_common(content, token_ids)
    vision, pixels = read_vision(content, _UNDERSTANDING, text.hidden_size)
    flow = _read_flow(content, text.hidden_size, vision["image_size"])
    return JanusFlowConfig(
        text_config=text,
        vision_config={**vision, "depth": 1, **overrides.get("vision_config", {})},
        flow_config={**flow, **overrides.get("flow_config", {})},
        **common,
        **pixels,
    )


def read_common(
    content: Mapping[str, Any], token_ids: Mapping[str, int]
) -> tuple[LlamaConfig, dict[str, Any]]:
    """The language model of a published config, and what of ours concerns no part of the model."""
    overrides = content.get(OVERRIDES, {})
    language = {k: v for k, v in content["language_config"].items() if not k.startswith("_")}
    if language.pop("model_type", "llama") != "llama":
        raise CheckpointError("language_config.model_type must be 'llama'")
    dtype = content.get("torch_dtype") or content.get("dtype") or language.get("torch_dtype")
    for key in ("torch_dtype", "dtype", "architectures", "transformers_version"):
        language.pop(key, None)
    for key in ("bos_token_id", "eos_token_id"):
        language[key] = token_ids.get(key, language.get(key))
    # Not as a dict: what is left out has the defaults of LlamaConfig, as in the published code.
    text = LlamaConfig(**{**language, **overrides.get("text_config", {})})
    common = {
        key: token_ids.get(key, overrides.get(key)) for key in ("image_token_id", "pad_token_id")
    }
    common["drawing_defaults"] = overrides.get("drawing_defaults")
    return text, {**common, **({"dtype": dtype} if dtype else {})}


def read_vision(
    content: Mapping[str, Any], name: str, width: int
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Sizes of the vision tower in the section `name`, and the normalisation in front of it."""
    section = Section(content, name, "CLIPVisionTower")
    section.expect(select_feature="same")
    name = section["model_name"]
    if name not in _TOWERS and not (name == _UNNAMED_TOWER and OVERRIDES in content):
        raise CheckpointError(
            f"{section.name}.params.model_name is {name!r}; known: {', '.join(_TOWERS)}"
        )
    values = dict(_TOWERS.get(name, {}))
    if values:
        depth, layer = values["num_hidden_layers"], section["select_layer"]
        kept = min(depth, depth + layer + 1 if layer <= 0 else layer)
        if kept < 1:
            raise CheckpointError(
                f"{section.name}.params.select_layer {layer} keeps no block of {depth}"
            )
        values["num_hidden_layers"] = kept
        values["num_image_tokens"] = (section["image_size"] // values["patch_size"]) ** 2
    values.update(image_size=section["image_size"], projection_dim=width)
    pixels = {k: section.params.get(k) for k in ("pixel_mean", "pixel_std")}
    given = {k: list(v) for k, v in pixels.items() if v is not None}
    if len(given) == 1:
        raise CheckpointError(f"{section.name}.params needs pixel_mean and pixel_std, or neither")
    return values, given


def _read_flow(content: Mapping[str, Any], width: int, image_size: int) -> dict[str, Any]:
    """Sizes of the flow head."""
    encoder = Section(content, _ENCODER, "ShallowUViTEncoder")
    decoder = Section(content, _DECODER, "ShallowUViTDecoder")
    channels = encoder["block_out_channels"]
    if len(channels) != 1:
        raise CheckpointError(f"{_ENCODER}.params.block_out_channels {channels} must be one number")
    patch = encoder["stride"]
    common = {"use_bias": True, "elementwise_affine": True, "use_mid_block": True}
    shared = {
        "hidden_size": width,
        "norm_eps": encoder.params.get("norm_eps", 1e-6),
        "dropout": encoder.params.get("dropout", 0.0),
    }
    encoder.expect(padding=0, kernel_size=patch, **common, **shared)
    decoder.expect(
        block_out_channels=channels,
        in_channels=channels[0],
        out_channels=encoder["input_channels"],
        upsamples=int(math.log2(patch)),
        **common,
        **shared,
    )
    return {
        "image_size": image_size,
        "latent_channels": encoder["input_channels"],
        "patch_size": patch,
        "hidden_size": channels[0],
        "time_frequencies": channels[0],
        "num_encoder_blocks": encoder.params.get("layers_in_middle", 2),
        "num_decoder_blocks": decoder.params.get("layers_in_middle", 2),
        "norm_eps": shared["norm_eps"],
        "dropout": shared["dropout"],
    }


def config_to_published(
    config: JanusFlowConfig, token_ids: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Turns our config into a published one.

    What its sections have no words for is added as a section of our own, so that nothing is lost
    on the way back; there is none for a model of the published shape.

    Args:
        config: Of a model with a flow head.
        token_ids: Ids in the tokenizer that is going to stand beside it.

    Raises:
        CheckpointError: If the published layout has no place for one of the model's parts.
    """
    if config.flow_config is None or not config.learned_begin_embedding:
        raise CheckpointError(
            "the published layout needs a flow head and a learned begin embedding"
        )
    if config.vq_config is not None:
        raise CheckpointError(
            "no published layout holds both heads; save the model in our own, with save_pretrained"
        )
    depth = getattr(config.vision_config, "depth", 1)
    if depth != 1:
        raise CheckpointError(
            f"the published layout has one linear layer as aligner, this model has {depth}"
        )
    sections = _published_sections(config)
    return with_overrides(sections, config, config_from_published, token_ids or {})


def with_overrides(
    sections: dict[str, Any],
    config: JanusFlowConfig,
    read: Callable[[Mapping[str, Any], Mapping[str, int]], JanusFlowConfig],
    token_ids: Mapping[str, int],
) -> dict[str, Any]:
    """Adds our own section with what `read` would not find in the published ones."""
    sections[OVERRIDES] = {}  # without the section the name of an unnamed tower is refused
    found = read(sections, token_ids)
    overrides: dict[str, Any] = {}
    for part in ("text_config", "vision_config", "flow_config", "vq_config"):
        own = getattr(config, part)
        if own is not None:
            differing = difference(own.to_dict(), getattr(found, part).to_dict())
            if differing:
                overrides[part] = differing
    for key in ("image_token_id", "pad_token_id", "drawing_defaults"):
        if getattr(config, key) != getattr(found, key):
            overrides[key] = getattr(config, key)
    if overrides:
        sections[OVERRIDES] = overrides
    else:
        del sections[OVERRIDES]
    return sections


def vision_to_published(config: JanusFlowConfig) -> dict[str, Any]:
    """Parameters of the published section of a vision tower."""
    vision: Any = config.vision_config
    tower = _UNNAMED_TOWER
    for name, sizes in _TOWERS.items():
        exact = all(getattr(vision, k) == v for k, v in sizes.items() if k != "num_hidden_layers")
        if exact and vision.num_hidden_layers <= sizes["num_hidden_layers"]:
            tower = name
    layers = _TOWERS[tower]["num_hidden_layers"] if tower in _TOWERS else vision.num_hidden_layers
    understanding = {
        "image_size": vision.image_size,
        "model_name": tower,
        "select_feature": "same",
        "select_layer": vision.num_hidden_layers - layers - 1,
    }
    if config.pixel_mean is not None:
        understanding.update(pixel_mean=config.pixel_mean, pixel_std=config.pixel_std)
    return understanding


def header_to_published(config: JanusFlowConfig) -> dict[str, Any]:
    """What a published config says before its sections of vision and generation."""
    dtype = str(config.dtype).removeprefix("torch.")
    return {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        **({"torch_dtype": dtype} if config.dtype is not None else {}),
        "language_config": language_to_published(config.text_config),
    }


def _published_sections(config: JanusFlowConfig) -> dict[str, Any]:
    # Any: the fields are typed as what may be given to the config, not as what it makes of it.
    text: Any = config.text_config
    flow: Any = config.flow_config
    shared = {
        "hidden_size": text.hidden_size,
        "norm_eps": flow.norm_eps,
        "use_bias": True,
        "elementwise_affine": True,
        "dropout": flow.dropout,
        "use_mid_block": True,
    }
    encoder = {
        "block_out_channels": [flow.hidden_size],
        "input_channels": flow.latent_channels,
        "kernel_size": flow.patch_size,
        "stride": flow.patch_size,
        "padding": 0,
        "layers_in_middle": flow.num_encoder_blocks,
        **shared,
    }
    decoder = {
        "block_out_channels": [flow.hidden_size],
        "in_channels": flow.hidden_size,
        "out_channels": flow.latent_channels,
        "upsamples": int(math.log2(flow.patch_size)),
        "layers_in_middle": flow.num_decoder_blocks,
        **shared,
    }
    return {
        **header_to_published(config),
        _UNDERSTANDING: {
            "cls": "CLIPVisionTower",
            "model_type": "vision_und_enc",
            "params": vision_to_published(config),
        },
        _ENCODER: {"cls": "ShallowUViTEncoder", "model_type": "vision_gen_enc", "params": encoder},
        _DECODER: {"cls": "ShallowUViTDecoder", "model_type": "vision_gen_dec", "params": decoder},
    }


def language_to_published(text: Any) -> dict[str, Any]:
    """What published configs spell out, and whatever else differs from the library's defaults."""
    spelled_out = (
        "bos_token_id",
        "eos_token_id",
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "rms_norm_eps",
        "vocab_size",
    )
    values = {key: getattr(text, key) for key in spelled_out}
    defaults = LlamaConfig(**values).to_dict()
    return {"model_type": "llama", **values, **difference(text.to_dict(), defaults)}


def difference(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Entries with another value than the default; what says nothing of the model is left out."""
    ignored = {"dtype", "architectures", "transformers_version", "_name_or_path"}
    return {
        key: value
        for key, value in values.items()
        if key not in ignored and defaults.get(key) != value
    }
