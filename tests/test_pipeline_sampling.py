"""Sampling options of the pipeline: guidance, solvers, grids, shared prompts, edits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from tiny import make_pipeline

from janusflow import ImageError, JanusFlowPipeline, PromptError, SettingsError, drawing, pipeline
from janusflow.flow.edit_methods import FlowEdit, Inversion
from janusflow.flow.editing import reconstruction_error
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


def test_prompts_that_are_not_guided_are_encoded_alone(
    pipe: JanusFlowPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    guided: list[bool] = []
    whole = pipe.model.encode_prompts

    def noted(*args: Any, **kwargs: Any) -> Any:
        guided.append(kwargs["guided"])
        return whole(*args, **kwargs)

    monkeypatch.setattr(pipe.model, "encode_prompts", noted)
    draw(pipe, guidance_scale=1.0)
    draw(pipe, guidance_scale=2.0)
    draw(pipe, image=picture(), edit="flowedit")
    assert guided == [False, True, True, False]


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
    fine = draw(pipe, solver="dopri5", rtol=1e-4, atol=1e-4)
    for rough in ({"rtol": 0.1, "atol": 1e-4}, {"rtol": 1e-4, "atol": 0.1}):
        assert draw(pipe, solver="dopri5", **rough).nfe < fine.nfe
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
        {"mask_image": Image.new("RGB", (8, 8))},
        {"edit": "flowedit"},
        {"source_prompt": ""},
        {"strength": 0.5},
        {"return_trajectory": True},
    ):
        with pytest.raises(SettingsError, match=r'VQ head is guided|head="flow"'):
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
    x_img = encoded(pipe, "teal")
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
    with pytest.raises(SettingsError, match="strength"):
        draw(pipe, image=picture(), strength=0.0)


def encoded(pipe: JanusFlowPipeline, *colors: str) -> torch.Tensor:
    shown = np.stack([np.asarray(picture(color)) for color in colors])
    return encode(pipe.vae, torch.from_numpy(shown).permute(0, 3, 1, 2).float() / 127.5 - 1)


METHODS = ["sdedit", "flowedit", "inversion"]
HALF = Image.new("L", (64, 64))
HALF.paste(255, (0, 0, 32, 64))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"edit": "sdedit", "strength": 0.5}, [2, 2]),
        ({"edit": "flowedit", "strength": 0.5}, [2, 1] * 2),
        ({"edit": "flowedit", "strength": 1.0, "guidance_scale": 1.0}, [1, 1] * 4),
        ({"edit": FlowEdit(n_avg=3), "strength": 0.25}, [2, 1] * 3),
        ({"edit": FlowEdit(source_guidance_scale=3.0), "strength": 0.25}, [2, 2]),
        ({"edit": "inversion"}, [1] * 4 + [2] * 4),
        ({"edit": "inversion", "strength": 0.5, "solver": "heun"}, [1] * 4 + [2] * 4),
    ],
)
def test_every_evaluation_of_an_edit_is_counted(
    pipe: JanusFlowPipeline, options: dict, expected: list[int]
) -> None:
    output, rows = rows_computed(pipe, image=picture(), **options)
    assert rows == expected
    assert (output.nfe, output.num_forward_passes) == (len(expected), sum(expected))


@pytest.mark.parametrize("mask", [None, HALF])
@pytest.mark.parametrize("edit", METHODS)
def test_an_edited_picture_is_the_same_in_any_batch(
    pipe: JanusFlowPipeline, edit: str, mask: Any
) -> None:
    alone = draw(
        pipe, OTHER, image=picture("teal"), edit=edit, mask_image=mask, seed=5,
        **({} if edit == "sdedit" else {"source_prompt": PROMPT}),
    ).latents  # fmt: skip
    for batch_size in (None, 3):
        beside = draw(
            pipe,
            ["a long one before the others", OTHER],
            image=[picture("orange"), picture("teal")],
            edit=edit,
            mask_image=mask,
            num_images_per_prompt=2,
            seed=3,
            batch_size=batch_size,
            **({} if edit == "sdedit" else {"source_prompt": ["a", PROMPT]}),
        ).latents
        assert distance(alone, beside[2:3]) <= 1e-4
        assert distance(beside[2:3], beside[3:]) > 1e-3


@pytest.mark.parametrize("edit", METHODS)
def test_an_edit_draws_from_each_images_generator(pipe: JanusFlowPipeline, edit: str) -> None:
    options = {"image": picture(), "edit": edit, "num_images_per_prompt": 2}
    first = draw(pipe, **options).latents
    assert torch.equal(first, draw(pipe, **options).latents)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    listed = draw(pipe, seed=None, generator=generators, **options).latents
    assert distance(first, listed) <= 1e-5
    shared = [
        draw(
            pipe, seed=None, generator=torch.Generator().manual_seed(7), batch_size=size, **options
        )
        for size in (1, 2)
    ]
    assert distance(shared[0].latents, shared[1].latents) <= 1e-4
    assert distance(shared[0].latents[:1], shared[0].latents[1:]) > 1e-3
    assert (shared[0].seeds, draw(pipe, **options).seeds) == (None, (3, 4))


def test_flow_edit_takes_its_noise_from_the_start_of_the_generator(pipe: JanusFlowPipeline) -> None:
    seen: list[torch.Tensor] = []
    whole = pipe.model.velocity

    def watched(x: torch.Tensor, t: Any, prefix: Any) -> torch.Tensor:
        seen.append(x)
        return whole(x, t, prefix)

    pipe.model.velocity = watched
    try:
        draw(pipe, image=picture(), edit="flowedit", strength=1.0, guidance_scale=1.0)
    finally:
        pipe.model.velocity = whole
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(seen[0], noise)


@pytest.mark.parametrize(
    "guidance",
    [
        Guidance(3.0),
        Guidance(3.0, interval=(0.3, 0.8), rescale=0.5),
        Guidance(3.0, method="cfg-zero", zero_init_steps=1),
    ],
)
def test_flow_edit_from_a_prompt_to_itself_leaves_the_picture(
    pipe: JanusFlowPipeline, guidance: Guidance
) -> None:
    options = {"image": picture(), "guidance": guidance, "num_inference_steps": 6}
    edit = FlowEdit(source_guidance_scale=3.0)
    same = draw(pipe, edit=edit, source_prompt=PROMPT, **options).latents
    assert distance(same, encoded(pipe, "orange")) <= 1e-5
    other = draw(pipe, edit=edit, source_prompt=OTHER, **options).latents
    assert distance(other, same) > 1e-3
    nothing_said = draw(pipe, edit=edit, **options).latents
    assert torch.equal(nothing_said, draw(pipe, edit=edit, source_prompt="", **options).latents)
    assert distance(nothing_said, other) > 1e-3
    negative = draw(pipe, edit=edit, source_prompt=PROMPT, negative_prompt=OTHER, **options)
    assert distance(negative.latents, same) > 1e-3


def test_inversion_without_any_pull_gives_the_picture_back(pipe: JanusFlowPipeline) -> None:
    x_img = encoded(pipe, "orange")

    def error(steps: int, solver: str) -> float:
        output = draw(
            pipe,
            image=picture(),
            edit=Inversion(gamma=0, eta=0),
            source_prompt=PROMPT,
            guidance_scale=1.0,
            num_inference_steps=steps,
            solver=solver,
        )
        return float(reconstruction_error(x_img, output.latents))

    assert 0.01 < error(80, "euler") < 0.65 * error(40, "euler")
    assert error(60, "rk4") < 0.01


def test_the_settings_of_an_inversion_are_taken(pipe: JanusFlowPipeline) -> None:
    def edited(edit: Any, **options: Any) -> torch.Tensor:
        return draw(pipe, image=picture(), edit=edit, return_trajectory=True, **options)

    held = edited(Inversion(eta=1.0, stop=1.0)).latents
    assert distance(held, encoded(pipe, "orange")) <= 1e-5
    let_go = edited(Inversion(eta=1.0, stop=0.3)).latents
    assert distance(let_go, held) > 1e-3
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    typical = edited(Inversion(gamma=1.0)).trajectory[4]
    assert distance(typical, noise) <= 1e-5
    own = edited(Inversion(gamma=1.0), seed=None, latents=noise + 1).trajectory[4]
    assert distance(own, noise + 1) <= 1e-5
    default, published = edited("inversion").latents, edited(Inversion(0.5, 0.9, 0.25)).latents
    assert torch.equal(default, published)


@pytest.mark.parametrize("edit", ["flowedit", "inversion"])
def test_any_method_keeps_the_picture_where_the_mask_is_black(
    pipe: JanusFlowPipeline, edit: str
) -> None:
    options = {"image": picture(), "edit": edit, "num_images_per_prompt": 2, "strength": 1.0}
    output = draw(pipe, mask_image=HALF, return_trajectory=True, **options)
    x_img = encoded(pipe, "orange").expand(2, -1, -1, -1)
    assert torch.equal(output.latents[..., 4:], x_img[..., 4:])
    assert distance(output.latents[..., :4], x_img[..., :4]) > 0.1
    # What is drawn has seen what was kept.
    free = draw(pipe, **options).latents
    assert distance(output.latents[..., :4], free[..., :4]) > 1e-4
    kept = output.trajectory[..., 4:]
    if edit == "flowedit":
        assert torch.equal(kept, x_img[..., 4:].expand_as(kept))
    else:
        assert torch.equal(kept, kept.flip(0))
        assert distance(kept[4], kept[0]) > 0.1


def test_pictures_with_masks_of_their_own(pipe: JanusFlowPipeline) -> None:
    masks = [Image.new("L", (64, 64)), Image.new("L", (64, 64), 255)]
    edited = draw(
        pipe, [PROMPT, PROMPT], image=picture(), mask_image=masks, num_images_per_prompt=2
    ).latents
    whole = draw(pipe, image=picture(), num_images_per_prompt=2, seed=5).latents
    assert distance(edited[2:], whole) <= 1e-4
    assert distance(edited[:2], encoded(pipe, "orange").expand(2, -1, -1, -1)) <= 1e-5


@pytest.mark.parametrize(("edit", "steps"), [("sdedit", 2), ("flowedit", 2), ("inversion", 4)])
def test_callbacks_and_the_trajectory_see_every_step_of_an_edit(
    pipe: JanusFlowPipeline, edit: str, steps: int
) -> None:
    seen: list[tuple[int, float]] = []
    states: list[torch.Tensor] = []

    def callback(given: Any, step: int, t: float, held: dict) -> dict:
        assert given is pipe
        seen.append((step, t))
        states.append(held["latents"] + 0.25)
        return {"latents": states[-1]}

    output = draw(
        pipe,
        image=picture(),
        edit=edit,
        strength=0.5,
        callback_on_step_end=callback,
        return_trajectory=True,
    )
    forth = [0.75, 1.0]
    times = [0.75, 0.5, *forth] if edit == "inversion" else forth
    assert seen == list(enumerate(times))
    assert output.trajectory.shape == (steps + 1, *output.latents.shape)
    assert torch.equal(output.trajectory[1:], torch.stack(states))
    assert torch.equal(output.latents, states[-1])
    start = encoded(pipe, "orange")
    if edit == "sdedit":
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        start = (start + noise) / 2
    assert distance(output.trajectory[0], start) <= 1e-5


@pytest.mark.parametrize("edit", ["flowedit", "inversion"])
def test_an_edit_that_is_interrupted_ends_where_it_is(pipe: JanusFlowPipeline, edit: str) -> None:
    def callback(given: Any, step: int, t: float, held: dict) -> None:
        given.interrupt = step == 1

    options = {"image": picture(), "edit": edit, "strength": 1.0, "return_trajectory": True}
    whole = draw(pipe, **options)
    output = draw(pipe, callback_on_step_end=callback, **options)
    assert torch.equal(output.trajectory, whole.trajectory[:3])
    assert torch.equal(output.latents, whole.trajectory[2])
    assert output.nfe == (4 if edit == "flowedit" else 2)


def test_encoded_prompts_are_edited_towards_as_their_texts(pipe: JanusFlowPipeline) -> None:
    shared = pipe.encode_prompts([PROMPT, OTHER])
    for edit in ("flowedit", "inversion"):
        options = {"image": picture(), "edit": edit, "source_prompt": "a", "batch_size": 1}
        found, expected = (draw(pipe, p, **options).latents for p in (shared, [PROMPT, OTHER]))
        assert distance(found, expected) <= 1e-4


def test_a_picture_is_encoded_once_and_before_the_model_is_woken(
    pipe: JanusFlowPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When both are offloaded, encoding sends the model away."""
    happened: list[str] = []

    def noted(name: str, whole: Any) -> Any:
        def call(*args: Any) -> Any:
            happened.append(name)
            return whole(*args)

        return call

    monkeypatch.setattr(drawing, "encode", noted("encode", encode))
    woken = noted("wake", pipeline._load_to_accelerator)
    monkeypatch.setattr(pipeline, "_load_to_accelerator", woken)
    draw(pipe, image=picture(), num_images_per_prompt=3, batch_size=1)
    assert happened == ["encode", "wake"]


def test_inverting_tells_how_far_sampling_again_misses_the_picture(
    pipe: JanusFlowPipeline,
) -> None:
    colors = ["orange", "teal"]
    x_img = encoded(pipe, *colors)
    pictures = [picture(color) for color in colors]
    errors = []
    for steps in (20, 40):
        found = pipe.invert(pictures, PROMPT, num_inference_steps=steps, output_type="pt")
        again = draw(
            pipe,
            [PROMPT] * 2,
            latents=found.latents,
            seed=None,
            guidance_scale=1.0,
            num_inference_steps=steps,
            output_type="pt",
        )
        assert distance(again.images, found.reconstruction) <= 1e-4
        expected = reconstruction_error(x_img, again.latents)
        assert torch.allclose(found.reconstruction_error, expected, rtol=1e-2)
        assert (found.nfe, found.num_forward_passes) == (2 * steps, 2 * steps)
        errors.append(found.reconstruction_error)
    assert (errors[1] < 0.65 * errors[0]).all()
    assert (errors[1] > 0.01).all()


def test_inverting_a_picture_does_not_depend_on_its_batch(pipe: JanusFlowPipeline) -> None:
    options = {"gamma": 0.5, "num_inference_steps": 3, "output_type": "latent"}
    alone = pipe.invert(picture("teal"), OTHER, seed=4, **options)
    pictures, texts = [picture(), picture("teal")], [PROMPT, OTHER]
    beside = pipe.invert(pictures, texts, seed=3, **options)
    assert distance(alone.latents, beside.latents[1:]) <= 1e-4
    assert distance(alone.reconstruction, beside.reconstruction[1:]) <= 1e-4
    assert (alone.seeds, beside.seeds) == ((4,), (3, 4))
    unsaid = pipe.invert(picture("teal"), seed=4, **options)
    assert distance(unsaid.latents, alone.latents) > 1e-4
    typical = pipe.invert(picture("teal"), seed=4, **(options | {"gamma": 1.0})).latents
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    assert distance(typical, noise) <= 1e-5


def test_inverting_takes_solvers_grids_and_sizes(pipe: JanusFlowPipeline) -> None:
    options = {"num_inference_steps": 4, "output_type": "latent"}
    plain = pipe.invert(picture(), **options)
    better = pipe.invert(picture(), solver="midpoint", **options)
    assert better.nfe == 16
    assert (better.reconstruction_error < plain.reconstruction_error).all()
    shifted = pipe.invert(picture(), shift=3.0, **options)
    assert distance(shifted.latents, plain.latents) > 1e-3
    rough, fine = (
        pipe.invert(picture(), solver="dopri5", rtol=tolerance, atol=tolerance, **options)
        for tolerance in (0.1, 1e-3)
    )
    assert rough.nfe < fine.nfe
    assert (fine.reconstruction_error < plain.reconstruction_error).all()
    wide = pipe.invert([picture()] * 2, height=32, width=96, batch_size=1, **options)
    assert wide.latents.shape == (2, 4, 4, 12)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    drawn = pipe.invert([picture()] * 2, gamma=1.0, generator=generators, **options)
    assert distance(drawn.latents[:1], drawn.latents[1:]) > 0.1
    assert drawn.seeds is None


LATENTS = torch.zeros(1, 4, 8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edit": "sdedit"}, "edit= is of editing a picture; give image=, too"),
        ({"source_prompt": ""}, "source_prompt= is of editing"),
        ({"strength": 0.5}, "strength= is of editing"),
        ({"mask_image": HALF}, "mask_image= is of editing"),
        ({"image": HALF, "source_prompt": ""}, "SDEdit does not ask .* leave source_prompt out"),
        ({"image": HALF, "edit": "flow-edit"}, "unknown edit 'flow-edit'; known: sdedit, flowedit"),
        ({"image": HALF, "edit": FlowEdit}, "unknown edit <class"),
        (
            {"image": HALF, "edit": "flowedit", "solver": "heun"},
            "Euler's steps alone, got .*'heun'",
        ),
        ({"image": HALF, "edit": "flowedit", "rtol": 0.1}, "Euler's steps alone, .* rtol 0.1"),
        ({"image": HALF, "edit": "flowedit", "atol": 0.1}, "Euler's steps alone, .* atol 0.1"),
        (
            {"image": HALF, "edit": "flowedit", "seed": None, "latents": LATENTS},
            "FlowEdit draws noise in every step: give seed= or generator=",
        ),
        (
            {"image": HALF, "edit": "flowedit", "source_prompt": ["a", "b", "c"]},
            "got 3 source prompts for 1 prompts",
        ),
        ({"image": HALF, "edit": "inversion", "solver": "sde"}, "draws no noise.* got 'sde'"),
        (
            {"image": HALF, "edit": "inversion", "solver": FlowMatchEulerDiscreteScheduler()},
            "give solver= by its name",
        ),
        ({"image": HALF, "edit": "inversion", "solver": "heun"}, "'heun' evaluates at t = 0"),
        ({"image": HALF, "edit": "inversion", "rtol": 0.1}, "'euler' has no tolerances"),
        (
            {"image": HALF, "mask_image": HALF, "solver": "rk4:no"},
            "unknown solver 'rk4:no'",
        ),
        (
            {"image": HALF, "mask_image": HALF, "solver": "dopri5"},
            "solver 'dopri5' runs as a whole; take one that steps",
        ),
        ({"image": HALF, "times": [0, 1]}, "no room for shift= or image="),
        ({"image": HALF, "mask_image": [HALF] * 3}, "got 3 mask_images for 1 prompts"),
    ],
)
def test_a_mistake_in_an_edit_is_found_before_anything_is_computed(
    pipe: JanusFlowPipeline, monkeypatch: pytest.MonkeyPatch, options: dict, message: str
) -> None:
    monkeypatch.setattr(drawing, "encode", None)
    monkeypatch.setattr(pipe.model, "encode_prompts", None)
    with pytest.raises(SettingsError, match=message):
        draw(pipe, **options)


def test_mistakes_in_inverting_are_those_of_a_call(pipe: JanusFlowPipeline) -> None:
    with pytest.raises(SettingsError, match="got 2 images for 3 prompts"):
        pipe.invert([picture()] * 2, ["a", "b", "c"])
    with pytest.raises(SettingsError, match="gamma must be a number from 0 to 1"):
        pipe.invert(picture(), gamma=2.0)
    with pytest.raises(SettingsError, match="'heun' evaluates at t = 0"):
        pipe.invert(picture(), gamma=0.5, solver="heun")
    with pytest.raises(ImageError):
        pipe.invert("none.png")
    bare = JanusFlowPipeline(pipe.model, pipe.processor)
    with pytest.raises(SettingsError, match="image= needs an autoencoder"):
        bare.invert(picture(), output_type="latent")
