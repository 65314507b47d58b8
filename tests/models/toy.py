"""A model with random weights, small enough to be run many times, and its published form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from janusflow import JanusFlowConfig, JanusFlowForConditionalGeneration

PLACEHOLDER, BEGIN, END, PAD, BOS, EOS = 3, 4, 5, 1, 120, 121
TAG = 7
IMAGE_SIZE, PATCH = 32, 8
NUM_TOKENS = (IMAGE_SIZE // PATCH) ** 2


def tiny_config(**changes: Any) -> JanusFlowConfig:
    """The published architecture at toy width: 32 px, 2 layers everywhere."""
    parts: dict[str, Any] = {
        "text_config": {
            "vocab_size": 128,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 256,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
        },
        "vision_config": {
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH,
            "num_image_tokens": NUM_TOKENS,
        },
        "flow_config": {"image_size": IMAGE_SIZE, "hidden_size": 24, "time_frequencies": 32},
        "image_token_id": PLACEHOLDER,
        "pad_token_id": PAD,
    }
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(parts.get(key), dict)
        parts[key] = {**parts[key], **value} if nested else value
    return JanusFlowConfig(**parts)


TOY_VQ = {
    "base_channels": 32,
    "channel_multiplier": [1, 1, 1, 2],
    "num_res_blocks": 1,
    "latent_channels": 32,
    "embed_dim": 4,
    "num_embeddings": 48,
}


def janus_config(**changes: Any) -> JanusFlowConfig:
    """The Janus architecture at toy width: the VQ head alone, a two-layer aligner."""
    parts: dict[str, Any] = {
        "flow_config": None,
        "vq_config": TOY_VQ,
        "learned_begin_embedding": False,
        "vision_config": {"depth": 2},
    }
    return tiny_config(**{**parts, **changes})


def tiny_model_of(config: JanusFlowConfig) -> JanusFlowForConditionalGeneration:
    """Random weights, large enough that every part of the model matters."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = JanusFlowForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                table = "embed" in name
                parameter.copy_(torch.randn_like(parameter) * (0.5 if table else fan_in**-0.5))
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    torch.set_rng_state(state)
    return model


def noise(num: int, seed: int = 0, side: int = IMAGE_SIZE // 8) -> Tensor:
    return torch.randn(num, 4, side, side, generator=torch.Generator().manual_seed(seed))


def left_padded(*rows: list[int]) -> tuple[Tensor, Tensor]:
    length = max(map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


SHORT = [BOS, 30, 31, TAG]
LONG = [BOS, 40, 41, 42, 43, 44, 45, 46, 47, TAG]


# Published names and shapes, spelled out here once more: the package's own table is under test.
def published_tensors(model: JanusFlowForConditionalGeneration) -> dict[str, Tensor]:
    """The weights of a model under their published names, pooling head included."""
    ours = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    tower, found = "vision_und_enc_model.vision_tower.", {}

    def move(old: str, new: str, *shape: int) -> None:
        for leaf in ("weight", "bias"):
            if f"{old}.{leaf}" in ours:
                tensor = ours.pop(f"{old}.{leaf}")
                found[f"{new}.{leaf}"] = tensor.reshape(*shape, -1) if shape else tensor

    found["beg_of_und_embed"] = ours.pop("begin_embedding")
    positions = ours.pop("vision_model.embeddings.position_embedding.weight")
    found[f"{tower}pos_embed"] = positions[None]
    move("vision_model.embeddings.patch_embedding", f"{tower}patch_embed.proj")
    for index in range(len(model.vision_model.encoder.layers)):
        old, new = f"vision_model.encoder.layers.{index}.", f"{tower}blocks.{index}."
        for leaf in ("weight", "bias"):
            found[f"{new}attn.qkv.{leaf}"] = torch.cat(
                [ours.pop(f"{old}self_attn.{part}_proj.{leaf}") for part in "qkv"]
            )
        move(f"{old}self_attn.projection_layer", f"{new}attn.proj")
        move(f"{old}layer_norm1", f"{new}norm1")
        move(f"{old}layer_norm2", f"{new}norm2")
        move(f"{old}mlp.fc1", f"{new}mlp.fc1")
        move(f"{old}mlp.fc2", f"{new}mlp.fc2")
    move("vision_model.post_layernorm", f"{tower}norm")
    move("aligner.fc1", "vision_und_enc_aligner")
    for part in ("linear_1", "linear_2"):
        move(f"flow_head.time_embedding.{part}", f"vision_gen_enc_model.time_embed.{part}")
    move("flow_head.encoder.patchify", "vision_gen_enc_model.in_conv")
    for ours_part, part in (("encoder", "enc"), ("decoder", "dec")):
        for index in range(2):
            old = f"flow_head.{ours_part}.blocks.{index}."
            new = f"vision_gen_{part}_model.mid_block.res_blocks.{index}."
            move(f"{old}depthwise", f"{new}depthwise")
            move(f"{old}norm", f"{new}norm")
            move(f"{old}expand", f"{new}channelwise_linear_1")
            move(f"{old}response_norm", f"{new}channelwise_norm", 1, 1, 1)
            move(f"{old}contract", f"{new}channelwise_linear_2")
            move(f"{old}modulation", f"{new}cond_embeds_mapper")
    move("flow_head.encoder_aligner", "vision_gen_enc_aligner")
    move("flow_head.decoder_norm", "vision_gen_dec_aligner_norm")
    move("flow_head.decoder_aligner", "vision_gen_dec_aligner")
    move("flow_head.decoder.input_norm", "vision_gen_dec_model.input_norm")
    move("flow_head.decoder.output_norm", "vision_gen_dec_model.out_convs.0.norm")
    move("flow_head.decoder.project", "vision_gen_dec_model.out_convs.0.unpatch_conv")
    found |= {name: tensor for name, tensor in ours.items() if name.startswith("language_model.")}
    assert len(found) + 4 * len(model.vision_model.encoder.layers) == len(model.state_dict())
    found[f"{tower}attn_pool.latent"] = torch.randn(1, 1, 48)
    found[f"{tower}attn_pool.q.weight"] = torch.randn(48, 48)
    return {name: tensor.contiguous() for name, tensor in found.items()}


PUBLISHED_CONFIG: dict[str, Any] = {
    "architectures": ["MultiModalityCausalLM"],
    "model_type": "multi_modality",
    "language_config": {
        "model_type": "llama",
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    },
    "vision_und_enc_config": {
        "cls": "CLIPVisionTower",
        "model_type": "vision_und_enc",
        "params": {
            "image_size": IMAGE_SIZE,
            "model_name": "siglip_custom",
            "select_feature": "same",
            "select_layer": -1,
        },
    },
    "vision_gen_enc_config": {
        "cls": "ShallowUViTEncoder",
        "model_type": "vision_gen_enc",
        "params": {
            "block_out_channels": [24],
            "input_channels": 4,
            "kernel_size": 2,
            "stride": 2,
            "padding": 0,
            "layers_in_middle": 2,
            "hidden_size": 64,
            "norm_eps": 1e-6,
            "use_bias": True,
            "elementwise_affine": True,
            "dropout": 0.0,
            "use_mid_block": True,
        },
    },
    "vision_gen_dec_config": {
        "cls": "ShallowUViTDecoder",
        "model_type": "vision_gen_dec",
        "params": {
            "block_out_channels": [24],
            "in_channels": 24,
            "out_channels": 4,
            "upsamples": 1,
            "layers_in_middle": 2,
            "hidden_size": 64,
            "norm_eps": 1e-6,
            "use_bias": True,
            "elementwise_affine": True,
            "dropout": 0.0,
            "use_mid_block": True,
        },
    },
    # What the sections above have no words for: the toy width of the vision tower.
    "janusflow": {
        "vision_config": {
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "patch_size": PATCH,
            "num_image_tokens": NUM_TOKENS,
        },
        "flow_config": {"time_frequencies": 32},
    },
}


def write_config(folder: Path, content: Any) -> None:
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
