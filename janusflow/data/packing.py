"""Rows of several samples, kept apart by who may attend to whom.

A `Span` is one sample as ids, with places for what the model puts there; `Packer` sets spans side
by side in rows of one length. Knows ids and pictures' tensors, not where samples come from.

Axes: B rows, S tokens of a row, L tokens of a span, U pictures to look at, N image tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from janusflow.models.prefix import shared_prefix_mask
from janusflow.processing.processor import IGNORED

TEXT, FLOW, VQ_TAG, VQ = range(4)
"""What stands in a place: the embedding of its id (image features at placeholders); a time or image
token of the flow head; the tag before the VQ head's picture; one of its tokens."""


@dataclass(frozen=True)
class Span:
    """One sample: a prefix, then blocks that see it and themselves.

    Attributes:
        ids: (L,); padding where the model puts something else.
        labels: The id itself where it is to be predicted, else `IGNORED`, (L,).
        kinds: `TEXT`, `FLOW`, `VQ_TAG` or `VQ`, (L,).
        blocks: 0 for the prefix, 1, 2, … for what follows it, (L,).
        positions: (L,).
        hidden: Whether the flow head's places do not see it: a dropped condition, (L,).
        pixel_values: Pictures to look at, (U, 3, H, W), in the order of their placeholders.
        drawn: What is drawn, by name, along a first axis that `Packer.rows` joins.
    """

    ids: Tensor
    labels: Tensor
    kinds: Tensor
    blocks: Tensor
    positions: Tensor
    hidden: Tensor
    pixel_values: Tensor | None = None
    drawn: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)


def conversation_span(
    ids: Sequence[int], labels: Sequence[int], pixel_values: Tensor | None = None
) -> Span:
    """The span of `JanusFlowProcessor.training_row`."""
    length = len(ids)
    zeros = torch.zeros(length, dtype=torch.long)
    return Span(
        ids=torch.tensor(ids),
        labels=torch.tensor(labels),
        kinds=torch.full((length,), TEXT),
        blocks=zeros,
        positions=torch.arange(length),
        hidden=zeros.bool(),
        pixel_values=pixel_values,
    )


def drawing_span(
    prompt_ids: Sequence[int],
    drawn: dict[str, Tensor],
    *,
    pad_token_id: int,
    vq_tag_id: int,
    flow_tokens: int = 0,
    noises: int = 1,
    vq_tokens: int = 0,
    dropped: bool = False,
) -> Span:
    """A prompt with its picture for the flow head, the VQ head, or both.

    Args:
        prompt_ids: Of the prompt, (P,), the tag at its end included.
        drawn: See `Span`.
        pad_token_id: Fills the places of what is no text, and of a dropped condition.
        vq_tag_id: Stands before the VQ head's picture.
        flow_tokens: Time and image tokens of a picture of the flow head, 1 + N; 0 for none.
        noises: Points of the path that the picture is seen at, a block each.
        vq_tokens: Image tokens of a picture of the VQ head, N; 0 for none. Tag and all but the last
            of them stand in the row.
        dropped: Drop the condition as sampling drops it: every token but the first becomes padding,
            which the flow head does not see and the VQ head does; positions still count it.
    """
    prompt = torch.tensor(prompt_ids[:-1])
    prefix = len(prompt)
    if dropped:
        prompt[1:] = pad_token_id
    kinds = [torch.full((prefix,), TEXT)]
    blocks = [torch.zeros(prefix, dtype=torch.long)]
    positions = [torch.arange(prefix)]
    for block in range(1, noises + 1 if flow_tokens else 1):
        kinds.append(torch.full((flow_tokens,), FLOW))
        blocks.append(torch.full((flow_tokens,), block))
        positions.append(prefix + torch.arange(flow_tokens))
    ids = [prompt, torch.full((sum(map(len, kinds)) - prefix,), pad_token_id)]
    if vq_tokens:
        ids.append(torch.tensor([vq_tag_id] + [pad_token_id] * (vq_tokens - 1)))
        kinds.append(torch.tensor([VQ_TAG] + [VQ] * (vq_tokens - 1)))
        blocks.append(torch.full((vq_tokens,), noises + 1))
        positions.append(prefix + torch.arange(vq_tokens))
    joined = torch.cat(ids)
    hidden = torch.zeros(len(joined), dtype=torch.bool)
    hidden[1:prefix] = dropped
    return Span(
        ids=joined,
        labels=torch.full((len(joined),), IGNORED),
        kinds=torch.cat(kinds),
        blocks=torch.cat(blocks),
        positions=torch.cat(positions),
        hidden=hidden,
        drawn=drawn,
    )


class Packer:
    """Fills rows of one length, each span going into the first row that has room for it."""

    def __init__(self, num_rows: int, length: int) -> None:
        self.length = length
        self._rows: list[list[Span]] = [[] for _ in range(num_rows)]
        self._room = [length] * num_rows

    def add(self, span: Span) -> bool:
        """Takes a span in; False when there is no room left for it."""
        for row, room in enumerate(self._room):
            if len(span) <= room:
                self._rows[row].append(span)
                self._room[row] -= len(span)
                return True
        return False

    @property
    def num_tokens(self) -> int:
        """Places that are filled."""
        return sum(self.length - room for room in self._room)

    def rows(self, pad_token_id: int) -> dict[str, Tensor]:
        """Everything of all spans, padded on the right.

        Returns:
            Of each place, (B, S): "ids", "labels", "kinds", "blocks", "positions", "hidden", and
            "samples", which sample of its row it belongs to, 0 for padding. "pixel_values"
            (U, 3, H, W), where there are any, and what spans draw, by its name, in the order of the
            places.
        """
        fills = {"ids": pad_token_id, "labels": IGNORED}
        batch = {}
        for name in ("ids", "labels", "kinds", "blocks", "positions", "hidden"):
            joined = [
                torch.cat([getattr(span, name) for span in row] or [torch.empty(0)])
                for row in self._rows
            ]
            batch[name] = self._padded(joined, fills.get(name, 0))
        batch["hidden"] = batch["hidden"].bool()
        batch["samples"] = self._padded(
            [
                torch.tensor([n for n, span in enumerate(row, start=1) for _ in range(len(span))])
                for row in self._rows
            ],
            0,
        )
        spans = [span for row in self._rows for span in row]
        pixels = [span.pixel_values for span in spans if span.pixel_values is not None]
        if pixels:
            batch["pixel_values"] = torch.cat(pixels)
        for name in dict.fromkeys(name for span in spans for name in span.drawn):
            batch[name] = torch.cat([s.drawn[name] for s in spans if name in s.drawn])
        return batch

    def _padded(self, rows: list[Tensor], fill: int) -> Tensor:
        return torch.stack(
            [nn.functional.pad(row.long(), (0, self.length - len(row)), value=fill) for row in rows]
        )


def attention_mask(
    samples: Tensor, blocks: Tensor, kinds: Tensor, hidden: Tensor, dtype: torch.dtype
) -> Tensor:
    """What is added to attention scores: causal, within a sample, its prefix and one's own block.

    Args:
        samples: (B, S), 0 for padding, as the others are from `Packer.rows`.
        blocks: (B, S).
        kinds: (B, S).
        hidden: (B, S).
        dtype: Of the scores.

    Returns:
        0 or the lowest number, (B, 1, S, S).
    """
    together = samples[:, :, None] == samples[:, None, :]
    seen = ~((kinds == FLOW)[:, :, None] & hidden[:, None, :])
    return shared_prefix_mask(blocks, together & seen, dtype)
