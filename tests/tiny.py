"""A whole pipeline with random weights, small enough for any test: 64 px, two layers, width 32.

Its pictures are noise and its answers nonsense; everything else is as with a trained one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from processing.conftest import make_backend, write_model_folder

from janusflow import (
    JanusFlowConfig,
    JanusFlowForConditionalGeneration,
    JanusFlowPipeline,
    JanusFlowProcessor,
)


def make_processor() -> JanusFlowProcessor:
    with tempfile.TemporaryDirectory() as name:
        folder = write_model_folder(Path(name), make_backend())
        processor = JanusFlowProcessor.from_pretrained(folder)
    # 32 px in patches of 8.
    processor.num_image_tokens = 16
    return processor


_VQ = {
    "base_channels": 32,
    "channel_multiplier": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "latent_channels": 32,
    "embed_dim": 4,
    "num_embeddings": 40,
    "num_patches": 4,
}


def make_model(
    processor: JanusFlowProcessor, heads: Sequence[str] = ("flow",), image_size: int = 64
) -> JanusFlowForConditionalGeneration:
    config = JanusFlowConfig(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 256,
            "bos_token_id": processor.bos_token_id,
            "eos_token_id": processor.eos_token_id,
        },
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "mlp_ratio": 2,
            "image_size": 32,
            "patch_size": 8,
            "num_image_tokens": 16,
        },
        flow_config={"image_size": image_size, "hidden_size": 16, "time_frequencies": 16}
        if "flow" in heads
        else None,
        vq_config=dict(_VQ) if "vq" in heads else None,
        image_token_id=processor.image_token_id,
        pad_token_id=processor.pad_token_id,
    )
    model = JanusFlowForConditionalGeneration(config)
    # Initialisation makes the logits and the modulation nearly nothing: nothing to tell apart.
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=parameter[0].numel() ** -0.5)
    return model.eval()


def make_vae() -> AutoencoderKL:
    levels = 4
    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.5,
        mid_block_add_attention=False,
    ).eval()


def make_pipeline(heads: Sequence[str] = ("flow",), image_size: int = 64) -> JanusFlowPipeline:
    """Always the same weights; no global random state is changed.

    The VQ head draws 32 px, the flow head `image_size`.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        processor = make_processor()
        vae = make_vae() if "flow" in heads else None
        pipe = JanusFlowPipeline(make_model(processor, heads, image_size), processor, vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe
