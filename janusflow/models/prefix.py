"""Prompts before pictures: cached keys and values, positions, and who may attend to whom.

Axes: B rows, L prompt tokens (left-padded), S prompt and picture tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


class ReservedLayer(DynamicLayer):
    """Keys and values of a layer in room that was reserved for all tokens to come.

    A token that is added is written in its place; nothing that is there is copied.
    """

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._room = tuple(
            tensor.new_empty((*tensor.shape[:2], length, tensor.shape[3]))
            for tensor in (keys, values)
        )
        self.keys, self.values = (room[:, :, :0] for room in self._room)
        self.update(keys, values)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Adds keys and values (B, heads, tokens, head width); returns all there are."""
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, start:end] = states
        self.keys, self.values = (room[:, :, :end] for room in self._room)
        return self.keys, self.values


@dataclass
class PromptPrefix:
    """Cached keys and values of prompts, reusable by every step and every image.

    Attributes:
        cache: Keys and values by layer, (B, heads, L, head width).
        attention_mask: 1 where a slot of the cache may be attended to, (B, L).
        next_position: Position of the token that follows, by row, (B,).
    """

    cache: Cache
    attention_mask: Tensor
    next_position: Tensor

    def __len__(self) -> int:
        return self.attention_mask.shape[0]

    def select(self, rows: Tensor) -> PromptPrefix:
        """A new prefix of the given rows, a row as often as it is named.

        Slots on the left that are padding in all of them are left out.
        """
        mask = self.attention_mask[rows]
        used = int(mask.any(0).int().argmax())
        layers = [
            tuple(part[:, :, used:].index_select(0, rows) for part in (layer.keys, layer.values))
            for layer in self.cache.layers
        ]
        return PromptPrefix(DynamicCache(layers), mask[:, used:], self.next_position[rows])

    def reserved(self, length: int) -> PromptPrefix:
        """A copy with room for `length` further tokens, which then grow it in place."""
        cache = DynamicCache()
        cache.layers = [
            ReservedLayer(layer.keys, layer.values, layer.keys.shape[2] + length)
            for layer in self.cache.layers
        ]
        return PromptPrefix(cache, self.attention_mask, self.next_position)

    def unconditional(self, first_token: PromptPrefix) -> PromptPrefix:
        """An unconditional row for every row: the first token alone.

        Its key and value stand in the last slot, everything before is masked; the positions that
        follow are those of the conditional row, as published (arXiv 2411.07975).
        """
        num = len(self)
        layers = []
        for layer, first in zip(self.cache.layers, first_token.cache.layers, strict=True):
            rows = []
            for own, other in ((layer.keys, first.keys), (layer.values, first.values)):
                row = torch.zeros_like(own)
                row[:, :, -1:] = other.expand(num, -1, -1, -1)
                rows.append(row)
            layers.append(tuple(rows))
        mask = torch.zeros_like(self.attention_mask)
        mask[:, -1] = 1
        return PromptPrefix(DynamicCache(layers), mask, self.next_position)

    def joined(self, other: PromptPrefix) -> PromptPrefix:
        """The rows of both, the other's last; the shorter prompts are padded on the left."""
        length = max(self.attention_mask.shape[1], other.attention_mask.shape[1])
        layers = []
        for own, its in zip(self.cache.layers, other.cache.layers, strict=True):
            pairs = ((own.keys, its.keys), (own.values, its.values))
            layers.append(tuple(torch.cat([_padded(t, length, 2) for t in pair]) for pair in pairs))
        masks = (self.attention_mask, other.attention_mask)
        return PromptPrefix(
            DynamicCache(layers),
            torch.cat([_padded(mask, length, 1) for mask in masks]),
            torch.cat([self.next_position, other.next_position]),
        )


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts that the language model has run for one head, and what they are guided away from.

    Attributes:
        head: "flow" or "vq".
        prefix: P rows.
        free: Their unconditional rows, or those of negative prompts, P rows; None = no guidance.
        hidden: Last hidden states, (P, E), for the VQ head.
        free_hidden: Of `free`, for the VQ head.
    """

    head: str
    prefix: PromptPrefix
    free: PromptPrefix | None = None
    hidden: Tensor | None = None
    free_hidden: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prefix)

    def select(self, rows: Tensor) -> EncodedPrompts:
        """The given prompts, each as often as it is named."""
        return EncodedPrompts(
            self.head,
            self.prefix.select(rows),
            None if self.free is None else self.free.select(rows),
            None if self.hidden is None else self.hidden[rows],
            None if self.free_hidden is None else self.free_hidden[rows],
        )


def _padded(tensor: Tensor, length: int, axis: int) -> Tensor:
    """Zeros in front, up to a length."""
    missing = length - tensor.shape[axis]
    return nn.functional.pad(tensor, (0, 0) * (tensor.ndim - 1 - axis) + (missing, 0))


def shared_prefix_mask(blocks: Tensor, attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention scores when several continuations share a prefix in one row.

    Causal; a token sees the prefix and its own block. Masked tokens see themselves, so that no
    row of the softmax is empty.

    Args:
        blocks: 0 for the prefix, 1, 2, … for what follows it, (B, S).
        attention_mask: 1 where a token may be attended to, (B, S), or by whom, (B, S, S).
        dtype: Of the scores.

    Returns:
        0 or the lowest number, (B, 1, S, S).
    """
    place = torch.arange(blocks.shape[1], device=blocks.device)
    causal = place[:, None] >= place
    related = (blocks == 0)[:, None, :] | (blocks[:, :, None] == blocks[:, None, :])
    visible = attention_mask.bool()
    allowed = causal & related & (visible if visible.ndim == 3 else visible[:, None, :])
    allowed |= place[:, None] == place
    return torch.where(allowed, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]


def positions(attention_mask: Tensor) -> Tensor:
    """Positions (B, L) that count the tokens of a left-padded mask; padding gets 0."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)
