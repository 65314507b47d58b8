"""Layouts that a model folder may have on disk, and what they call things.

Names that others gave to weights stand here and nowhere else. A published tensor holds the numbers
of ours in their order, with axes of length 1 in front of some, and the vision tower's queries, keys
and values in one tensor: so a tensor of ours is a part of a published one. This module reads
configs and names; it touches no weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from janusflow.errors import CheckpointError
from janusflow.models.configuration import JanusFlowConfig
from janusflow.models.janus_config import (
    JANUS_SECTIONS,
    config_from_janus,
    config_from_transformers,
)
from janusflow.models.published_config import SECTIONS, config_from_published

OURS = "janusflow"
PUBLISHED = "janusflow-published"
JANUS_PUBLISHED = "janus-published"
JANUS_TRANSFORMERS = "janus-transformers"

CONFIG_FILE = "config.json"
PIPELINE_FILE = "model_index.json"

_TOKENS = {
    "bos_token_id": "<｜begin▁of▁sentence｜>",
    "eos_token_id": "<｜end▁of▁sentence｜>",
    "pad_token_id": "<｜▁pad▁｜>",
    "image_token_id": "<image_placeholder>",
}


@dataclass(frozen=True)
class _Naming:
    """What a layout calls our tensors.

    Attributes:
        prefixes: Beginnings of names, ours and theirs; what follows is the same or in `parts`.
        parts: Inside the numbered blocks: ours and theirs.
        leading_axes: Axes of length 1 in front of tensors whose name has this in it.
        unused: Tensors that no model reads.
    """

    prefixes: tuple[tuple[str, str], ...]
    parts: Mapping[str, str] = field(default_factory=dict)
    leading_axes: tuple[tuple[str, int], ...] = ()
    unused: re.Pattern[str] = re.compile(r"(?!)")


def _tower(published: str) -> tuple[tuple[str, str], ...]:
    return (
        ("vision_model.embeddings.patch_embedding.", f"{published}patch_embed.proj."),
        ("vision_model.embeddings.position_embedding.weight", f"{published}pos_embed"),
        ("vision_model.encoder.layers.", f"{published}blocks."),
        ("vision_model.post_layernorm.", f"{published}norm."),
    )


_TOWER_PARTS = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.q_proj": "attn.qkv",
    "self_attn.k_proj": "attn.qkv",
    "self_attn.v_proj": "attn.qkv",
    "self_attn.projection_layer": "attn.proj",
}
_JANUSFLOW_TOWER, _JANUS_TOWER = "vision_und_enc_model.vision_tower.", "vision_model.vision_tower."
_BLOCKS = "mid_block.res_blocks."
_VQ, _PUBLISHED_VQ = "vq_head.tokenizer.", "gen_vision_model."

_NAMINGS = {
    PUBLISHED: _Naming(
        prefixes=(
            ("language_model.", "language_model."),
            ("begin_embedding", "beg_of_und_embed"),
            *_tower(_JANUSFLOW_TOWER),
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
        ),
        parts={
            **_TOWER_PARTS,
            "expand": "channelwise_linear_1",
            "response_norm": "channelwise_norm",
            "contract": "channelwise_linear_2",
            "modulation": "cond_embeds_mapper",
        },
        leading_axes=(("pos_embed", 1), (".channelwise_norm.", 3)),
        unused=re.compile(re.escape(_JANUSFLOW_TOWER) + r"attn_pool\."),
    ),
    JANUS_PUBLISHED: _Naming(
        prefixes=(
            ("language_model.", "language_model."),
            *_tower(_JANUS_TOWER),
            ("aligner.fc1.", "aligner.layers.0."),
            ("aligner.hidden_layers.", "aligner.layers."),
            (f"{_VQ}encoder.down.", f"{_PUBLISHED_VQ}encoder.conv_blocks."),
            (f"{_VQ}decoder.up.", f"{_PUBLISHED_VQ}decoder.conv_blocks."),
            *(
                (f"{_VQ}{part}.mid.{ours}.", f"{_PUBLISHED_VQ}{part}.mid.{number}.")
                for part in ("encoder", "decoder")
                for number, ours in enumerate(("block_1", "attn_1", "block_2"))
            ),
            (_VQ, _PUBLISHED_VQ),
            ("vq_head.embeddings.", "gen_embed."),
            ("vq_head.aligner.fc1.", "gen_aligner.layers.0."),
            ("vq_head.aligner.hidden_layers.", "gen_aligner.layers."),
            ("vq_head.head.proj_out.", "gen_head.output_mlp_projector."),
            ("vq_head.head.vision_head.", "gen_head.vision_head."),
        ),
        parts=_TOWER_PARTS,
        leading_axes=(("pos_embed", 1),),
        unused=re.compile(
            re.escape(_JANUS_TOWER) + r"attn_pool\.|gen_vision_model\.quantize\.codebook_used$"
        ),
    ),
    JANUS_TRANSFORMERS: _Naming(
        prefixes=(
            ("language_model.model.", "model.language_model."),
            ("language_model.lm_head.", "lm_head."),
            ("vision_model.", "model.vision_model."),
            ("aligner.", "model.aligner."),
            (_VQ, "model.vqmodel."),
            ("vq_head.embeddings.", "model.generation_embeddings."),
            ("vq_head.aligner.", "model.generation_aligner."),
            ("vq_head.head.", "model.generation_head."),
        )
    ),
}


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
    janus = any(section in content for section in JANUS_SECTIONS if section.startswith("gen_"))
    sections = JANUS_SECTIONS if janus else SECTIONS
    missing = [section for section in sections if section not in content]
    if not missing:
        return JANUS_PUBLISHED if janus else PUBLISHED
    if janus or kind == "multi_modality":
        raise CheckpointError(
            f"{path} lacks the sections {', '.join(missing)} of a "
            f"{'Janus' if janus else 'JanusFlow'} model"
        )
    raise CheckpointError(
        f"{path} describes a model of type {kind!r}; expected {JanusFlowConfig.model_type!r}, a "
        "published JanusFlow or Janus config (model_type 'multi_modality'), or 'janus'"
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
    """The model's config, from a folder in any layout.

    Raises:
        CheckpointError: If the folder is of no known layout, or the config asks for what the model
            does not have.
    """
    path = folder / CONFIG_FILE
    content = read_config(path)
    layout = _layout_of(content, path)
    read = {
        PUBLISHED: config_from_published,
        JANUS_PUBLISHED: config_from_janus,
        JANUS_TRANSFORMERS: config_from_transformers,
    }
    try:
        if layout == OURS:
            return JanusFlowConfig.from_dict(content)
        return read[layout](content, token_ids(folder))
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


def foreign_name(name: str, layout: str) -> str:
    """The tensor of another layout that holds a tensor of ours.

    Raises:
        CheckpointError: If the layout has no place for it.
    """
    naming = _NAMINGS[layout]
    for ours, theirs in naming.prefixes:
        if name.startswith(ours):
            rest = name[len(ours) :]
            if ours.endswith((".layers.", ".blocks.")):
                number, _, inner = rest.partition(".")
                part, _, leaf = inner.rpartition(".")
                rest = f"{number}.{naming.parts.get(part, part)}.{leaf}"
            elif theirs.endswith(".conv_blocks."):
                rest = rest.replace(".block.", ".res.")
            elif theirs.endswith(".layers."):  # of an MLP, whose activations are numbered too
                number, _, leaf = rest.partition(".")
                rest = f"{2 * int(number) + 2}.{leaf}"
            return theirs + rest
    raise CheckpointError(f"the layout {layout} has no place for {name}")


def slots(shapes: Mapping[str, tuple[int, ...]], layout: str) -> dict[str, Slot]:
    """The tensors that a checkpoint must hold, by their names in its layout.

    Args:
        shapes: The model's tensors, tied ones once.
        layout: See `identify_layout`.
    """
    if layout == OURS:
        return {name: Slot(tuple(shape), (name,)) for name, shape in shapes.items()}
    targets: dict[str, list[str]] = {}
    for name in shapes:  # in the model's order queries come before values; sorted below
        targets.setdefault(foreign_name(name, layout), []).append(name)
    found = {}
    for theirs, names in targets.items():
        names.sort(key=lambda name: "qkv".find(name.rsplit("_proj", 1)[0][-1]))
        first, *rest = shapes[names[0]]
        leading = _NAMINGS[layout].leading_axes
        axes = next((count for part, count in leading if part in theirs), 0)
        shape = (*[1] * axes, first * len(names), *rest)
        found[theirs] = Slot(shape, tuple(names))
    return found


def without_unused(names: Iterable[str], layout: str, tied: Iterable[str]) -> set[str]:
    """The names but for those that no model reads: the pooling head, copies of tied weights."""
    copies = {name if layout == OURS else foreign_name(name, layout) for name in tied}
    return {
        name
        for name in names
        if name not in copies and (layout == OURS or not _NAMINGS[layout].unused.match(name))
    }
