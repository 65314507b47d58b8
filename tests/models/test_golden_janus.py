"""The published Janus implementation's numbers, through the loader of its checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from golden.fill import fill, near_normal
from safetensors.torch import load_file, save_file
from torch import Tensor

from janusflow import JanusFlowForConditionalGeneration
from janusflow.models.token_sampling import draw_tokens

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 2e-4
PAD = 1


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(GOLDEN / "janus_shallow.safetensors")


@pytest.fixture(scope="module")
def model(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[JanusFlowForConditionalGeneration]:
    folder = tmp_path_factory.mktemp("golden")
    shutil.copyfile(GOLDEN / "janus_shallow.config.json", folder / "config.json")
    layout = json.loads((GOLDEN / "janus_shallow.layout.json").read_text())
    save_file(
        {name: fill(name, tuple(shape)) for name, shape in layout.items()},
        folder / "model.safetensors",
    )
    try:
        yield JanusFlowForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    finally:
        shutil.rmtree(folder)


def test_a_janus_checkpoint_holds_the_vq_head(model: JanusFlowForConditionalGeneration) -> None:
    assert model.generation_heads == ("vq",)


@torch.no_grad()
def test_guided_logits_are_the_published_ones(
    model: JanusFlowForConditionalGeneration, expected: dict[str, Tensor]
) -> None:
    forced = expected["forced_tokens"]
    found: list[Tensor] = []

    def choose(logits: Tensor) -> Tensor:
        found.append(logits)
        return forced[:, len(found) - 1]

    prompts = expected["prompt_ids"].repeat(len(forced), 1)
    encoded = model.encode_prompts("vq", prompts, pad_token_id=PAD)
    draw_tokens(model, encoded, num_tokens=forced.shape[1], guidance_scale=5.0, choose=choose)
    logits = torch.stack(found, dim=1)
    torch.testing.assert_close(
        logits[..., ::64], expected["guided_logits_sub"], rtol=0, atol=TOLERANCE
    )
    assert torch.equal(logits.argmax(-1), expected["guided_argmax"])


def test_tokens_are_decoded_as_published(
    model: JanusFlowForConditionalGeneration, expected: dict[str, Tensor]
) -> None:
    with torch.no_grad():
        pixels = model.vq_head.tokenizer.decode(expected["grid_tokens"].long())
    torch.testing.assert_close(
        pixels[:, :, ::8, ::8], expected["decoded_sub"], rtol=0, atol=TOLERANCE
    )
    shown = model.vq_head.decode(expected["grid_tokens"].long())
    assert torch.equal(shown, pixels.clamp(-1, 1))


def test_pictures_are_encoded_as_published(
    model: JanusFlowForConditionalGeneration, expected: dict[str, Tensor]
) -> None:
    pixels = near_normal("pixels", (1, 3, 384, 384), 0.5).clamp(-1, 1)
    tokenizer = model.vq_head.tokenizer
    with torch.no_grad():
        features = tokenizer.quant_conv(tokenizer.encoder(pixels))
    torch.testing.assert_close(features, expected["encoder_out"], rtol=0, atol=TOLERANCE)
    tokens = model.vq_head.encode(pixels)
    # The nearest of two codes can be a matter of the last bit.
    assert (tokens.flatten() == expected["encoded_tokens"].flatten()).sum() >= 575


def test_pictures_are_understood_as_published(
    model: JanusFlowForConditionalGeneration, expected: dict[str, Tensor]
) -> None:
    pixels = near_normal("pixels", (1, 3, 384, 384), 0.5).clamp(-1, 1)
    with torch.no_grad():
        features = model.get_image_features(pixels)
    torch.testing.assert_close(
        features[:, ::24, ::8], expected["und_features"], rtol=0, atol=TOLERANCE
    )
