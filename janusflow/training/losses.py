"""Losses of joint training. Axes: B rows, L tokens, V vocabulary."""

from __future__ import annotations

from torch import Tensor, nn

from janusflow.flow.path import velocity_target


def rectified_flow_loss(velocity: Tensor, x_0: Tensor, x_1: Tensor) -> Tensor:
    """Mean squared error of a velocity (B, C, H/8, W/8) on the straight path (arXiv 2209.03003)."""
    return nn.functional.mse_loss(velocity, velocity_target(x_0, x_1))


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits (B, L, V) for the following labels (B, L), -100 ignored."""
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100
    )
