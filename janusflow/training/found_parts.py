"""Parts that another run trained: the autoencoder and the tokenizer of pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers.models.janus.modeling_janus import JanusVQVAE

from janusflow.errors import CheckpointError, SettingsError
from janusflow.models.autoencoder import load_autoencoder
from janusflow.models.checkpoints import resolve_model_folder
from janusflow.models.modeling import JanusFlowForConditionalGeneration


def find_autoencoder(source: str) -> AutoencoderKL:
    """The autoencoder of a run's folder, or of a model.

    Raises:
        SettingsError: If there is none.
    """
    if (Path(source) / "config.json").is_file():
        return load_autoencoder(source)
    try:
        return load_autoencoder(resolve_model_folder(source))
    except CheckpointError as error:
        raise SettingsError(
            f"no autoencoder in {source}; train it first with `janusflow train "
            "configs/train/tiny/autoencoder.yaml`, or name a model that has one"
        ) from error


def find_vq_tokenizer(source: str) -> JanusVQVAE:
    """The tokenizer of pictures of a run's folder, or of a model.

    Raises:
        SettingsError: If there is none.
    """
    if (Path(source) / "config.json").is_file():
        return JanusVQVAE.from_pretrained(source)
    try:
        model = JanusFlowForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
        model.require_head("vq")
    except (CheckpointError, SettingsError) as error:
        raise SettingsError(
            f"no tokenizer of pictures in {source}; train it first with `janusflow train "
            "configs/train/tiny/vq_tokenizer.yaml`, or name a model that has one"
        ) from error
    return model.vq_head.tokenizer
