"""Packed rows: a sample in a row of many is what it is alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models.toy import (
    BEGIN,
    BOS,
    END,
    EOS,
    NUM_TOKENS,
    PAD,
    PLACEHOLDER,
    TAG,
    TOY_VQ,
    tiny_config,
    tiny_model_of,
)
from torch import Tensor

from janusflow import JanusFlowForConditionalGeneration
from janusflow.data.packing import Packer, Span, conversation_span, drawing_span
from janusflow.models.flow_head import FlowTokens
from janusflow.processing.processor import IGNORED
from janusflow.training.packed import PackedStates, packed_states

LOOKED = [BOS, 9, BEGIN, *[PLACEHOLDER] * NUM_TOKENS, END, 10, 11, 12, 13, EOS]
"""A question about a picture and its answer."""


@pytest.fixture(scope="module")
def model() -> JanusFlowForConditionalGeneration:
    return tiny_model_of(tiny_config(vq_config=TOY_VQ))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def looking(seed: int) -> Span:
    labels = [IGNORED] * (len(LOOKED) - 3) + LOOKED[-3:]
    return conversation_span(LOOKED, labels, random(1, 3, 32, 32, seed=seed).clamp(-1, 1))


def talking() -> Span:
    ids = [BOS, 20, 21, 22, 23, EOS]
    return conversation_span(ids, [IGNORED] * 3 + ids[3:])


def drawing(model: Any, seed: int, **options: Any) -> Span:
    prompt = [BOS, *range(30, 33 + seed), BEGIN]
    noises = options.get("noises", 1)
    return drawing_span(
        prompt,
        {
            "x_t": random(noises, 4, 4, 4, seed=seed),
            "t": torch.linspace(0.1, 0.8, noises),
            "image_tokens": torch.arange(seed, seed + model.vq_head.num_image_tokens)[None] % 48,
        },
        pad_token_id=PAD,
        vq_tag_id=BEGIN,
        **{"flow_tokens": 5, "vq_tokens": model.vq_head.num_image_tokens, **options},
    )


def pack(spans: list[Span], length: int, num_rows: int = 1) -> dict[str, Tensor]:
    packer = Packer(num_rows, length)
    for span in spans:
        assert packer.add(span)
    return packer.rows(PAD)


def tokens_of(model: Any, rows: dict[str, Tensor]) -> FlowTokens | None:
    if "x_t" not in rows:
        return None
    return model.flow_head.tokens(rows["x_t"], rows["t"])


@torch.no_grad()
def states(model: Any, rows: dict[str, Tensor], **options: Any) -> PackedStates:
    flow = tokens_of(model, rows)
    return packed_states(
        model, rows, flow=flow, image_tokens=rows.get("image_tokens"), inner_layer=1, **options
    )


def test_a_sample_in_a_row_of_many_has_the_states_that_it_has_alone(model: Any) -> None:
    spans = [looking(1), drawing(model, 2), talking(), drawing(model, 3, noises=2), looking(4)]
    spans.append(drawing(model, 5, dropped=True))
    together = states(model, pack(spans, sum(map(len, spans)) + 7))
    at = 0
    flow, vq, inner = (list(getattr(together, name)) for name in ("flow", "vq", "inner"))
    for span in spans:
        alone = states(model, pack([span], len(span) + 3))
        torch.testing.assert_close(
            together.last[0, at : at + len(span)], alone.last[0, : len(span)], atol=1e-4, rtol=0
        )
        for found, wanted in ((flow, alone.flow), (vq, alone.vq), (inner, alone.inner)):
            for expected in () if wanted is None else wanted:
                torch.testing.assert_close(found.pop(0), expected, atol=1e-4, rtol=0)
        at += len(span)
    assert flow == vq == inner == []


@pytest.mark.parametrize("dropped", [False, True])
def test_both_heads_have_the_states_of_training_row_by_row(model: Any, dropped: bool) -> None:
    span = drawing(model, 2, noises=2, dropped=dropped)
    rows = pack([span], len(span))
    found = states(model, rows)
    prompt = torch.tensor([[BOS, *range(30, 35), BEGIN]])
    mask = torch.ones_like(prompt)
    if dropped:
        prompt[:, 1:-1] = PAD
        mask[:, 1:-1] = 0
    with torch.no_grad():
        alone = model.picture_states(
            prompt, mask, flow=tokens_of(model, rows), image_tokens=rows["image_tokens"]
        )
    torch.testing.assert_close(found.flow, alone.flow, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.vq, alone.vq, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dropped", [False, True])
def test_the_flow_head_sees_in_training_what_it_sees_in_sampling(model: Any, dropped: bool) -> None:
    span = drawing(model, 2, vq_tokens=0, dropped=dropped)
    rows = pack([span, talking()], len(span) + 9)
    found = model.flow_head.velocity(
        states(model, rows | {"image_tokens": None}).flow, tokens_of(model, rows)
    )
    prompt = torch.tensor([[BOS, *range(30, 35), TAG]])
    with torch.no_grad():
        encoded = model.encode_prompts("flow", prompt)
        prefix = encoded.free if dropped else encoded.prefix
        sampled = model.velocity(rows["x_t"], rows["t"], prefix)
    torch.testing.assert_close(found, sampled, atol=1e-5, rtol=0)


def test_the_vq_head_sees_a_dropped_condition_as_sampling_shows_it(model: Any) -> None:
    span = drawing(model, 2, flow_tokens=0, dropped=True)
    rows = pack([span], len(span))
    with torch.no_grad():
        found = packed_states(model, rows, image_tokens=rows["image_tokens"]).vq[:, 0]
        prompt = torch.tensor([[BOS, *range(30, 35), BEGIN]])
        sampled = model.encode_prompts("vq", prompt, pad_token_id=PAD).free_hidden
    torch.testing.assert_close(found, sampled, atol=1e-5, rtol=0)


def test_answers_have_the_logits_of_the_model_alone(model: Any) -> None:
    span = looking(3)
    rows = pack([talking(), span], 60)
    found = model.language_model.lm_head(states(model, rows).last)[0, 6 : 6 + len(span)]
    with torch.no_grad():
        alone = model(input_ids=span.ids[None], pixel_values=span.pixel_values).logits[0]
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)


def test_a_span_goes_where_there_is_room_or_is_handed_back() -> None:
    packer = Packer(2, 10)
    assert [packer.add(talking()) for _ in range(3)] == [True, True, False]
    short = conversation_span([BOS, 5, EOS], [IGNORED, 5, EOS])
    assert packer.add(short)
    assert packer.num_tokens == 15
    rows = packer.rows(PAD)
    assert rows["samples"].tolist() == [[1] * 6 + [2] * 3 + [0], [1] * 6 + [0] * 4]
    assert rows["ids"][0].tolist() == [BOS, 20, 21, 22, 23, EOS, BOS, 5, EOS, PAD]
    assert rows["positions"][0].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 0]
    assert rows["labels"][0, -1] == IGNORED
    assert Packer(1, 4).rows(PAD)["ids"].tolist() == [[PAD] * 4]
