"""Losses of joint training. Axes: B rows, L tokens, N patches, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from janusflow.flow.path import velocity_target


def rectified_flow_loss(velocity: Tensor, x_0: Tensor, x_1: Tensor) -> Tensor:
    """Mean squared error of a velocity (B, C, H/8, W/8) on the straight path (arXiv 2209.03003)."""
    return nn.functional.mse_loss(velocity, velocity_target(x_0, x_1))


def patch_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of classes of patches, class 0 (nothing there) counted a fifth.

    Args:
        logits: (B, N, classes).
        labels: (B, N).
    """
    weight = torch.ones(logits.shape[-1], device=logits.device)
    weight[0] = 0.2
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), weight)


def image_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of logits (B, N, K) for image tokens (B, N)."""
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits (B, L, V) for the following labels (B, L), -100 ignored."""
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100
    )
