"""Muon (https://kellerjordan.github.io/posts/muon) by processes that hold the same matrices.

Making updates orthogonal takes most of a small model's time outside forward and backward, and every
process would do all of it. Here each does its share, and tells the others what came out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed


class SharedMuon(torch.optim.Muon):
    """`torch.optim.Muon`, to the bit, of matrices and gradients that are alike in all processes.

    Every process keeps the momentum of all matrices and steps all of them.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Steps all matrices that have gradients."""
        for group in self.param_groups:
            for weight, update in self._updates(group).items():
                high, wide = weight.shape
                if group["adjust_lr_fn"] == "match_rms_adamw":
                    size = 0.2 * math.sqrt(max(high, wide))
                else:
                    size = math.sqrt(max(1, high / wide))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * size)

    def _updates(self, group: dict[str, Any]) -> dict[Tensor, Tensor]:
        """Updates of the matrices that have gradients; each process made its share of them."""
        gradients = {weight: weight.grad for weight in group["params"] if weight.grad is not None}
        for weight, gradient in gradients.items():
            if not self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
            self.state[weight]["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        updates, waiting = {}, []
        for process, share in enumerate(even_shares([*gradients], distributed.get_world_size())):
            if not share:
                continue
            sizes = [weight.numel() for weight in share]
            sent = torch.empty(sum(sizes), dtype=torch.bfloat16, device=share[0].device)
            for weight, piece in zip(share, sent.split(sizes), strict=True):
                updates[weight] = piece.view(weight.shape)
                if process == distributed.get_rank():
                    direction = self.state[weight]["momentum_buffer"]
                    if group["nesterov"]:
                        direction = gradients[weight].lerp(direction, group["momentum"])
                    updates[weight].copy_(orthogonal(direction, group))
            waiting.append(distributed.broadcast(sent, process, async_op=True))
        for sending in waiting:
            sending.wait()
        return updates


def orthogonal(matrix: Tensor, settings: dict[str, Any]) -> Tensor:
    """A matrix with its singular values brought near 1, by Newton-Schulz steps in bfloat16.

    Args:
        matrix: (M, N).
        settings: `ns_coefficients`, `ns_steps` and `eps` of `torch.optim.Muon`.
    """
    a, b, c = settings["ns_coefficients"]
    wide = matrix.bfloat16()
    if matrix.shape[0] > matrix.shape[1]:
        wide = wide.T
    wide = wide / wide.norm().clamp(min=settings["eps"])
    for _ in range(settings["ns_steps"]):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if wide.shape == matrix.shape else wide.T


def even_shares(matrices: Sequence[Tensor], count: int) -> list[list[Tensor]]:
    """The matrices in `count` shares that take about as long, the longest dealt out first."""

    def cost(matrix: Tensor) -> int:
        return matrix.numel() * min(matrix.shape)

    shares: list[list[Tensor]] = [[] for _ in range(count)]
    for matrix in sorted(matrices, key=cost, reverse=True):
        min(shares, key=lambda share: sum(map(cost, share))).append(matrix)
    return shares
