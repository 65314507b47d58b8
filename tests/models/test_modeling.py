"""The model at toy width: the cache, guidance, pictures among text, gradients, bad input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models.toy import (
    BEGIN,
    BOS,
    END,
    LONG,
    NUM_TOKENS,
    PAD,
    PLACEHOLDER,
    SHORT,
    TAG,
    left_padded,
    noise,
    tiny_config,
    tiny_model_of,
)
from torch import Tensor

from janusflow import JanusFlowForConditionalGeneration as Model
from janusflow import PromptError, SettingsError

IMAGE = [BEGIN, *[PLACEHOLDER] * NUM_TOKENS, END]
MIDDLE = [BOS, 50, 51, 52, 53, TAG]


def draw(model: Model, *rows: list[int], latents: Tensor, **options: object) -> Tensor:
    ids, mask = left_padded(*rows)
    options = {"num_inference_steps": 3, "guidance_scale": 3.0, **options}
    return model.generate_latents(ids, attention_mask=mask, latents=latents, **options)


def difference(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max())


# Drawing


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_cached_velocities_equal_those_of_one_pass(t: float, tiny_model: Model) -> None:
    ids, mask = left_padded(SHORT, LONG, MIDDLE)
    x = noise(3)
    with torch.no_grad():
        prefix = tiny_model.encode_prompt(ids, mask)
        cached = tiny_model.velocity(x, t, prefix)
        again = tiny_model.velocity(x, t, prefix)
        whole = tiny_model.flow_forward(ids, mask, x, torch.full((3,), t))
    assert cached.dtype == torch.float32
    assert difference(cached, whole) < 1e-5
    assert torch.equal(cached, again)  # the prefix is as it was


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_training_pass_stays_finite_beside_padding_in_bfloat16(attention: str) -> None:
    model = tiny_model_of(tiny_config())
    model.set_attn_implementation(attention)
    ids, mask = left_padded(SHORT, LONG)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        velocity = model.flow_forward(ids, mask, noise(2), torch.tensor([0.2, 0.7]))
    assert velocity.isfinite().all()


def test_several_latents_may_share_a_prompt_in_one_pass(tiny_model: Model) -> None:
    ids, mask = left_padded(SHORT, LONG)
    x, t = noise(6), torch.linspace(0, 1, 6)
    with torch.no_grad():
        shared = tiny_model.flow_forward(ids, mask, x, t)
        apart = tiny_model.flow_forward(
            ids.repeat_interleave(3, 0), mask.repeat_interleave(3, 0), x, t
        )
    assert difference(shared, apart) < 1e-5


def test_a_prefix_can_be_used_for_several_pictures(tiny_model: Model) -> None:
    ids, mask = left_padded(SHORT, LONG)
    x = noise(4)
    with torch.no_grad():
        prefix = tiny_model.encode_prompt(ids, mask)
        rows = prefix.select(torch.tensor([0, 0, 1, 1]))
        together = tiny_model.velocity(x, 0.5, rows)
        alone = torch.cat(
            [
                tiny_model.velocity(x[i : i + 1], 0.5, prefix.select(torch.tensor([i // 2])))
                for i in range(4)
            ]
        )
    assert difference(together, alone) < 1e-5


def test_time_matters_by_row(tiny_model: Model) -> None:
    ids, mask = left_padded(SHORT, SHORT)
    x = noise(1).repeat(2, 1, 1, 1)
    with torch.no_grad():
        prefix = tiny_model.encode_prompt(ids, mask)
        both = tiny_model.velocity(x, torch.tensor([0.2, 0.8]), prefix)
        first = tiny_model.velocity(x, 0.2, prefix)
    assert difference(both[0], first[0]) < 1e-6
    assert difference(both[1], first[1]) > 1e-2


@pytest.mark.parametrize("rows", [[LONG], [SHORT, LONG]])
def test_the_unconditional_row_is_the_published_one(
    rows: list[list[int]], tiny_model: Model
) -> None:
    # Published: all but the first token become padding and are masked; positions count them.
    ids, mask = left_padded(*rows)
    dropped_ids, dropped_mask = ids.clone(), mask.clone()
    for row in range(len(rows)):
        start = int(mask[row].argmax())
        dropped_ids[row, start + 1 : -1] = PAD
        dropped_mask[row, start + 1 : -1] = 0
    x = noise(len(rows))
    with torch.no_grad():
        prefix = tiny_model.encode_prompt(ids, mask)
        first = tiny_model.encode_unconditional(ids, mask)
        both = prefix.joined(prefix.unconditional(first))
        conditional, free = tiny_model.velocity(torch.cat([x, x]), 0.4, both).chunk(2)
        t = torch.full((len(rows),), 0.4)
        published = tiny_model.flow_forward(dropped_ids, dropped_mask, x, t)
        plain = tiny_model.flow_forward(ids, mask, x, t)
    assert difference(free, published) < 1e-5
    assert difference(conditional, plain) < 1e-5
    assert difference(free, plain) > 1e-3


def test_an_image_is_the_same_alone_in_a_batch_of_seven_and_beside_longer_prompts(
    tiny_model: Model,
) -> None:
    x = noise(7)
    alone = draw(tiny_model, SHORT, latents=x[:1])
    batch = draw(tiny_model, *[SHORT] * 7, latents=x)
    mixed = draw(tiny_model, SHORT, LONG, MIDDLE, LONG, SHORT, LONG, MIDDLE, latents=x)
    several = draw(tiny_model, SHORT, LONG, latents=torch.cat([x[:3], x[3:6]]))
    for other in (batch, mixed, several):
        assert difference(alone, other[:1]) < 1e-4
    assert difference(draw(tiny_model, LONG, latents=x[3:4]), mixed[3:4]) < 1e-4
    assert difference(draw(tiny_model, LONG, latents=x[3:4]), several[3:4]) < 1e-4
    assert difference(alone, draw(tiny_model, LONG, latents=x[:1])) > 1e-2  # prompts matter


def test_padding_is_found_by_its_id_where_no_mask_is_given(tiny_model: Model) -> None:
    ids, mask = left_padded(SHORT, LONG)
    x = noise(2)
    given = tiny_model.generate_latents(ids, attention_mask=mask, latents=x, num_inference_steps=2)
    found = tiny_model.generate_latents(ids, latents=x, num_inference_steps=2)
    named = tiny_model.generate_latents(
        ids.masked_fill(mask == 0, 99), latents=x, num_inference_steps=2, pad_token_id=99
    )
    assert torch.equal(given, found)
    assert difference(given, named) < 1e-6


def passes(model: Model, run: Callable[[], object]) -> list[int]:
    """Rows of every pass of the language model over image tokens."""
    rows: list[int] = []
    hook = model.flow_head.decoder.register_forward_hook(lambda _, __, out: rows.append(len(out)))
    run()
    hook.remove()
    return rows


def test_guidance_of_one_is_one_unguided_row_a_picture_and_step(tiny_model: Model) -> None:
    x = noise(2)
    drawn: list[Tensor] = []

    def unguided() -> None:
        drawn.append(draw(tiny_model, SHORT, LONG, latents=x, guidance_scale=1.0))

    assert passes(tiny_model, unguided) == [2, 2, 2]
    assert passes(tiny_model, lambda: draw(tiny_model, SHORT, LONG, latents=x)) == [4, 4, 4]
    ids, mask = left_padded(SHORT, LONG)
    by_hand = x
    with torch.no_grad():
        prefix = tiny_model.encode_prompt(ids, mask)
        for step in range(3):
            by_hand = by_hand + tiny_model.velocity(by_hand, step / 3, prefix) / 3
    assert difference(drawn[0], by_hand) < 1e-5


def test_guidance_goes_from_the_unconditional_velocity_through_the_conditional(
    tiny_model: Model,
) -> None:
    x = noise(1)
    at = {
        w: draw(tiny_model, LONG, latents=x, guidance_scale=w, num_inference_steps=1)
        for w in (0.0, 1.0, 4.0)
    }
    assert difference(at[4.0], at[0.0] + 4 * (at[1.0] - at[0.0])) < 1e-5


def test_the_state_stays_in_float32_or_float64_whatever_the_weights_are(fresh_model: Model) -> None:
    model = fresh_model.to(torch.bfloat16)
    for dtype in (torch.float32, torch.float64):
        assert draw(model, SHORT, latents=noise(1).to(dtype)).dtype == dtype
    assert draw(model, SHORT, latents=noise(1).to(torch.bfloat16)).dtype == torch.float32


def test_nothing_that_is_given_is_modified(tiny_model: Model) -> None:
    ids, mask = left_padded(SHORT, LONG)
    x, pixels = noise(2), torch.rand(1, 3, 32, 32)
    talk = torch.tensor([[BOS, *IMAGE, 20]])
    copies = [tensor.clone() for tensor in (ids, mask, x, pixels, talk)]
    weights = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    first = tiny_model.generate_latents(ids, attention_mask=mask, latents=x, num_inference_steps=2)
    second = tiny_model.generate_latents(ids, attention_mask=mask, latents=x, num_inference_steps=2)
    tiny_model.generate(input_ids=talk, pixel_values=pixels, max_new_tokens=2, do_sample=False)
    assert torch.equal(first, second)
    for before, after in zip(copies, (ids, mask, x, pixels, talk), strict=True):
        assert torch.equal(before, after)
    for name, tensor in tiny_model.state_dict().items():
        assert torch.equal(weights[name], tensor)


def test_the_same_generator_draws_the_same_noise(tiny_model: Model) -> None:
    ids = torch.tensor([SHORT])
    first, second, other = (
        tiny_model.generate_latents(
            ids, generator=torch.Generator().manual_seed(seed), num_inference_steps=1
        )
        for seed in (1, 1, 2)
    )
    assert first.shape == (1, 4, 4, 4)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_a_callback_sees_every_step_and_may_change_the_state(tiny_model: Model) -> None:
    seen: list[tuple[int, float]] = []

    def watch(index: int, t: Tensor, x: Tensor) -> Tensor | None:
        seen.append((index, round(float(t), 4)))
        return torch.zeros_like(x) if index == 2 else None

    assert not draw(tiny_model, SHORT, latents=noise(1), on_step=watch).any()
    assert seen == [(0, 0.3333), (1, 0.6667), (2, 1.0)]


@pytest.mark.parametrize(("height", "width"), [(8, 8), (2, 6), (6, 4)])
def test_other_resolutions_than_the_trained_one_are_drawn(
    height: int, width: int, tiny_model: Model
) -> None:
    x = torch.randn(1, 4, height, width)
    out = draw(tiny_model, SHORT, latents=x)
    assert out.shape == x.shape
    assert out.isfinite().all()


@pytest.mark.parametrize(
    "shape", [(1, 4, 5, 4), (1, 4, 4, 3), (1, 3, 4, 4), (4, 4, 4), (1, 4, 0, 4), (0, 4, 4, 4)]
)
def test_latents_that_patches_do_not_divide_are_refused(
    shape: tuple[int, ...], tiny_model: Model
) -> None:
    with pytest.raises(SettingsError, match="latents have shape"):
        draw(tiny_model, SHORT, latents=torch.zeros(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 0}, "at least 1, got 0"),
        ({"num_inference_steps": -3}, "at least 1, got -3"),
        ({"num_inference_steps": 2.5}, "whole number"),
        ({"guidance_scale": float("nan")}, "finite number"),
        ({"guidance_scale": "high"}, "finite number"),
        ({"solver": "magic"}, "unknown solver 'magic'; known: euler"),
        ({"latents": noise(3)}, "3 latents do not divide among 2 prompts"),
    ],
)
def test_bad_settings_are_refused(
    options: dict[str, object], message: str, tiny_model: Model
) -> None:
    with pytest.raises(SettingsError, match=message):
        draw(tiny_model, SHORT, LONG, **{"latents": noise(2), **options})


def test_prompts_that_cannot_be_drawn_are_refused(tiny_model: Model) -> None:
    x = noise(1)
    for ids, mask, message in (
        (torch.zeros(0, 4, dtype=torch.long), None, "expected .batch, length."),
        (torch.tensor(SHORT), None, "expected .batch, length."),
        (torch.tensor([[TAG]]), None, "at least one token before the generation tag"),
        (torch.tensor([SHORT]), torch.tensor([[1, 1, 1, 0]]), "left only"),
        (torch.tensor([SHORT]), torch.ones(1, 3), "must have the shape"),
        (torch.tensor([[BOS] + [20] * 252 + [TAG]]), None, "exceed the context of 256"),
    ):
        with pytest.raises(PromptError, match=message):
            tiny_model.encode_prompt(ids, mask)
    with pytest.raises(PromptError, match="begin with the same token"):
        draw(tiny_model, SHORT, [99, 30, TAG], latents=noise(2))
    with torch.no_grad(), pytest.raises(SettingsError, match="2 latents do not fit 1 prompts"):
        tiny_model.velocity(noise(2), 0.5, tiny_model.encode_prompt(torch.tensor([SHORT])))
    headless = tiny_model_of(tiny_config(flow_config=None))
    with pytest.raises(SettingsError, match="no generation head 'flow'; it holds: none"):
        draw(headless, SHORT, latents=x)


# Looking


def talk(num_images: int, *end: int) -> list[int]:
    return [BOS, 20, *IMAGE * num_images, 60, 61, *end]


def test_pictures_may_be_given_in_a_row_or_by_conversation(tiny_model: Model) -> None:
    ids, mask = left_padded(talk(2), talk(1, 62, 63, 64))
    pixels = torch.rand(3, 3, 32, 32) * 2 - 1
    by_row = torch.zeros(2, 2, 3, 32, 32)
    by_row[0], by_row[1, 0] = pixels[:2], pixels[2]
    with torch.no_grad():
        flat = tiny_model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
        nested = tiny_model(input_ids=ids, attention_mask=mask, pixel_values=by_row).logits
        swapped = tiny_model(
            input_ids=ids, attention_mask=mask, pixel_values=pixels[[1, 0, 2]]
        ).logits
    assert torch.equal(flat, nested)
    assert difference(flat[0, -1], swapped[0, -1]) > 1e-3
    assert difference(flat[1, -1], swapped[1, -1]) < 1e-6


def test_features_stand_in_the_place_of_placeholders_and_the_begin_tag(tiny_model: Model) -> None:
    ids = torch.tensor([talk(2)])
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        embedded = tiny_model.embed(ids, pixels)[0]
        plain = tiny_model.embed(ids)[0]
        features = tiny_model.get_image_features(pixels)
    for number in range(2):
        start = 2 + number * (NUM_TOKENS + 2)
        assert torch.equal(embedded[start], tiny_model.begin_embedding[0])
        assert torch.equal(embedded[start + 1 : start + 1 + NUM_TOKENS], features[number])
        assert torch.equal(embedded[start + 1 + NUM_TOKENS], plain[start + 1 + NUM_TOKENS])
    assert torch.equal(embedded[:2], plain[:2])
    assert torch.equal(embedded[-2:], plain[-2:])


def test_placeholders_are_found_without_their_id(tiny_model: Model) -> None:
    nameless = tiny_model_of(tiny_config(image_token_id=None))
    ids, mask = left_padded(talk(2), talk(1, 62, 63))  # padded by as much as a picture
    assert int((mask == 0).sum()) == NUM_TOKENS
    pixels = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        found = nameless(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
        named = tiny_model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
    assert torch.equal(found, named)


def test_placeholders_and_pictures_must_agree_in_number(tiny_model: Model) -> None:
    ids = torch.tensor([talk(1)])
    for count in (2, 3):
        with pytest.raises(PromptError, match=f"{count} images need {count * NUM_TOKENS}"):
            tiny_model(input_ids=ids, pixel_values=torch.rand(count, 3, 32, 32))
    with pytest.raises(PromptError, match="give input_ids or inputs_embeds"):
        tiny_model()


def test_pictures_of_another_size_are_looked_at_when_patches_divide_them(
    tiny_model: Model,
) -> None:
    with torch.no_grad():
        assert tiny_model.get_image_features(torch.rand(1, 3, 48, 32)).shape == (1, 24, 64)
    with pytest.raises(SettingsError, match="33 x 32 px: sides must be multiples of 8"):
        tiny_model.get_image_features(torch.rand(1, 3, 33, 32))


def test_answers_in_a_left_padded_batch_equal_those_of_single_rows(tiny_model: Model) -> None:
    rows = [talk(2), talk(1, 62, 63), talk(1)]
    pixels = torch.rand(4, 3, 32, 32) * 2 - 1
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    ids, mask = left_padded(*rows)
    batch = tiny_model.generate(input_ids=ids, attention_mask=mask, pixel_values=pixels, **options)[
        :, ids.shape[1] :
    ]
    for number, (row, images) in enumerate(
        zip(rows, (pixels[:2], pixels[2:3], pixels[3:]), strict=True)
    ):
        alone = tiny_model.generate(input_ids=torch.tensor([row]), pixel_values=images, **options)
        assert torch.equal(alone[0, len(row) :], batch[number])


def test_cached_answers_equal_those_without_a_cache(tiny_model: Model) -> None:
    ids, mask = left_padded(talk(1), talk(1, 62, 63))
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    cached, whole = (
        tiny_model.generate(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=pixels,
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
            use_cache=use_cache,
            suppress_tokens=[PLACEHOLDER],  # a picture too many, for the pass without a cache
        )
        for use_cache in (True, False)
    )
    assert torch.equal(cached, whole)


def test_several_answers_to_one_conversation_look_at_its_pictures_in_their_order(
    tiny_model: Model,
) -> None:
    ids = torch.tensor([talk(2)])
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "num_beams": 3}
    one = tiny_model.generate(input_ids=ids, pixel_values=pixels[None], **options)
    flat = tiny_model.generate(input_ids=ids, pixel_values=pixels, **options)
    assert torch.equal(one, flat)


# Training


def test_gradients_reach_every_part(fresh_model: Model) -> None:
    model = fresh_model.train()
    ids, mask = left_padded(talk(1), talk(1, 62, 63))
    output = model(
        input_ids=ids, attention_mask=mask, pixel_values=torch.rand(2, 3, 32, 32), labels=ids
    )
    prompt, prompt_mask = left_padded(SHORT, LONG)
    velocity = model.flow_forward(prompt, prompt_mask, noise(2), torch.tensor([0.2, 0.7]))
    (output.loss + velocity.square().mean()).backward()
    assert model.begin_embedding.grad is not None
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_gradient_checkpointing_changes_no_gradient(fresh_model: Model) -> None:
    model = fresh_model.train()
    ids, mask = left_padded(talk(1), talk(1, 62, 63))
    pixels = torch.rand(2, 3, 32, 32)
    prompt, prompt_mask = left_padded(SHORT, LONG)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        output = model(input_ids=ids, attention_mask=mask, pixel_values=pixels, labels=ids)
        velocity = model.flow_forward(prompt, prompt_mask, noise(2), torch.tensor([0.2, 0.7]))
        (output.loss + velocity.square().mean()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    plain = gradients()
    layers = []
    hook = model.language_model.model.layers[0].mlp.register_forward_pre_hook(
        lambda *_: layers.append(1)
    )
    model.gradient_checkpointing_enable()
    checkpointed = gradients()
    hook.remove()
    assert len(layers) == 4  # two passes, each run again for its gradients
    for name, gradient in plain.items():
        assert difference(gradient, checkpointed[name]) < 1e-6, name
