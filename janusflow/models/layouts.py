"""Layouts that a model folder may have on disk, and what the published one calls things.

Published names of weights stand here and nowhere else. A published tensor holds the numbers of
ours in their order, with axes of length 1 in front of some, and the vision tower's queries, keys
and values in one tensor: so a tensor of ours is a part of a published one. This module reads
configs and names; it touches no weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from janusflow.errors import CheckpointError
from janusflow.models.configuration import JanusFlowConfig
from janusflow.models.published_config import SECTIONS, config_from_published

OURS = "janusflow"
PUBLISHED = "janusflow-published"
JANUS_PUBLISHED = "janus-published"
JANUS_TRANSFORMERS = "janus-transformers"

CONFIG_FILE = "config.json"
PIPELINE_FILE = "model_index.json"

_JANUS_SECTIONS = ("gen_vision_config", "gen_aligner_config", "gen_head_config")

_TOKENS = {
    "bos_token_id": "<｜begin▁of▁sentence｜>",
    "eos_token_id": "<｜end▁of▁sentence｜>",
    "pad_token_id": "<｜▁pad▁｜>",
    "image_token_id": "<image_placeholder>",
}

_TOWER = "vision_und_enc_model.vision_tower."
_BLOCKS = "mid_block.res_blocks."
_PREFIXES = (  # ours, published
    ("language_model.", "language_model."),
    ("begin_embedding", "beg_of_und_embed"),
    ("vision_model.embeddings.patch_embedding.", f"{_TOWER}patch_embed.proj."),
    ("vision_model.embeddings.position_embedding.weight", f"{_TOWER}pos_embed"),
    ("vision_model.encoder.layers.", f"{_TOWER}blocks."),
    ("vision_model.post_layernorm.", f"{_TOWER}norm."),
    ("aligner.fc1.", "vision_und_enc_aligner."),
    ("flow_head.time_embedding.", "vision_gen_enc_model.time_embed."),
    ("flow_head.encoder.patchify.", "vision_gen_enc_model.in_conv."),
    ("flow_head.encoder.blocks.", f"vision_gen_enc_model.{_BLOCKS}"),
    ("flow_head.encoder_aligner.", "vision_gen_enc_aligner."),
    ("flow_head.decoder_norm.", "vision_gen_dec_aligner_norm."),
    ("flow_head.decoder_aligner.", "vision_gen_dec_aligner."),
    ("flow_head.decoder.input_norm.", "vision_gen_dec_model.input_norm."),
    ("flow_head.decoder.blocks.", f"vision_gen_dec_model.{_BLOCKS}"),
    ("flow_head.decoder.output_norm.", "vision_gen_dec_model.out_convs.0.norm."),
    ("flow_head.decoder.project.", "vision_gen_dec_model.out_convs.0.unpatch_conv."),
)
_BLOCK_PARTS = {  # inside the blocks of the vision tower and of the adapters
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.q_proj": "attn.qkv",
    "self_attn.k_proj": "attn.qkv",
    "self_attn.v_proj": "attn.qkv",
    "self_attn.projection_layer": "attn.proj",
    "expand": "channelwise_linear_1",
    "response_norm": "channelwise_norm",
    "contract": "channelwise_linear_2",
    "modulation": "cond_embeds_mapper",
}
_LEADING_AXES = (("pos_embed", 1), (".channelwise_norm.", 3))
_NEVER_USED = re.compile(re.escape(_TOWER) + r"attn_pool\.")


@dataclass(frozen=True)
class Slot:
    """A tensor of a checkpoint.

    Attributes:
        shape: Its shape in the checkpoint.
        targets: The model's tensors that it holds, one after another along its first axis.
    """

    shape: tuple[int, ...]
    targets: tuple[str, ...]


def model_folder(folder: str | Path) -> Path:
    """The folder with the model's config and weights: `model/` of a saved pipeline, or itself."""
    folder = Path(folder)
    return folder / "model" if (folder / PIPELINE_FILE).is_file() else folder


def identify_layout(folder: str | Path) -> str:
    """Tells a model folder's layout by the sections of its config.

    Returns:
        "janusflow", "janusflow-published", "janus-published" or "janus-transformers".

    Raises:
        CheckpointError: If the folder is no model, or of another kind.
    """
    path = model_folder(folder) / CONFIG_FILE
    return _layout_of(read_config(path), path)


def _layout_of(content: Mapping[str, Any], path: Path) -> str:
    kind = content.get("model_type")
    if kind == JanusFlowConfig.model_type:
        return OURS
    if kind == "janus":
        return JANUS_TRANSFORMERS
    if any(section in content for section in _JANUS_SECTIONS):
        return JANUS_PUBLISHED
    missing = [section for section in SECTIONS if section not in content]
    if not missing:
        return PUBLISHED
    if kind == "multi_modality":
        raise CheckpointError(
            f"{path} lacks the sections {', '.join(missing)} of a JanusFlow model"
        )
    raise CheckpointError(
        f"{path} describes a model of type {kind!r}; expected {JanusFlowConfig.model_type!r} or a "
        "published JanusFlow config (model_type 'multi_modality')"
    )


def read_config(path: Path) -> dict[str, Any]:
    """Reads a model's config.json.

    Raises:
        CheckpointError: If it is missing or no JSON object.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.parent} is no model folder: it has no {path.name}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def load_config(folder: Path) -> JanusFlowConfig:
    """The model's config, from a folder in our layout or the published one.

    Raises:
        CheckpointError: If the folder is of another layout, or the config asks for what the model
            does not have.
    """
    path = folder / CONFIG_FILE
    content = read_config(path)
    layout = _layout_of(content, path)
    if layout not in (OURS, PUBLISHED):
        raise CheckpointError(
            f"{folder} is a Janus checkpoint ({layout}): it has no flow head, and this version "
            "does not support Janus; give a JanusFlow checkpoint"
        )
    try:
        if layout == OURS:
            return JanusFlowConfig.from_dict(content)
        return config_from_published(content, token_ids(folder))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # the strict configs of transformers raise several kinds
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} describes no model: {reason}") from error


def token_ids(folder: Path) -> dict[str, int]:
    """Ids of special tokens by their names; {} for a folder without a tokenizer."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return {}
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{path.name} is no tokenizer: {error}") from error
    ids = {key: tokenizer.token_to_id(token) for key, token in _TOKENS.items()}
    return {key: value for key, value in ids.items() if value is not None}


def published_name(name: str) -> str:
    """The published tensor that holds a tensor of ours.

    Raises:
        CheckpointError: If the published layout has no place for it.
    """
    for ours, published in _PREFIXES:
        if name.startswith(ours):
            rest = name[len(ours) :]
            if ours.endswith((".layers.", ".blocks.")):
                number, _, inner = rest.partition(".")
                part, _, leaf = inner.rpartition(".")
                rest = f"{number}.{_BLOCK_PARTS.get(part, part)}.{leaf}"
            return published + rest
    raise CheckpointError(f"the published layout has no place for {name}")


def slots(shapes: Mapping[str, tuple[int, ...]], layout: str) -> dict[str, Slot]:
    """The tensors that a checkpoint must hold, by their names in its layout.

    Args:
        shapes: The model's tensors, tied ones once.
        layout: "janusflow" or "janusflow-published".
    """
    if layout == OURS:
        return {name: Slot(tuple(shape), (name,)) for name, shape in shapes.items()}
    targets: dict[str, list[str]] = {}
    for name in shapes:  # in the model's order queries come before values; sorted below
        targets.setdefault(published_name(name), []).append(name)
    found = {}
    for published, names in targets.items():
        names.sort(key=lambda name: "qkv".find(name.rsplit("_proj", 1)[0][-1]))
        first, *rest = shapes[names[0]]
        axes = next((count for part, count in _LEADING_AXES if part in published), 0)
        shape = (*[1] * axes, first * len(names), *rest)
        found[published] = Slot(shape, tuple(names))
    return found


def without_unused(names: Iterable[str], layout: str, tied: Iterable[str]) -> set[str]:
    """The names but for those that no model reads: the pooling head, copies of tied weights."""
    copies = {published_name(name) if layout == PUBLISHED else name for name in tied}
    return {
        name
        for name in names
        if name not in copies and not (layout == PUBLISHED and _NEVER_USED.match(name))
    }
