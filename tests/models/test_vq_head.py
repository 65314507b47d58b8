"""The VQ head at toy width: against transformers' Janus, and alone, in batches, by generators."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models.toy import (
    BEGIN,
    BOS,
    END,
    NUM_TOKENS,
    PAD,
    PLACEHOLDER,
    janus_config,
    left_padded,
    noise,
    tiny_config,
    tiny_model_of,
)
from torch import Tensor
from transformers import JanusForConditionalGeneration

from janusflow import CheckpointError, SettingsError
from janusflow import JanusFlowForConditionalGeneration as Model
from janusflow.models.checkpoints import convert
from janusflow.models.token_sampling import draw_tokens

SHORT = [BOS, 30, 31, BEGIN]
LONG = [BOS, 40, 41, 42, 43, 44, 45, 46, 47, BEGIN]


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model_of(janus_config())


@pytest.fixture(scope="module")
def theirs(model: Model, tmp_path_factory: pytest.TempPathFactory) -> JanusForConditionalGeneration:
    """The same weights in transformers' own model, by way of `convert`."""
    folder = tmp_path_factory.mktemp("janus")
    model.save_pretrained(folder / "ours")
    convert(folder / "ours", folder / "theirs", to="transformers")
    return JanusForConditionalGeneration.from_pretrained(folder / "theirs").eval()


def pictures(num: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, 3, 32, 32, generator=generator).clamp(-1, 1)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_greedy_tokens_are_those_of_transformers(
    model: Model, theirs: JanusForConditionalGeneration
) -> None:
    ids, mask = left_padded(SHORT, LONG)
    config = theirs.generation_config
    config.pad_token_id, config.bos_token_id = PAD, BOS
    config.generation_kwargs = {"boi_token_id": BEGIN}
    expected = theirs.generate(
        ids, attention_mask=mask, generation_mode="image", guidance_scale=5.0, do_sample=False
    )
    found = model.generate_image_tokens(ids, attention_mask=mask, temperature=0, pad_token_id=PAD)
    assert found.shape == (2, NUM_TOKENS)
    assert len(found.unique()) > 3
    assert torch.equal(found, expected)


def test_decoded_pixels_are_those_of_transformers(
    model: Model, theirs: JanusForConditionalGeneration
) -> None:
    tokens = torch.randint(0, 48, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs.decode_image_tokens(tokens).permute(0, 3, 1, 2).clamp(-1, 1)
    torch.testing.assert_close(model.vq_head.decode(tokens), expected, atol=1e-6, rtol=0)


def test_understanding_is_that_of_transformers(
    model: Model, theirs: JanusForConditionalGeneration
) -> None:
    ids = torch.tensor([[BOS, 30, BEGIN, *[PLACEHOLDER] * NUM_TOKENS, END, 31, 32]])
    pixels = pictures(1)
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=pixels).logits
        found = model(input_ids=ids, pixel_values=pixels).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_codes_are_looked_up_by_direction(model: Model) -> None:
    pixels = pictures(3)
    tokenizer = model.vq_head.tokenizer
    with torch.no_grad():
        features = tokenizer.quant_conv(tokenizer.encoder(pixels)).flatten(2).mT
    codes = tokenizer.quantize.embedding.weight
    nearest = torch.cosine_similarity(features[:, :, None], codes, dim=-1).argmax(-1)
    assert torch.equal(model.vq_head.encode(pixels), nearest)


def test_an_image_is_the_same_alone_in_a_batch_and_beside_longer_prompts(model: Model) -> None:
    ids, mask = left_padded(SHORT, LONG)
    together = model.generate_image_tokens(
        ids, attention_mask=mask, num_images_per_prompt=3, generator=generators(*range(6))
    )
    for index in range(6):
        alone = model.generate_image_tokens(
            torch.tensor([[SHORT, LONG][index // 3]]), generator=generators(index)
        )
        assert torch.equal(together[index], alone[0])
    assert len({tuple(row.tolist()) for row in together}) == 6


def test_a_cached_prefix_is_equal_to_no_cache(model: Model) -> None:
    ids = torch.tensor([LONG])
    tokens = model.generate_image_tokens(ids, temperature=0, guidance_scale=3.0)
    free = ids.clone()
    free[:, 1:-1] = PAD
    table = model.get_input_embeddings()
    for place in (0, 1, 7, NUM_TOKENS - 1):
        drawn = model.vq_head.embed(tokens[:, :place])
        hidden = [
            model.language_model.model(
                inputs_embeds=torch.cat([table(row), drawn], dim=1)
            ).last_hidden_state[:, -1]
            for row in (ids, free)
        ]
        conditional, unconditional = (model.vq_head.logits(h) for h in hidden)
        guided = unconditional + 3.0 * (conditional - unconditional)
        assert guided.argmax(-1) == tokens[:, place]


def test_guidance_of_one_runs_no_unconditional_rows(model: Model) -> None:
    rows: list[int] = []
    hook = model.vq_head.head.register_forward_hook(lambda *call: rows.append(len(call[2])))
    model.generate_image_tokens(torch.tensor([SHORT]), guidance_scale=1.0, temperature=0)
    hook.remove()
    assert rows == [1] * NUM_TOKENS


def test_the_prompt_is_run_once(model: Model) -> None:
    shapes: list[tuple[int, ...]] = []
    hook = model.language_model.model.layers[0].register_forward_hook(
        lambda *call: shapes.append(tuple(call[2].shape[:2]))
    )
    model.generate_image_tokens(torch.tensor([SHORT]), num_images_per_prompt=3)
    hook.remove()
    assert shapes == [(2, len(SHORT)), *[(6, 1)] * (NUM_TOKENS - 1)]


def test_temperature_and_the_best_tokens_shape_the_draw(model: Model) -> None:
    ids = torch.tensor([SHORT])
    greedy = model.generate_image_tokens(ids, temperature=0)
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        drawn = model.generate_image_tokens(ids, generator=generators(3), **options)
        assert torch.equal(drawn, greedy)
    assert not torch.equal(model.generate_image_tokens(ids, generator=generators(3)), greedy)


def test_draws_follow_the_guided_distribution(model: Model) -> None:
    ids = torch.tensor([SHORT])
    num = 4000
    first = model.generate_image_tokens(
        ids,
        num_images_per_prompt=num,
        guidance_scale=1.0,
        temperature=0.7,
        generator=torch.Generator().manual_seed(0),
        max_new_tokens=1,
    )
    with torch.no_grad():
        _, hidden = model.encode_token_prompt(ids)
        expected = (model.vq_head.logits(hidden)[0] / 0.7).softmax(-1)
    counts = first.flatten().bincount(minlength=48)
    error = (counts - num * expected).abs() / (num * expected * (1 - expected)).sqrt()
    assert error.max() < 4.5


def test_one_generator_seeds_every_image(model: Model) -> None:
    ids = torch.tensor([SHORT])
    state = torch.get_rng_state()

    def drawn(seed: int) -> Tensor:
        return model.generate_image_tokens(
            ids, num_images_per_prompt=2, generator=torch.Generator().manual_seed(seed)
        )

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    assert not torch.equal(*drawn(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_callback_sees_every_token_and_may_stop(model: Model) -> None:
    seen: list[tuple[int, int]] = []

    def look(index: int, tokens: Tensor) -> bool:
        seen.append((index, tokens.shape[1]))
        return index == 4

    ids = torch.tensor([SHORT])
    stopped = model.generate_image_tokens(ids, temperature=0, on_token=look)
    assert seen == [(index, index + 1) for index in range(5)]
    assert torch.equal(stopped, model.generate_image_tokens(ids, temperature=0)[:, :5])


def test_fewer_tokens_than_a_picture_can_be_asked_for(model: Model) -> None:
    ids = torch.tensor([SHORT])
    whole = model.generate_image_tokens(ids, temperature=0)
    part = model.generate_image_tokens(ids, temperature=0, max_new_tokens=5)
    assert torch.equal(part, whole[:, :5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "from 1 to 16"),
        ({"max_new_tokens": 17}, "from 1 to 16"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 1.5}, "top_p"),
        ({"guidance_scale": float("inf")}, "guidance_scale"),
        ({"generator": generators(1, 2)}, "2 generators for 1 images"),
    ],
)
def test_what_cannot_be_drawn_is_refused(model: Model, options: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        model.generate_image_tokens(torch.tensor([SHORT]), **options)


def test_a_head_that_is_not_there_is_named_with_those_that_are(
    model: Model, tiny_model: Model
) -> None:
    ids = torch.tensor([SHORT])
    with pytest.raises(SettingsError, match="no generation head 'vq'; it holds: flow"):
        tiny_model.generate_image_tokens(ids)
    with pytest.raises(SettingsError, match="no generation head 'flow'; it holds: vq"):
        model.generate_latents(ids)


def test_tokens_of_another_number_are_not_decoded(model: Model) -> None:
    with pytest.raises(SettingsError, match=r"\(1, 3\); expected \(pictures, 16\)"):
        model.vq_head.decode(torch.zeros(1, 3, dtype=torch.long))


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"vq_config.projection_dim 32 must equal"):
        janus_config(vq_config={"projection_dim": 32})


def test_both_heads_save_and_load_as_one_folder(tmp_path: Path) -> None:
    both = tiny_model_of(tiny_config(vq_config=janus_config().vq_config.to_dict()))
    assert both.generation_heads == ("flow", "vq")
    both.save_pretrained(tmp_path / "both")
    loaded = Model.from_pretrained(tmp_path / "both")
    assert loaded.generation_heads == ("flow", "vq")
    assert all(torch.equal(w, loaded.state_dict()[n]) for n, w in both.state_dict().items())
    for to in ("published", "transformers"):
        with pytest.raises(CheckpointError, match=r"both heads|VQ head alone"):
            convert(tmp_path / "both", tmp_path / to, to=to)


@pytest.fixture(scope="module")
def both() -> Model:
    return tiny_model_of(tiny_config(vq_config=janus_config().vq_config.to_dict()))


def forced_logits(model: Model, ids: Tensor, mask: Tensor, tokens: Tensor, pad: int | None):
    """Logits of sampling when it draws the given tokens: conditional, then unconditional."""
    found: list[Tensor] = []
    hook = model.vq_head.head.register_forward_hook(lambda *call: found.append(call[2]))
    with torch.no_grad():
        draw_tokens(
            model,
            model.encode_prompts("vq", ids, mask, guided=pad is not None, pad_token_id=pad),
            num_tokens=tokens.shape[1],
            guidance_scale=1.0 if pad is None else 2.0,
            choose=lambda _: tokens[:, len(found) - 1],
        )
    hook.remove()
    return torch.stack(found, dim=1)


def test_a_training_pass_sees_what_sampling_sees(both: Model) -> None:
    ids, mask = left_padded(SHORT, LONG)
    tokens = torch.randint(0, 48, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = both.picture_states(ids, mask, image_tokens=tokens)
        found = both.vq_head.logits(states.vq)
    expected = forced_logits(both, ids, mask, tokens, pad=None)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_dropped_condition_in_training_is_the_unconditional_row_of_sampling(both: Model) -> None:
    ids, mask = left_padded(SHORT, LONG)
    tokens = torch.randint(0, 48, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(0))
    dropped, dropped_mask = ids.clone(), mask.clone()
    for row, length in ((0, len(SHORT)), (1, len(LONG))):
        dropped[row, -length + 1 : -1] = PAD
        dropped_mask[row, -length + 1 : -1] = 0
    with torch.no_grad():
        states = both.picture_states(dropped, dropped_mask, image_tokens=tokens)
        found = both.vq_head.logits(states.vq)
    expected = forced_logits(both, ids, mask, tokens, pad=PAD)[2:]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_both_heads_train_in_one_pass_as_they_would_apart(both: Model) -> None:
    ids, mask = left_padded(SHORT, LONG)
    mask[1, 5:8] = 0  # a partly dropped condition
    tokens = torch.randint(0, 48, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        flow = both.flow_head.tokens(noise(4), torch.tensor([0.1, 0.4, 0.6, 0.9]))
        together = both.picture_states(ids, mask, flow=flow, image_tokens=tokens)
        flow_alone = both.picture_states(ids, mask, flow=flow)
        vq_alone = both.picture_states(ids, mask, image_tokens=tokens)
    assert flow_alone.vq.shape[1] == 0
    assert vq_alone.flow.shape[0] == 0
    torch.testing.assert_close(together.flow, flow_alone.flow, atol=1e-5, rtol=0)
    torch.testing.assert_close(together.vq, vq_alone.vq, atol=1e-5, rtol=0)
