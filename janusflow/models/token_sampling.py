"""Drawing a picture's tokens one after another, guided, every image by a generator of its own.

Axes: R rows of the language model (B images, with guidance their unconditional rows after them),
E width, K codes. Knows the model by its language model and VQ head; nothing of prompts' text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from janusflow.errors import SettingsError
from janusflow.flow.guidance import classifier_free_guidance
from janusflow.flow.noise import spawn_generators
from janusflow.models.answers import sampling_processors
from janusflow.models.prefix import EncodedPrompts

if TYPE_CHECKING:
    from janusflow.models.modeling import JanusFlowForConditionalGeneration

TokenCallback = Callable[[int, Tensor], "bool | None"]
"""Called after each token with (index, tokens so far (B, index + 1)); True ends the drawing."""

TokenChoice = Callable[[Tensor], Tensor]
"""Tokens (B,) of guided logits (B, K)."""


def token_choice(
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    num_images: int,
) -> TokenChoice:
    """How tokens are chosen; see `generate_image_tokens` for the arguments.

    Raises:
        SettingsError: If one is out of its range.
    """
    is_number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    if not is_number or not math.isfinite(temperature) or temperature < 0:
        raise SettingsError(
            f"temperature must be a finite number of at least 0 (0 = greedy), got {temperature!r}"
        )
    options = {"temperature": temperature or None, "top_k": top_k, "top_p": top_p}
    if generator is None or isinstance(generator, torch.Generator):
        # Greedy drawing leaves the state of a generator as it is.
        generators = spawn_generators(generator, num_images) if temperature else []
    elif len(generator) == num_images:
        generators = list(generator)
    else:
        raise SettingsError(
            f"got {len(generator)} generators for {num_images} images; give one for each, or one"
        )
    processors = sampling_processors(options, generators)
    if temperature == 0:
        return lambda logits: logits.argmax(-1)
    no_ids = torch.empty(num_images, 0, dtype=torch.long)
    return lambda logits: processors(no_ids, logits).argmax(-1)


def draw_tokens(
    model: JanusFlowForConditionalGeneration,
    prompts: EncodedPrompts,
    *,
    num_tokens: int,
    guidance_scale: float,
    choose: TokenChoice,
    on_token: TokenCallback | None = None,
) -> Tensor:
    """Tokens (B, num_tokens) that follow prompts.

    Args:
        model: Holds the VQ head.
        prompts: A row for each image; unchanged afterwards.
        num_tokens: Tokens to draw.
        guidance_scale: 1.0 = off: then there are no unconditional rows.
        choose: From `token_choice`.
        on_token: See `TokenCallback`.
    """
    guided = guidance_scale != 1.0
    images, prefix, hidden = len(prompts), prompts.prefix, prompts.hidden
    assert hidden is not None, "prompts of the VQ head carry their last states"
    if guided:
        assert prompts.free is not None
        assert prompts.free_hidden is not None
        prefix = prefix.joined(prompts.free)
        hidden = torch.cat([hidden, prompts.free_hidden])
    tokens = torch.zeros(images, num_tokens, dtype=torch.long, device=hidden.device)
    grown = prefix.reserved(num_tokens)
    mask = None  # of all ones, if no row is padded: attention is faster without
    if not prefix.attention_mask.all():
        mask = nn.functional.pad(prefix.attention_mask, (0, num_tokens), value=1)
    start = prefix.attention_mask.shape[1]
    for index in range(num_tokens):
        logits = model.vq_head.logits(hidden).float()
        if guided:
            conditional, unconditional = logits.chunk(2)
            logits = classifier_free_guidance(conditional, unconditional, guidance_scale)
        tokens[:, index] = chosen = choose(logits)
        if on_token is not None and on_token(index, tokens[:, : index + 1]):
            return tokens[:, : index + 1]
        if index + 1 == num_tokens:
            break
        inputs = model.vq_head.embed(chosen.repeat(2) if guided else chosen)
        hidden = model.language_model.model(
            inputs_embeds=inputs[:, None],
            attention_mask=None if mask is None else mask[:, : start + index + 1],
            position_ids=(prefix.next_position + index)[:, None],
            past_key_values=grown.cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
    return tokens
