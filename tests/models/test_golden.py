"""The published implementation's numbers, through the loader of its checkpoints.

`tests/golden/fill.py` makes every weight from its name and shape, so the folder is written here.
"""

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

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(GOLDEN / "janusflow_shallow.safetensors")


@pytest.fixture(scope="module")
def model(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[JanusFlowForConditionalGeneration]:
    folder = tmp_path_factory.mktemp("golden")
    shutil.copyfile(GOLDEN / "janusflow_shallow.config.json", folder / "config.json")
    layout = json.loads((GOLDEN / "janusflow_shallow.layout.json").read_text())
    save_file(
        {name: fill(name, tuple(shape)) for name, shape in layout.items()},
        folder / "model.safetensors",
    )
    try:
        yield JanusFlowForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def drawn(
    model: JanusFlowForConditionalGeneration, expected: dict[str, Tensor]
) -> dict[str, Tensor]:
    """One run of generate_latents, and what passed inside it."""
    found: dict[str, Tensor] = {}
    calls: dict[str, list[Tensor]] = {"time": [], "encoder": [], "layer": [], "velocity": []}
    hooks = [
        module.register_forward_hook(lambda _, __, output, key=key: calls[key].append(output))
        for key, module in (
            ("time", model.flow_head.time_embedding),
            ("encoder", model.flow_head.encoder),
            ("layer", model.language_model.model.layers[0]),
            ("velocity", model.flow_head.decoder),
        )
    ]

    def record(index: int, _: Tensor, latents: Tensor) -> None:
        found[f"z_step{index + 1}"] = latents

    noise = expected["z0"].clone()
    found["latents"] = model.generate_latents(
        expected["prompt_ids"][None],
        latents=noise,
        num_inference_steps=4,
        guidance_scale=2.0,
        pad_token_id=1,
        on_step=record,
    )
    for hook in hooks:
        hook.remove()
    for step, velocity in enumerate(calls["velocity"]):
        found[f"v_cond_step{step}"], found[f"v_uncond_step{step}"] = velocity.chunk(2)
    found["t_emb_step1"] = calls["time"][1][:1]
    found["z_enc_step1"] = calls["encoder"][1][:1, ::16]
    in_steps = [states for states in calls["layer"] if len(states) == 4]
    image_tokens = in_steps[1][:1, 1:]  # the time token stands in front
    found["llm_hidden_layer1_step1"] = image_tokens[:, ::36]
    assert torch.equal(noise, expected["z0"])
    return found


@pytest.mark.parametrize(
    "name",
    [
        "t_emb_step1",
        "z_enc_step1",
        "llm_hidden_layer1_step1",
        *[f"{kind}_step{step}" for step in range(4) for kind in ("v_cond", "v_uncond")],
        *[f"z_step{step}" for step in range(1, 5)],
    ],
)
def test_drawing_agrees_with_the_published_implementation(
    name: str, drawn: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    torch.testing.assert_close(drawn[name], expected[name], rtol=0, atol=TOLERANCE)


def test_the_last_step_is_what_is_returned(drawn: dict[str, Tensor]) -> None:
    assert torch.equal(drawn["latents"], drawn["z_step4"])


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    """One conversation's two pictures, (1, 2, 3, 384, 384)."""
    return near_normal("pixels", (1, 2, 3, 384, 384), 0.5).clamp(-1, 1)


def test_a_conversation_with_two_pictures_is_continued_as_published(
    model: JanusFlowForConditionalGeneration, pixels: Tensor, expected: dict[str, Tensor]
) -> None:
    features: list[Tensor] = []
    hook = model.vision_model.register_forward_hook(
        lambda _, __, output: features.append(output.last_hidden_state)
    )
    ids = expected["und_input_ids"]
    new = expected["und_greedy_ids"].shape[1]
    output = model.generate(
        input_ids=ids,
        pixel_values=pixels,
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=1,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    hook.remove()
    (tower,) = features  # the pictures are looked at once
    torch.testing.assert_close(
        tower[:1, ::24, ::8], expected["und_features_image0"], rtol=0, atol=TOLERANCE
    )
    torch.testing.assert_close(
        output.logits[0], expected["und_last_logits"], rtol=0, atol=TOLERANCE
    )
    assert torch.equal(output.sequences[:, ids.shape[1] :], expected["und_greedy_ids"])


def test_conversations_of_different_length_in_one_batch_agree_with_the_published_ones(
    model: JanusFlowForConditionalGeneration, pixels: Tensor, expected: dict[str, Tensor]
) -> None:
    images = torch.cat([pixels[0], pixels[0, 1:]])  # the second row shows the second picture
    with torch.no_grad():
        logits = model(
            input_ids=expected["und_batch_input_ids"],
            attention_mask=expected["und_batch_attention_mask"],
            pixel_values=images,
            logits_to_keep=1,
        ).logits[:, -1]
    torch.testing.assert_close(logits, expected["und_batch_last_logits"], rtol=0, atol=TOLERANCE)
