"""Where pictures stand in a prompt's ids.

A picture is a begin tag, N placeholders, an end tag. Axes: B rows, L tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def find_placeholders(input_ids: Tensor, num_tokens: int, image_token_id: int | None) -> Tensor:
    """Where placeholders stand.

    Args:
        input_ids: (B, L).
        num_tokens: N.
        image_token_id: The placeholder's id. None, for a model that came without a tokenizer:
            placeholders are then the ids that stand in runs of N, or a multiple of it, only and
            begin no row (padding on the left is no picture).

    Returns:
        (B, L) bool.
    """
    if image_token_id is not None:
        return input_ids == image_token_id
    found = torch.zeros_like(input_ids, dtype=torch.bool)
    if num_tokens > 1:
        for candidate in input_ids.unique().tolist():
            same = input_ids == candidate
            lengths = _run_lengths(same)
            whole = (lengths % num_tokens == 0).all()
            if bool(whole) and not bool(same[:, 0].any()):
                found |= same
    return found


def begin_tags(placeholder: Tensor, num_tokens: int) -> Tensor:
    """Where begin tags stand: before every N-th placeholder (B, L) of a row, (B, L) bool."""
    first = placeholder & ((placeholder.cumsum(1) - 1) % num_tokens == 0)
    return nn.functional.pad(first[:, 1:], (0, 1))


def _run_lengths(mask: Tensor) -> Tensor:
    """Length of each run of True at the place where it ends, 0 elsewhere, (B, L)."""
    position = torch.arange(mask.shape[1], device=mask.device)
    last_gap = torch.where(mask, -1, position).cummax(1).values
    ends = mask & ~nn.functional.pad(mask, (0, 1))[:, 1:]
    return torch.where(ends, position - last_gap, 0)
