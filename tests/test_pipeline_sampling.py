"""Sampling options of the pipeline: guidance, solvers, grids, shared prompts, edits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from tiny import make_pipeline

from janusflow import JanusFlowPipeline, PromptError, SettingsError
from janusflow.flow.guidance import Guidance
from janusflow.flow.solvers import solver_names
from janusflow.models.autoencoder import encode

PROMPT = "a red circle above a blue square"
OTHER = "a green one"


@pytest.fixture(scope="module")
def pipe() -> JanusFlowPipeline:
    return make_pipeline()


@pytest.fixture(scope="module")
def both() -> JanusFlowPipeline:
    return make_pipeline(("flow", "vq"), image_size=32)


def draw(pipe: JanusFlowPipeline, prompt: Any = PROMPT, **options: Any) -> Any:
    return pipe(prompt, **{"num_inference_steps": 4, "output_type": "latent", "seed": 3} | options)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    return float((one - other).abs().max())


def rows_computed(pipe: JanusFlowPipeline, **options: Any) -> tuple[Any, list[int]]:
    """A call's output, and how many rows each evaluation of the network had."""
    rows: list[int] = []
    whole = pipe.model.velocity

    def counted(x: torch.Tensor, t: Any, prefix: Any) -> torch.Tensor:
        rows.append(len(x))
        return whole(x, t, prefix)

    pipe.model.velocity = counted
    try:
        return draw(pipe, **options), rows
    finally:
        pipe.model.velocity = whole


# --- guidance ----------------------------------------------------------------------------------


def test_outside_the_interval_no_unconditional_row_is_computed(pipe: JanusFlowPipeline) -> None:
    guidance = Guidance(3.0, interval=(0.25, 0.5))
    output, rows = rows_computed(pipe, guidance=guidance)
    assert rows == [1, 2, 2, 1]
    assert (output.nfe, output.num_forward_passes) == (4, 6)
    assert distance(output.latents, draw(pipe, guidance_scale=3.0).latents) > 1e-3
    assert distance(output.latents, draw(pipe, guidance_scale=1.0).latents) > 1e-3


def test_an_interval_of_all_times_is_plain_guidance(pipe: JanusFlowPipeline) -> None:
    plain = draw(pipe, guidance_scale=3.0)
    whole, rows = rows_computed(pipe, guidance=Guidance(3.0))
    assert torch.equal(plain.latents, whole.latents)
    assert rows == [2, 2, 2, 2]


def test_a_schedule_that_is_constant_is_plain_guidance(pipe: JanusFlowPipeline) -> None:
    scheduled = draw(pipe, guidance=Guidance(lambda t: 3.0)).latents
    assert torch.equal(scheduled, draw(pipe, guidance_scale=3.0).latents)
    falling, rows = rows_computed(pipe, guidance=Guidance(lambda t: 3.0 if t < 0.5 else 1.0))
    assert rows == [2, 2, 1, 1]
    assert distance(falling.latents, scheduled) > 1e-3


@pytest.mark.parametrize("method", ["cfg-zero", "apg"])
def test_other_methods_draw_other_pictures_whatever_the_batch(
    pipe: JanusFlowPipeline, method: str
) -> None:
    guidance = Guidance(3.0, method=method, rescale=0.5)
    alone = draw(pipe, guidance=guidance).latents
    assert distance(alone, draw(pipe, guidance_scale=3.0).latents) > 1e-3
    beside = draw(pipe, [OTHER, PROMPT], seed=2, guidance=guidance).latents[1:]
    assert distance(alone, beside) <= 1e-4


def test_steps_of_rest_compute_nothing(pipe: JanusFlowPipeline) -> None:
    guidance = Guidance(3.0, method="cfg-zero", zero_init_steps=1)
    output, rows = rows_computed(pipe, guidance=guidance, return_trajectory=True)
    assert rows == [2, 2, 2]
    assert (output.nfe, output.num_forward_passes) == (3, 6)
    assert torch.equal(output.trajectory[0], output.trajectory[1])
    assert not torch.equal(output.trajectory[1], output.trajectory[2])


def test_guidance_is_given_once_and_as_what_it_is(pipe: JanusFlowPipeline) -> None:
    with pytest.raises(SettingsError, match="one of them"):
        draw(pipe, guidance=Guidance(3.0), guidance_scale=3.0)
    with pytest.raises(SettingsError, match="guidance_scale"):
        draw(pipe, guidance=3.0)


# --- negative prompts --------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["flow", "vq"])
def test_a_negative_prompt_that_is_the_prompt_takes_guidance_away(
    both: JanusFlowPipeline, head: str
) -> None:
    options = {"head": head, "temperature": None if head == "flow" else 0}
    unguided = draw(both, guidance_scale=1.0, **options).images
    against_itself = draw(both, negative_prompt=PROMPT, guidance_scale=7.0, **options).images
    assert distance(unguided.float(), against_itself.float()) <= 1e-3
    against_other = draw(both, negative_prompt=OTHER, guidance_scale=7.0, **options).images
    plain = draw(both, guidance_scale=7.0, **options).images
    assert distance(against_other.float(), against_itself.float()) > 1e-2
    assert distance(against_other.float(), plain.float()) > 1e-2


@pytest.mark.parametrize("head", ["flow", "vq"])
def test_each_prompt_has_its_own_negative_one_whatever_the_batch(
    both: JanusFlowPipeline, head: str
) -> None:
    together = draw(both, [OTHER, PROMPT], negative_prompt=["a", OTHER], seed=2, head=head).images
    alone = draw(both, PROMPT, negative_prompt=OTHER, seed=3, head=head).images
    assert distance(together[1:].float(), alone.float()) <= 1e-4


def test_negative_prompts_that_do_not_fit_are_refused(pipe: JanusFlowPipeline) -> None:
    with pytest.raises(SettingsError, match="2 negative prompts for 3 prompts"):
        draw(pipe, [PROMPT] * 3, negative_prompt=["a", "b"])
    with pytest.raises(PromptError, match="must be text"):
        draw(pipe, negative_prompt=[3])


# --- prompts that calls share ------------------------------------------------------------------


@pytest.mark.parametrize("head", ["flow", "vq"])
def test_encoded_prompts_draw_what_their_texts_draw(both: JanusFlowPipeline, head: str) -> None:
    texts = [OTHER, PROMPT]
    encoded = both.encode_prompts(texts, head=head, negative_prompt="a")
    for batch_size in (None, 1):
        options = {"head": head, "num_images_per_prompt": 2, "batch_size": batch_size}
        found = draw(both, encoded, **options).images
        expected = draw(both, texts, negative_prompt="a", **options).images
        assert distance(found.float(), expected.float()) <= 1e-4


def test_encoded_prompts_are_not_run_again(both: JanusFlowPipeline) -> None:
    encoded = both.encode_prompts(PROMPT, head="flow")
    both.model.encode_prompt = None
    try:
        draw(both, encoded, head="flow")
    finally:
        del both.model.encode_prompt


def test_encoded_prompts_are_for_one_head_and_one_use(both: JanusFlowPipeline) -> None:
    encoded = both.encode_prompts(PROMPT, head="flow", guided=False)
    draw(both, encoded, head="flow", guidance_scale=1.0)
    with pytest.raises(SettingsError, match="without guidance"):
        draw(both, encoded, head="flow", guidance_scale=2.0)
    with pytest.raises(SettingsError, match="encoded for the flow head"):
        draw(both, encoded, head="vq")
    with pytest.raises(SettingsError, match="encode_prompts"):
        draw(both, encoded, head="flow", negative_prompt="a")


# --- solvers and grids -------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [name for name in solver_names() if ":" not in name])
def test_an_image_is_the_same_in_any_batch_by_any_solver(
    pipe: JanusFlowPipeline, solver: str
) -> None:
    tolerances = {"rtol": 1e-2, "atol": 1e-2} if solver_names()[solver].adaptive else {}
    alone = draw(pipe, solver=solver, **tolerances)
    beside = draw(pipe, [OTHER, PROMPT], seed=2, solver=solver, **tolerances)
    assert distance(alone.latents, beside.latents[1:]) <= 1e-4
    assert beside.num_forward_passes == 2 * beside.nfe


def test_evaluations_are_those_of_the_network(pipe: JanusFlowPipeline) -> None:
    for solver, expected in (("ab2", 4), ("midpoint", 8), ("rk4", 16)):
        output, rows = rows_computed(pipe, solver=solver)
        assert (output.nfe, len(rows)) == (expected, expected)


def test_a_scheduler_draws_as_the_solver_that_it_is(pipe: JanusFlowPipeline) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    assert distance(draw(pipe, solver=scheduler).latents, draw(pipe).latents) <= 1e-5


def test_tolerances_are_handed_on_and_refused_where_there_are_none(
    pipe: JanusFlowPipeline,
) -> None:
    rough = draw(pipe, solver="dopri5", rtol=0.1, atol=0.1)
    fine = draw(pipe, solver="dopri5", rtol=1e-4, atol=1e-4)
    assert rough.nfe < fine.nfe
    with pytest.raises(SettingsError, match="tolerances"):
        draw(pipe, solver="euler", rtol=1e-3)


def test_times_and_shift_make_the_grid(pipe: JanusFlowPipeline) -> None:
    shifted = draw(pipe, num_inference_steps=3, shift=2.0).latents
    assert distance(shifted, draw(pipe, num_inference_steps=3).latents) > 1e-3
    given = draw(pipe, times=[0, 1 / 5, 1 / 2, 1]).latents  # t / (2 - t)
    assert distance(shifted, given) <= 1e-5
    with pytest.raises(SettingsError, match="whole grid"):
        draw(pipe, times=[0, 0.5, 1], shift=2.0)
    with pytest.raises(SettingsError, match="increase strictly"):
        draw(pipe, times=[0, 0.7, 0.3, 1])
    with pytest.raises(SettingsError, match=r"got 0 to 0\.5"):
        draw(pipe, times=[0, 0.5])


def test_the_trajectory_goes_from_the_noise_to_the_latents(pipe: JanusFlowPipeline) -> None:
    options = {"num_images_per_prompt": 3, "return_trajectory": True}
    output = draw(pipe, batch_size=2, **options)
    assert output.trajectory.shape == (5, *output.latents.shape)
    assert output.trajectory.device.type == "cpu"
    assert torch.equal(output.trajectory[-1], output.latents)
    noise = torch.randn(output.latents.shape[1:], generator=torch.Generator().manual_seed(4))
    assert torch.equal(output.trajectory[0, 1], noise)
    assert draw(pipe).trajectory is None


def test_a_stochastic_solver_draws_from_each_images_generator(pipe: JanusFlowPipeline) -> None:
    first = draw(pipe, solver="sde").latents
    assert torch.equal(first, draw(pipe, solver="sde").latents)
    assert distance(first, draw(pipe).latents) > 1e-2
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(first, draw(pipe, solver="sde", seed=None, generator=[generator]).latents)
    with pytest.raises(SettingsError, match=r"give seed= or generator="):
        draw(pipe, solver="sde", seed=None, latents=torch.zeros(1, 4, 8, 8))


def test_a_run_that_a_library_solves_in_one_go_can_be_interrupted(
    pipe: JanusFlowPipeline,
) -> None:
    calls: list[int] = []
    whole = pipe.model.velocity

    def interrupting(x: torch.Tensor, t: Any, prefix: Any) -> torch.Tensor:
        calls.append(1)
        pipe.interrupt = len(calls) == 3
        return whole(x, t, prefix)

    pipe.model.velocity = interrupting
    try:
        output = draw(pipe, solver="dopri5")
    finally:
        pipe.model.velocity = whole
    assert output.nfe == 3


def test_the_vq_head_refuses_what_only_the_flow_has(both: JanusFlowPipeline) -> None:
    for options in (
        {"guidance": Guidance(3.0, method="apg")},
        {"image": Image.new("RGB", (8, 8))},
        {"return_trajectory": True},
    ):
        with pytest.raises(SettingsError):
            draw(both, head="vq", **options)


# --- edits -------------------------------------------------------------------------------------


def picture(color: str = "orange", size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, color)


def test_at_full_strength_nothing_is_left_of_the_picture(pipe: JanusFlowPipeline) -> None:
    edited = draw(pipe, image=picture(), strength=1.0).latents
    assert distance(edited, draw(pipe).latents) <= 1e-5


def test_the_weaker_an_edit_the_nearer_it_stays(pipe: JanusFlowPipeline) -> None:
    pixels = torch.tensor([255, 165, 0]).view(1, 3, 1, 1).expand(1, 3, 64, 64) / 127.5 - 1
    x_img = encode(pipe.vae, pixels)
    gaps = [
        distance(draw(pipe, image=picture(), strength=strength).latents, x_img)
        for strength in (0.01, 0.3, 0.9)
    ]
    assert gaps == sorted(gaps)
    assert gaps[0] < 0.1 < gaps[2]


def test_an_edit_takes_its_share_of_the_steps(pipe: JanusFlowPipeline) -> None:
    output = draw(pipe, image=picture(), strength=0.5, num_inference_steps=10)
    assert output.nfe == 5


def test_where_the_mask_is_black_the_picture_stays(pipe: JanusFlowPipeline) -> None:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    options = {"image": picture("teal"), "strength": 1.0, "num_images_per_prompt": 2}
    edited = draw(pipe, mask_image=mask, **options).latents
    pixels = torch.tensor([0, 128, 128]).view(1, 3, 1, 1).expand(1, 3, 64, 64) / 127.5 - 1
    x_img = encode(pipe.vae, pixels)
    for image in edited:
        assert distance(image[:, :, 4:], x_img[0, :, :, 4:]) <= 1e-5
        assert distance(image[:, :, :4], x_img[0, :, :, :4]) > 0.1


def test_pictures_of_an_edit_are_one_or_one_for_each_prompt(pipe: JanusFlowPipeline) -> None:
    pictures = [picture("red"), picture("blue", (200, 100))]
    both = draw(pipe, [PROMPT, PROMPT], image=pictures, seed=3).latents
    alone = draw(pipe, image=pictures[1], seed=4).latents
    assert distance(both[1:], alone) <= 1e-4
    with pytest.raises(SettingsError, match="2 images for 1 prompts"):
        draw(pipe, image=pictures)
    with pytest.raises(SettingsError, match="give image="):
        draw(pipe, mask_image=picture())
    with pytest.raises(SettingsError, match="strength"):
        draw(pipe, image=picture(), strength=0.0)
