"""A CLIP model with random weights, its tokenizer of letters and its image processor."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer


def write_clip(folder: Path, seed: int = 0, *, with_processors: bool = True) -> Path:
    """Writes one that sees 32 px; always the same weights for a seed."""
    part = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    tokens = [*string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase)]
    special = ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate([*tokens, *special])}
    text = {
        **part,
        "vocab_size": len(vocabulary),
        "max_position_embeddings": 20,
        "bos_token_id": vocabulary[special[0]],
        "eos_token_id": vocabulary[special[1]],
    }
    config = CLIPConfig(
        text_config=text,
        vision_config={**part, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPModel(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(std=parameter[0].numel() ** -0.5)
    model.save_pretrained(folder)
    if with_processors:
        CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
        sides = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
        CLIPImageProcessorPil(**sides).save_pretrained(folder)
    return folder
