"""The pipeline with the VQ head, alone and beside the flow head, on random weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import make_pipeline
from transformers import AutoProcessor

from janusflow import JanusFlowConfig, JanusFlowPipeline, SettingsError
from janusflow.models.checkpoints import convert

PROMPT = "a red circle above a blue square"
LONG = "a blue square, a red circle, a green one and what is there beside them"
TOKENS = 16


@pytest.fixture(scope="module")
def pipe() -> JanusFlowPipeline:
    return make_pipeline(("flow", "vq"))


@pytest.fixture(scope="module")
def vq_alone() -> JanusFlowPipeline:
    return make_pipeline(("vq",))


def draw(pipe: JanusFlowPipeline, prompt: Any = PROMPT, **options: Any) -> Any:
    return pipe(prompt, **{"head": "vq", "output_type": "latent"} | options)


def test_the_switch_chooses_the_head(pipe: JanusFlowPipeline, vq_alone: JanusFlowPipeline) -> None:
    flow = pipe(PROMPT, num_inference_steps=2, seed=0, output_type="latent")
    assert (flow.tokens, flow.latents.shape, flow.nfe) == (None, (1, 4, 8, 8), 2)
    tokens = draw(pipe, seed=0)
    assert tokens.latents is None
    assert (tokens.nfe, tokens.num_forward_passes) == (TOKENS, 2 * TOKENS)
    assert tokens.tokens.shape == (1, TOKENS)
    assert tokens.images is tokens.tokens
    assert vq_alone(PROMPT, seed=0, output_type="latent").tokens.shape == (1, TOKENS)
    with pytest.raises(SettingsError, match="no generation head 'flow'; it holds: vq"):
        vq_alone(PROMPT, head="flow")
    with pytest.raises(SettingsError, match="no generation head 'vq'; it holds: flow"):
        make_pipeline()(PROMPT, head="vq")


def test_the_flow_head_draws_as_if_it_were_alone(pipe: JanusFlowPipeline) -> None:
    alone = make_pipeline()
    weights = {k: v for k, v in pipe.model.state_dict().items() if not k.startswith("vq_head.")}
    alone.model.load_state_dict(weights)
    options = {"num_inference_steps": 2, "seed": 0, "output_type": "latent"}
    assert torch.equal(pipe(PROMPT, **options).latents, alone(PROMPT, **options).latents)


def test_an_image_is_the_same_alone_in_a_batch_and_beside_longer_prompts(
    pipe: JanusFlowPipeline,
) -> None:
    alone = draw(pipe, seed=14).tokens
    assert not torch.equal(alone, draw(pipe, seed=15).tokens)
    in_seven = draw(pipe, [PROMPT] * 7, seed=11).tokens[3:4]
    beside = draw(pipe, [LONG, PROMPT, LONG], seed=13).tokens[1:2]
    in_pieces = draw(pipe, [LONG, PROMPT], num_images_per_prompt=3, seed=11, batch_size=2)
    for other in (in_seven, beside, in_pieces.tokens[3:4]):
        assert torch.equal(alone, other)


def test_the_pipeline_draws_what_the_model_draws_from_the_same_ids(
    pipe: JanusFlowPipeline,
) -> None:
    ids, mask = pipe.processor.generation_prompts([PROMPT, LONG], tag="vq")
    assert (ids[:, -1] == pipe.processor.begin_of_image_id).all()
    expected = pipe.model.generate_image_tokens(
        ids,
        attention_mask=mask,
        temperature=0.8,
        top_k=20,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
    )
    out = draw(pipe, [PROMPT, LONG], temperature=0.8, top_k=20, seed=3)
    assert torch.equal(out.tokens, expected)
    assert out.seeds == (3, 4)


def test_generators_stand_for_seeds_and_one_gives_each_image_its_own(
    pipe: JanusFlowPipeline,
) -> None:
    seeded = draw(pipe, [PROMPT] * 2, seed=5)
    given = draw(pipe, [PROMPT] * 2, generator=[torch.Generator().manual_seed(s) for s in (5, 6)])
    assert torch.equal(seeded.tokens, given.tokens)
    assert given.seeds is None
    one = [
        draw(
            pipe, [PROMPT] * 3, generator=torch.Generator().manual_seed(1), batch_size=batch
        ).tokens
        for batch in (None, 2)
    ]
    assert torch.equal(*one)
    assert len({tuple(row.tolist()) for row in one[0]}) == 3


def test_a_run_leaves_global_random_state_as_it_was(pipe: JanusFlowPipeline) -> None:
    state = torch.get_rng_state()
    draw(pipe, [PROMPT] * 2)
    draw(pipe, temperature=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_greedy_drawing_needs_no_seed(pipe: JanusFlowPipeline) -> None:
    assert torch.equal(draw(pipe, temperature=0).tokens, draw(pipe, temperature=0).tokens)


def test_every_output_type_holds_the_same_picture(pipe: JanusFlowPipeline) -> None:
    out = {kind: draw(pipe, seed=0, output_type=kind) for kind in ("pil", "pt", "np", "latent")}
    pixels = out["pt"].images
    assert pixels.shape == (1, 3, 32, 32)
    expected = pipe.model.vq_head.decode(out["latent"].tokens) / 2 + 0.5
    assert torch.equal(pixels, expected)
    assert np.array_equal(out["np"].images[0], pixels[0].permute(1, 2, 0).numpy())
    shown = np.asarray(out["pil"].images[0], np.float32) / 255
    assert np.abs(shown - out["np"].images[0]).max() <= 0.5 / 255 + 1e-6


def test_a_callback_sees_every_token(pipe: JanusFlowPipeline) -> None:
    seen = []

    def look(_: Any, index: int, share: float, held: dict[str, torch.Tensor]) -> None:
        seen.append((index, share, held["tokens"].shape))

    draw(pipe, [PROMPT] * 2, callback_on_step_end=look)
    assert seen == [(i, (i + 1) / TOKENS, (2, i + 1)) for i in range(TOKENS)]
    with pytest.raises(SettingsError, match="cannot be exchanged"):
        draw(pipe, callback_on_step_end=lambda *call: {"tokens": call[3]["tokens"]})
    with pytest.raises(SettingsError, match="the vq head knows: tokens"):
        draw(pipe, callback_on_step_end_tensor_inputs=["latents"])


def test_an_interrupted_run_gives_the_tokens_that_it_has(pipe: JanusFlowPipeline) -> None:
    whole = draw(pipe, [PROMPT] * 3, seed=0).tokens

    def stop(running: JanusFlowPipeline, index: int, *_: Any) -> None:
        running.interrupt = index == 4

    out = draw(
        pipe, [PROMPT] * 3, seed=0, batch_size=2, callback_on_step_end=stop, output_type="pil"
    )
    assert out.tokens.shape == (3, 5)
    assert torch.equal(out.tokens[:2], whole[:2, :5])
    assert not out.tokens[2].any()  # of a batch that never began
    assert out.nfe == 5
    padded = torch.nn.functional.pad(out.tokens, (0, TOKENS - 5))
    expected = (pipe.model.vq_head.decode(padded) / 2 + 0.5).permute(0, 2, 3, 1)
    for image, pixels in zip(out.images, expected, strict=True):
        assert np.abs(np.asarray(image) / 255 - pixels.numpy()).max() < 0.01
    assert draw(pipe, [PROMPT] * 3, seed=0).tokens.shape == (3, TOKENS)


def test_the_progress_bar_counts_tokens(
    pipe: JanusFlowPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe.set_progress_bar_config(disable=False)
    try:
        draw(pipe)
    finally:
        pipe.set_progress_bar_config(disable=True)
    assert f"{TOKENS}/{TOKENS}" in capsys.readouterr().err


def test_a_saved_pipeline_with_both_heads_draws_the_same(
    pipe: JanusFlowPipeline, tmp_path: Path
) -> None:
    pipe.save_pretrained(tmp_path)
    loaded = JanusFlowPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.model.generation_heads == ("flow", "vq")
    assert torch.equal(draw(loaded, seed=0).tokens, draw(pipe, seed=0).tokens)


def test_a_pipeline_with_the_vq_head_alone_needs_no_autoencoder(
    vq_alone: JanusFlowPipeline, tmp_path: Path
) -> None:
    vq_alone.save_pretrained(tmp_path)
    loaded = JanusFlowPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.vae is None
    (picture,) = loaded(PROMPT, seed=0).images
    assert picture.size == (32, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latents": torch.zeros(1, 4, 8, 8)}, "noise of the flow head"),
        ({"height": 64}, "draws 32 x 32 px only"),
        ({"width": 0}, "draws 32 x 32 px only"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"seed": 1, "generator": torch.Generator()}, "seed and generator"),
        ({"generator": [torch.Generator()] * 2}, "2 generators for 1 images"),
        ({"output_type": "jpeg"}, "output_type"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_input_is_refused(
    pipe: JanusFlowPipeline, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        draw(pipe, **options)


def test_options_of_the_other_head_are_warned_of(
    pipe: JanusFlowPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "janusflow"):
        pipe(PROMPT, num_inference_steps=1, output_type="latent", temperature=0.5, top_k=3)
        draw(pipe, temperature=0, top_p=0.5)
    assert [record.getMessage() for record in caplog.records] == [
        "flow drawing makes no use of temperature, top_k",
        "greedy VQ drawing makes no use of top_p",
    ]


def test_a_folder_converted_for_transformers_is_read_there_and_here(tmp_path: Path) -> None:
    pipe = make_pipeline(("vq",))
    pipe.model.config.learned_begin_embedding = False  # Janus has none
    del pipe.model.begin_embedding
    pipe.save_pretrained(tmp_path / "ours")
    folder = convert(tmp_path / "ours", tmp_path / "theirs", to="transformers")
    theirs = AutoProcessor.from_pretrained(folder)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    text = {"type": "text", "text": "What is above?"}
    asked = [{"role": "user", "content": [{"type": "image"}, text]}]
    prompt = theirs.apply_chat_template(asked, add_generation_prompt=True)
    read = theirs(text=prompt, images=picture, return_tensors="pt")
    content = [{"type": "image", "image": picture}, text]
    own = pipe.processor([[{"role": "user", "content": content}]], system_prompt="")
    assert torch.equal(read["input_ids"], own["input_ids"])
    assert torch.equal(read["pixel_values"], own["pixel_values"])
    back = JanusFlowPipeline.from_pretrained(folder)
    back.set_progress_bar_config(disable=True)
    assert torch.equal(draw(back, seed=0).tokens, draw(pipe, seed=0).tokens)
    assert back.processor.num_image_tokens == 16


def test_a_model_may_say_what_its_heads_draw_with(pipe: JanusFlowPipeline) -> None:
    published = {"guidance_scale": 5.0, "temperature": 1.0}
    own = {"guidance_scale": 1.0, "temperature": 0.1, "top_k": 3}
    by_default = draw(pipe, seed=5).tokens
    asked = draw(pipe, seed=5, **own).tokens
    assert torch.equal(by_default, draw(pipe, seed=5, **published).tokens)
    assert not torch.equal(by_default, asked)
    pipe.model.config.drawing_defaults = {"vq": own}
    try:
        assert torch.equal(draw(pipe, seed=5).tokens, asked)
        every = draw(pipe, seed=5, top_k=40, **published).tokens
        assert torch.equal(every, by_default)
    finally:
        pipe.model.config.drawing_defaults = None


@pytest.mark.parametrize(
    "defaults", [{"vk": {}}, {"vq": {"temperatures": 1.0}}, {"flow": {"temperature": 1.0}}]
)
def test_defaults_that_no_head_knows_are_refused(defaults: dict) -> None:
    with pytest.raises(SettingsError, match="drawing_defaults"):
        JanusFlowConfig(drawing_defaults=defaults)
