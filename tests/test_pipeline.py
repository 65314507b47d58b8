"""The pipeline on random weights: what an image depends on, and what happens to bad input."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import make_pipeline, make_processor, make_vae

from janusflow import (
    CheckpointError,
    ImageError,
    JanusFlowError,
    JanusFlowPipeline,
    PromptError,
    SettingsError,
)
from janusflow.models import autoencoder as autoencoder_module

PROMPT = "a red circle above a blue square"
LONG = "a blue square, a red circle, a green one and what is there beside them"
SIZE = (4, 8, 8)
STEPS = 3


@pytest.fixture(scope="module")
def shared() -> JanusFlowPipeline:
    return make_pipeline()


@pytest.fixture
def pipe(shared: JanusFlowPipeline) -> Iterator[JanusFlowPipeline]:
    """The same weights for every test, and the autoencoder back in its place afterwards."""
    vae = shared.vae
    yield shared
    shared.vae = vae


def draw(pipe: JanusFlowPipeline, prompt: Any = PROMPT, **options: Any) -> Any:
    return pipe(prompt, **{"num_inference_steps": STEPS, "output_type": "latent"} | options)


def noise_of(pipe: JanusFlowPipeline, prompt: Any, **options: Any) -> torch.Tensor:
    """The noise that a call starts from, as the model gets it."""
    seen: list[torch.Tensor] = []
    whole = pipe.model.velocity
    pipe.model.velocity = lambda x, t, prefix: seen.append(x) or torch.zeros_like(x)
    try:
        draw(pipe, prompt, num_inference_steps=1, guidance_scale=1.0, **options)
    finally:
        pipe.model.velocity = whole
    return torch.cat(seen)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    return float((one - other).abs().max())


# --- what an image depends on ------------------------------------------------------------------


def test_an_image_is_the_same_alone_in_a_batch_of_seven_and_beside_longer_prompts(
    pipe: JanusFlowPipeline,
) -> None:
    alone = draw(pipe, seed=14).latents
    assert distance(alone, draw(pipe, seed=15).latents) > 0.1  # the seed does matter
    in_seven = draw(pipe, [PROMPT] * 7, seed=11).latents[3:4]
    beside = draw(pipe, [LONG, PROMPT, LONG], seed=13).latents[1:2]
    in_pieces = draw(pipe, [LONG, PROMPT], num_images_per_prompt=3, seed=11, batch_size=2)
    for other in (in_seven, beside, in_pieces.latents[3:4]):
        assert distance(alone, other) <= 1e-4


def test_the_noise_of_an_image_is_bit_for_bit_that_of_its_own_seed(pipe: JanusFlowPipeline) -> None:
    noise = noise_of(pipe, [PROMPT, LONG], num_images_per_prompt=2, seed=5)
    for index in range(4):
        own = torch.randn(SIZE, generator=torch.Generator().manual_seed(5 + index))
        assert torch.equal(noise[index], own)


def test_prompt_and_settings_change_the_image(pipe: JanusFlowPipeline) -> None:
    base = draw(pipe, seed=0).latents
    for prompt, options in (
        (LONG, {}),
        (PROMPT, {"guidance_scale": 5.0}),
        (PROMPT, {"num_inference_steps": 7}),
    ):
        assert distance(base, draw(pipe, prompt, seed=0, **options).latents) > 1e-3


def test_the_pipeline_draws_what_the_model_draws_from_the_same_ids_and_noise(
    pipe: JanusFlowPipeline,
) -> None:
    x_0 = torch.randn(4, *SIZE)
    ids, mask = pipe.processor.generation_prompts([PROMPT, LONG])
    expected = pipe.model.generate_latents(
        ids, attention_mask=mask, latents=x_0, num_inference_steps=STEPS, guidance_scale=2.0
    )
    out = draw(pipe, [PROMPT, LONG], num_images_per_prompt=2, latents=x_0.clone())
    assert distance(out.latents, expected) <= 1e-5
    assert out.seeds is None


def test_a_run_without_a_seed_reports_the_seeds_that_repeat_it(pipe: JanusFlowPipeline) -> None:
    first, second = draw(pipe, [PROMPT] * 2), draw(pipe)
    assert first.seeds[0] != second.seeds[0]
    assert first.seeds[1] == first.seeds[0] + 1
    assert torch.equal(draw(pipe, [PROMPT] * 2, seed=first.seeds[0]).latents, first.latents)
    assert distance(draw(pipe, seed=first.seeds[1]).latents, first.latents[1:]) <= 1e-4


def test_generators_stand_for_seeds_one_for_each_image_or_one_for_all(
    pipe: JanusFlowPipeline,
) -> None:
    several = [torch.Generator().manual_seed(seed) for seed in (8, 9)]
    out = draw(pipe, [PROMPT] * 2, generator=several)
    assert torch.equal(out.latents, draw(pipe, [PROMPT] * 2, seed=8).latents)
    assert out.seeds is None
    noise = noise_of(pipe, [PROMPT] * 2, generator=torch.Generator().manual_seed(8))
    generator = torch.Generator().manual_seed(8)
    one_after_another = [torch.randn(SIZE, generator=generator) for _ in range(2)]
    assert torch.equal(noise, torch.stack(one_after_another))


def test_a_run_leaves_global_random_state_and_its_arguments_as_they_were(
    pipe: JanusFlowPipeline,
) -> None:
    x_0 = torch.randn(1, *SIZE)
    kept, state = x_0.clone(), torch.get_rng_state()
    draw(pipe, latents=x_0)
    draw(pipe)
    pipe.chat(question(), do_sample=True, max_new_tokens=4)
    assert torch.equal(x_0, kept)
    assert torch.equal(torch.get_rng_state(), state)


def test_float64_noise_is_integrated_in_float64_and_half_precision_in_float32(
    pipe: JanusFlowPipeline,
) -> None:
    noise = torch.randn(1, *SIZE)
    for given, expected in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        assert draw(pipe, latents=noise.to(given)).latents.dtype == expected


def test_other_sizes_than_the_trained_one_are_drawn(pipe: JanusFlowPipeline) -> None:
    out = draw(pipe, height=48, width=96, output_type="pil")
    assert out.latents.shape == (1, 4, 6, 12)
    assert out.images[0].size == (96, 48)


# --- cost --------------------------------------------------------------------------------------


def test_guidance_of_one_is_one_unguided_pass_a_step(pipe: JanusFlowPipeline) -> None:
    rows: list[int] = []
    whole = pipe.model.velocity
    pipe.model.velocity = lambda x, t, prefix: rows.append(len(x)) or whole(x, t, prefix)
    try:
        free = draw(pipe, seed=0, guidance_scale=1.0)
        assert rows == [1] * STEPS
        guided = draw(pipe, seed=0, guidance_scale=1.0 + 1e-7)
        assert rows[STEPS:] == [2] * STEPS
    finally:
        pipe.model.velocity = whole
    assert (free.nfe, free.num_forward_passes) == (STEPS, STEPS)
    assert (guided.nfe, guided.num_forward_passes) == (STEPS, 2 * STEPS)
    assert distance(free.latents, guided.latents) <= 1e-5


def test_a_prompt_is_run_once_whatever_the_number_of_steps_and_images(
    pipe: JanusFlowPipeline,
) -> None:
    calls: list[tuple[int, ...]] = []
    whole = pipe.model.encode_prompt
    pipe.model.encode_prompt = lambda ids, mask=None: calls.append(ids.shape) or whole(ids, mask)
    try:
        draw(pipe, [PROMPT, LONG], num_images_per_prompt=3)
    finally:
        pipe.model.encode_prompt = whole
    assert [shape[0] for shape in calls] == [2, 1]  # prompts, then the unconditional token


# --- pictures ----------------------------------------------------------------------------------


def test_every_output_type_holds_the_same_picture(pipe: JanusFlowPipeline) -> None:
    found = {kind: draw(pipe, seed=0, output_type=kind) for kind in ("pil", "pt", "np", "latent")}
    pil, pt, array = (found[kind].images for kind in ("pil", "pt", "np"))
    assert pil[0].size == (64, 64)
    assert pil[0].mode == "RGB"
    assert pt.shape == (1, 3, 64, 64)
    assert array.shape == (1, 64, 64, 3)
    assert torch.equal(torch.from_numpy(array).permute(0, 3, 1, 2), pt)
    assert float(pt.min()) >= 0
    assert float(pt.max()) <= 1
    assert np.array_equal(np.asarray(pil[0]), np.rint(255 * array[0]).astype(np.uint8))
    assert torch.equal(found["latent"].images, found["pil"].latents)


def test_latents_are_unscaled_before_they_are_decoded_and_pictures_clamped(
    pipe: JanusFlowPipeline,
) -> None:
    out = draw(pipe, seed=0, output_type="pt")
    with torch.no_grad():
        decoded = pipe.vae.decode(out.latents / pipe.vae.config.scaling_factor).sample
    assert distance(out.images, (decoded.clamp(-1, 1) + 1) / 2) <= 1e-6


def test_a_picture_is_decoded_alike_in_a_batch_that_takes_several_chunks(
    pipe: JanusFlowPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = torch.randn(5, *SIZE)
    with torch.no_grad():
        whole = autoencoder_module.decode(pipe.vae, latents)
        monkeypatch.setattr(autoencoder_module, "_DECODED_AT_ONCE", 2)
        assert distance(whole, autoencoder_module.decode(pipe.vae, latents)) <= 1e-5


# --- callbacks, progress, interruption ---------------------------------------------------------


def test_a_callback_sees_every_step_and_its_latents_take_their_place(
    pipe: JanusFlowPipeline,
) -> None:
    seen: list[tuple[int, float]] = []

    def zero_at_the_end(p: Any, step: int, t: float, held: dict) -> dict:
        assert p is pipe
        seen.append((step, t))
        return {"latents": held["latents"] * (step < STEPS - 1)}

    out = draw(pipe, seed=0, callback_on_step_end=zero_at_the_end)
    assert [step for step, _ in seen] == [0, 1, 2]
    assert [t for _, t in seen] == pytest.approx([1 / 3, 2 / 3, 1])
    assert float(out.latents.abs().max()) == 0
    plain = draw(pipe, seed=0, callback_on_step_end=lambda *_: None)
    assert torch.equal(plain.latents, draw(pipe, seed=0).latents)


def test_a_callback_that_gives_latents_of_another_shape_is_told_so(pipe: JanusFlowPipeline) -> None:
    with pytest.raises(SettingsError, match="another shape"):
        draw(pipe, callback_on_step_end=lambda *_: {"latents": torch.zeros(1)})


def test_an_interrupted_run_ends_before_the_next_step_and_gives_what_it_has(
    pipe: JanusFlowPipeline,
) -> None:
    states: list[torch.Tensor] = []

    def stop_after_two(p: JanusFlowPipeline, step: int, t: float, held: dict) -> dict:
        states.append(held["latents"])
        p.interrupt = step == 1
        return held

    out = draw(pipe, [PROMPT] * 4, seed=0, batch_size=2, callback_on_step_end=stop_after_two)
    assert len(states) == 2
    assert out.nfe == 2
    assert torch.equal(out.latents[:2], states[-1])
    assert torch.equal(out.latents[2:], noise_of(pipe, [PROMPT] * 2, seed=2))
    assert draw(pipe, seed=0).nfe == STEPS  # the next run is a whole one


def test_the_progress_bar_counts_every_step_and_can_be_switched_off(
    pipe: JanusFlowPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(pipe, [PROMPT] * 2, batch_size=1)
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config()
    try:
        draw(pipe, [PROMPT] * 2, batch_size=1)
    finally:
        pipe.set_progress_bar_config(disable=True)
    assert f"{2 * STEPS}/{2 * STEPS}" in capsys.readouterr().err


# --- saving and loading ------------------------------------------------------------------------


@pytest.fixture
def saved(pipe: JanusFlowPipeline, tmp_path: Path) -> Path:
    pipe.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_saved_pipeline_draws_and_answers_the_same(
    pipe: JanusFlowPipeline, saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="janusflow.pipeline"):
        again = JanusFlowPipeline.from_pretrained(saved)
    assert len(caplog.messages) == 1
    assert "flow" in caplog.messages[0]
    assert str(saved) in caplog.messages[0]
    again.set_progress_bar_config(disable=True)
    for one, other in zip(pipe.components.values(), again.components.values(), strict=True):
        if isinstance(one, torch.nn.Module):
            assert not other.training
            weights = other.state_dict()
            assert all(torch.equal(v, weights[k]) for k, v in one.state_dict().items())
    one, other = (draw(p, seed=0, output_type="np") for p in (pipe, again))
    assert np.array_equal(one.images, other.images)
    assert pipe.chat(question()) == again.chat(question())


def test_a_pipeline_without_an_autoencoder_gives_latents_and_says_so(
    pipe: JanusFlowPipeline, saved: Path, tmp_path: Path
) -> None:
    bare = JanusFlowPipeline.from_pretrained(saved, vae=None)
    bare.set_progress_bar_config(disable=True)
    assert torch.equal(draw(bare, seed=0).latents, draw(pipe, seed=0).latents)
    with pytest.raises(SettingsError, match='output_type="latent"'):
        bare(PROMPT)
    bare.save_pretrained(tmp_path / "bare")
    assert JanusFlowPipeline.from_pretrained(tmp_path / "bare").vae is None
    given = JanusFlowPipeline.from_pretrained(tmp_path / "bare", vae=saved / "vae")
    assert torch.equal(given.vae.state_dict()["decoder.conv_in.weight"],
                       pipe.vae.state_dict()["decoder.conv_in.weight"])  # fmt: skip
    assert JanusFlowPipeline.from_pretrained(saved, vae=pipe.vae).vae is pipe.vae


def test_a_folder_in_the_published_layout_draws_and_answers_the_same(
    pipe: JanusFlowPipeline, saved: Path, tmp_path: Path
) -> None:
    from janusflow.models.checkpoints import convert

    folder = tmp_path / "published"
    convert(saved, folder, to="published")
    again = JanusFlowPipeline.from_pretrained(folder, vae=saved / "vae")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again, seed=0).latents, draw(pipe, seed=0).latents)
    assert again.chat(question()) == pipe.chat(question())
    shutil.rmtree(folder / "vae", ignore_errors=True)
    with pytest.raises(CheckpointError, match=r"stabilityai/sdxl-vae.*vae=FOLDER"):
        JanusFlowPipeline.from_pretrained(folder)  # the tests have no network


def test_weights_are_loaded_in_the_dtype_that_is_asked_for(saved: Path) -> None:
    half = JanusFlowPipeline.from_pretrained(saved, torch_dtype=torch.bfloat16, device="cpu")
    half.set_progress_bar_config(disable=True)
    assert half.model.dtype == half.vae.dtype == torch.bfloat16
    out = draw(half, output_type="pil")
    assert out.latents.dtype == torch.float32
    assert isinstance(half.chat(question(), max_new_tokens=3), str)


def test_the_autoencoder_stays_out_of_float16_and_a_warning_says_so(
    saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    half = JanusFlowPipeline.from_pretrained(saved, torch_dtype=torch.float16)
    assert half.model.dtype == torch.float16
    assert half.vae.dtype == torch.float32
    assert "float32" in caplog.text
    caplog.clear()
    half.set_progress_bar_config(disable=True)
    half.model.float()
    half.vae.half()
    draw(half, output_type="pil")
    assert half.vae.dtype == torch.float32
    assert "float32" in caplog.text
    caplog.clear()
    given = JanusFlowPipeline.from_pretrained(saved, vae=make_vae().half())
    assert given.vae.dtype == torch.float32
    assert "float32" in caplog.text


def test_an_unknown_argument_of_from_pretrained_is_refused(saved: Path) -> None:
    with pytest.raises(TypeError, match="tourch_dtype"):
        JanusFlowPipeline.from_pretrained(saved, tourch_dtype=torch.float32)
    with pytest.raises(SettingsError, match="torch_dtype"):
        JanusFlowPipeline.from_pretrained(saved, torch_dtype=torch.int64)
    with pytest.raises(SettingsError, match="torch_dtype"):
        JanusFlowPipeline.from_pretrained(saved, torch_dtype="float32")


def test_an_autoencoder_that_cannot_be_had_is_refused_with_the_way_out(
    saved: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="vae=None"):
        JanusFlowPipeline.from_pretrained(saved, vae="nobody/nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        JanusFlowPipeline.from_pretrained(saved, vae=tmp_path / "empty")


def test_a_damaged_autoencoder_is_refused(saved: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = saved / "vae" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        JanusFlowPipeline.from_pretrained(saved)
    weights.write_bytes(whole)
    tensors = load_file(weights)
    bias = tensors.pop("decoder.conv_out.bias")
    save_file(tensors, weights)
    with pytest.raises(CheckpointError, match=r"missing keys: decoder\.conv_out\.bias"):
        JanusFlowPipeline.from_pretrained(saved)
    save_file({**tensors, "decoder.conv_out.bias": bias, "surplus": bias.clone()}, weights)
    with pytest.raises(CheckpointError, match="unexpected keys: surplus"):
        JanusFlowPipeline.from_pretrained(saved)
    save_file({**tensors, "decoder.conv_out.bias": torch.zeros(7)}, weights)
    with pytest.raises(CheckpointError, match=r"damaged|mismatched"):
        JanusFlowPipeline.from_pretrained(saved)


def test_parts_that_do_not_belong_together_are_refused(pipe: JanusFlowPipeline) -> None:
    from diffusers import AutoencoderKL

    other = AutoencoderKL(norm_num_groups=4, block_out_channels=(8,), latent_channels=8)
    with pytest.raises(CheckpointError, match="8 latent channels at 1/1"):
        JanusFlowPipeline(pipe.model, pipe.processor, other)
    processor = make_processor()
    processor.num_image_tokens = 9
    with pytest.raises(CheckpointError, match="9 tokens"):
        JanusFlowPipeline(pipe.model, processor)
    processor.num_image_tokens = 16
    processor.image_token_id += 1
    with pytest.raises(CheckpointError, match="image_token_id"):
        JanusFlowPipeline(pipe.model, processor)


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "options", "error", "says"),
    [
        ([], {}, PromptError, "at least one prompt"),
        (None, {}, PromptError, "NoneType"),
        (["a", 3], {}, PromptError, "prompt 1 must be text"),
        ("word " * 300, {}, PromptError, "shorten"),
        ("a", {"head": "vq"}, SettingsError, "holds: flow"),
        ("a", {"head": "fluw"}, SettingsError, "holds: flow"),
        ("a", {"num_inference_steps": 0}, SettingsError, "at least 1"),
        ("a", {"num_inference_steps": -3}, SettingsError, "at least 1"),
        ("a", {"num_inference_steps": 2.5}, SettingsError, "whole number"),
        ("a", {"num_inference_steps": "3"}, SettingsError, "whole number"),
        ("a", {"guidance_scale": float("nan")}, SettingsError, "finite"),
        ("a", {"guidance_scale": float("inf")}, SettingsError, "finite"),
        ("a", {"guidance_scale": "much"}, SettingsError, "finite"),
        ("a", {"solver": "oiler"}, SettingsError, "euler"),
        ("a", {"num_images_per_prompt": 0}, SettingsError, "num_images_per_prompt"),
        ("a", {"batch_size": 0}, SettingsError, "batch_size"),
        ("a", {"height": 60}, SettingsError, "multiple of 16"),
        ("a", {"width": -16}, SettingsError, "width"),
        ("a", {"height": 16.0}, SettingsError, "height"),
        ("a", {"height": 256, "width": 256}, SettingsError, "no room for a prompt"),
        ("a", {"seed": -1}, SettingsError, "seed must be"),
        ("a", {"seed": 1.5}, SettingsError, "seed must be"),
        ("a", {"seed": 2**63}, SettingsError, "seed must be"),
        ("a", {"seed": 1, "generator": torch.Generator()}, SettingsError, "give one of them"),
        ("a", {"seed": 1, "latents": torch.zeros(1, *SIZE)}, SettingsError, "give one of them"),
        ("a", {"generator": [torch.Generator()] * 2}, SettingsError, "2 generators for 1"),
        ("a", {"generator": [7]}, SettingsError, r"torch\.Generator"),
        ("a", {"latents": torch.zeros(2, *SIZE)}, SettingsError, r"\(1, 4, 8, 8\)"),
        ("a", {"latents": torch.zeros(1, 4, 6, 6)}, SettingsError, "height and width"),
        ("a", {"latents": [0.0]}, SettingsError, "list"),
        ("a", {"output_type": "jpg"}, SettingsError, "pil, pt, np, latent"),
        ("a", {"callback_on_step_end_tensor_inputs": ["noise"]}, SettingsError, "noise"),
    ],
)
def test_bad_input_is_refused_before_anything_is_computed(
    pipe: JanusFlowPipeline,
    monkeypatch: pytest.MonkeyPatch,
    prompt: Any,
    options: dict,
    error: type[JanusFlowError],
    says: str,
) -> None:
    def computes(*_: object, **__: object) -> None:
        raise AssertionError("it began")

    monkeypatch.setattr(pipe.model, "encode_prompt", computes)
    with pytest.raises(error, match=says):
        pipe(prompt, **options)


def test_an_argument_with_a_typo_is_no_argument(pipe: JanusFlowPipeline) -> None:
    with pytest.raises(TypeError, match="guidance_scael"):
        pipe(PROMPT, guidance_scael=3.0)


# --- answers -----------------------------------------------------------------------------------


def question(text: str = "What is above?", colour: str = "red") -> list[dict[str, Any]]:
    image = Image.new("RGB", (50, 30), colour)
    content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


CONVERSATIONS = [
    question(),
    question("How many circles are there? Where is the blue one?", "blue"),
    [{"role": "user", "content": "What colour is the square?"}],
]


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 3, "top_p": 0.9}])
def test_answers_of_a_batch_are_those_of_its_conversations(
    pipe: JanusFlowPipeline, options: dict
) -> None:
    batch = pipe.chat(CONVERSATIONS, max_new_tokens=12, **options)
    singles = []
    for index, one in enumerate(CONVERSATIONS):
        own = options | ({"seed": options["seed"] + index} if options else {})
        singles.append(pipe.chat(one, max_new_tokens=12, **own))
    assert batch == singles
    assert len(set(batch)) == 3


def test_a_list_of_one_conversation_gives_a_list(pipe: JanusFlowPipeline) -> None:
    assert pipe.chat([question()], max_new_tokens=4) == [pipe.chat(question(), max_new_tokens=4)]


def test_both_forms_of_a_conversation_give_the_same_answer(pipe: JanusFlowPipeline) -> None:
    image = Image.new("RGB", (50, 30), "red")
    published = [
        {"role": "User", "content": "<image_placeholder>\nWhat is above?", "images": [image]},
        {"role": "Assistant", "content": ""},
    ]
    beside = [{"role": "User", "content": "<image_placeholder>\nWhat is above?"}]
    expected = pipe.chat(question(), max_new_tokens=8)
    assert pipe.chat(published, max_new_tokens=8) == expected
    assert pipe.chat(beside, images=[image], max_new_tokens=8) == expected
    assert pipe.chat(question(), max_new_tokens=8, system_prompt="") != expected


def test_sampling_repeats_by_its_seed_and_differs_without(pipe: JanusFlowPipeline) -> None:
    def ask(**options: Any) -> str:
        return pipe.chat(question(), max_new_tokens=8, do_sample=True, **options)

    assert ask(seed=1) == ask(seed=1)
    assert len({ask(seed=1), ask(seed=2), ask(), ask()}) == 4
    greedy = pipe.chat(question(), max_new_tokens=8)
    assert ask(seed=1, top_k=1) == greedy
    assert ask(seed=1, temperature=1e-4) == greedy
    assert ask(seed=1, min_p=1.0) == greedy


def test_tokens_are_sampled_as_often_as_their_probability_says() -> None:
    from janusflow.models.answers import sampling_processors

    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    draws = sampling_processors({"temperature": 0.5, "top_k": 3}, [torch.Generator()])
    count = torch.zeros(4)
    for _ in range(4000):
        count[draws(None, logits).argmax()] += 1
    expected = torch.softmax(torch.tensor([4.0, 2.0, 0.0, -torch.inf]), 0)
    assert count / 4000 == pytest.approx(expected, abs=0.02)


def test_an_option_without_effect_is_warned_of(
    pipe: JanusFlowPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    pipe.chat(question(), max_new_tokens=1, temperature=0.5)
    assert "temperature has no effect" in caplog.text


def test_other_options_of_generate_are_handed_on(pipe: JanusFlowPipeline) -> None:
    free = pipe.chat(question(), max_new_tokens=24)
    assert pipe.chat(question(), max_new_tokens=24, no_repeat_ngram_size=1) != free
    assert pipe.chat(question(), max_new_tokens=24, num_beams=3) != free


def test_a_streamed_answer_comes_in_pieces_and_is_the_whole_answer(pipe: JanusFlowPipeline) -> None:
    for options in ({}, {"do_sample": True, "seed": 4}):
        pieces = list(pipe.chat(question(), max_new_tokens=40, stream=True, **options))
        assert len(pieces) > 1
        assert "".join(pieces) == pipe.chat(question(), max_new_tokens=40, **options)


def test_an_abandoned_stream_stops_the_generation(pipe: JanusFlowPipeline) -> None:
    forwards = 0

    def count(*_: object) -> None:
        nonlocal forwards
        forwards += 1
        time.sleep(0.01)

    hook = pipe.model.register_forward_pre_hook(count)
    try:
        options = {"max_new_tokens": 100, "min_new_tokens": 100, "system_prompt": ""}
        stream = pipe.chat(question(), stream=True, **options)
        next(stream)
        stream.close()
        time.sleep(0.1)
    finally:
        hook.remove()
    assert forwards < 90


def test_an_error_in_the_streaming_thread_reaches_the_reader(
    pipe: JanusFlowPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(**_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(pipe.model, "generate", breaks)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(pipe.chat(question(), stream=True))


def test_an_answer_ends_where_the_context_does(pipe: JanusFlowPipeline) -> None:
    text = "what is the blue square " * 12
    length = pipe.processor(question(text))["input_ids"].shape[1]
    assert 150 < length < 256
    seen = []
    whole = pipe.model.generate
    pipe.model.generate = lambda **given: seen.append(whole(**given)) or seen[-1]
    try:
        pipe.chat(question(text), max_new_tokens=1000, min_new_tokens=1)
    finally:
        pipe.model.generate = whole
    assert seen[0].shape[1] <= 256


@pytest.mark.parametrize(
    ("messages", "options", "error", "says"),
    [
        ([], {}, PromptError, "empty"),
        ("What?", {}, PromptError, "str"),
        ([{"role": "user", "content": "word " * 300}], {}, PromptError, "shorten"),
        (question(), {"max_new_tokens": 0}, SettingsError, "max_new_tokens"),
        (question(), {"repetition_penality": 1.1}, SettingsError, "repetition_penalty"),
        (question(), {"num_return_sequences": 2}, SettingsError, "num_return_sequences"),
        (question(), {"repetition_penalty": -1.0}, SettingsError, "repetition_penalty"),
        (question(), {"do_sample": True, "temperature": 0.0}, SettingsError, "temperature"),
        (question(), {"do_sample": True, "temperature": float("nan")}, SettingsError, "finite"),
        (question(), {"do_sample": True, "top_p": 1.5}, SettingsError, "top_p"),
        (question(), {"do_sample": True, "top_k": 0}, SettingsError, "top_k"),
        (question(), {"do_sample": True, "top_k": "3"}, SettingsError, "top_k"),
        (question(), {"do_sample": True, "seed": -1}, SettingsError, "seed"),
        (question(), {"do_sample": True, "num_beams": 2}, SettingsError, "num_beams"),
        (CONVERSATIONS, {"stream": True}, SettingsError, "one conversation"),
        (
            [{"role": "user", "content": [{"type": "image", "image": "no.png"}]}],
            {},
            ImageError,
            "no.png",
        ),
    ],
)
def test_a_bad_question_is_refused(
    pipe: JanusFlowPipeline, messages: Any, options: dict, error: type[JanusFlowError], says: str
) -> None:
    with pytest.raises(error, match=says):
        pipe.chat(messages, **options)


# --- devices -----------------------------------------------------------------------------------


def test_a_pipeline_knows_its_device_and_stays_whole_when_moved(pipe: JanusFlowPipeline) -> None:
    assert pipe.to("cpu").device == torch.device("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_an_offloaded_pipeline_draws_and_answers_the_same(saved: Path) -> None:
    plain = JanusFlowPipeline.from_pretrained(saved, device="cuda")
    sent_away = JanusFlowPipeline.from_pretrained(saved)
    sent_away.enable_model_cpu_offload()
    for one in (plain, sent_away):
        one.set_progress_bar_config(disable=True)
    pictures = [draw(one, seed=0, output_type="pt").images for one in (plain, sent_away)]
    assert distance(*pictures) <= 1e-4
    assert next(sent_away.model.parameters()).device.type == "cpu"
    assert plain.chat(question()) == sent_away.chat(question())
    assert next(sent_away.model.parameters()).device.type == "cpu"
