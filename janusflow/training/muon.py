"""Muon (https://kellerjordan.github.io/posts/muon) for matrices and for kernels of convolutions.

Making updates orthogonal takes most of a small model's time outside forward and backward, and every
one of several processes would do all of it. Here each does its share, and tells the others what
came out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, distributed, nn

MOMENTUM = 0.95
NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum made orthogonal, to the bit that of `torch.optim.Muon` for matrices.

    Weights and gradients have to be alike in all processes. Every process keeps the momentum of all
    weights and steps all of them.

    Args:
        weights: Matrices (O, I), or kernels (O, I, H, W), which are stepped as matrices (O, I·H·W).
        lr: Rate; updates are scaled to the size of AdamW's (arXiv 2502.16982).
        weight_decay: Weights shrink by this share of the rate in a step.
        dtype: What updates are made orthogonal in; the library's is bfloat16.
    """

    def __init__(
        self,
        weights: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(weights, {"lr": lr, "weight_decay": weight_decay})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Steps all weights that have gradients."""
        for group in self.param_groups:
            grads = {w: w.grad for w in group["params"] if w.grad is not None}
            for weight, update in self._updates(grads).items():
                size = 0.2 * math.sqrt(max(update.shape))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update.view(weight.shape), alpha=-group["lr"] * size)

    def _updates(self, grads: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Orthogonal matrices by weight; each process made its share of them."""
        for weight, grad in grads.items():
            if not self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
            self.state[weight]["momentum_buffer"].lerp_(grad, 1 - MOMENTUM)
        shared = distributed.is_initialized()
        rank, count = (distributed.get_rank(), distributed.get_world_size()) if shared else (0, 1)
        updates, waiting = {}, []
        for process, share in enumerate(even_shares(list(grads), count)):
            if not share:
                continue
            sizes = [weight.numel() for weight in share]
            sent = torch.empty(sum(sizes), dtype=self._dtype, device=share[0].device)
            for weight, piece in zip(share, sent.split(sizes), strict=True):
                updates[weight] = piece.view(len(weight), -1)
            for alike in stacks(share) if process == rank else ():
                directions = [
                    grads[w]
                    .lerp(self.state[w]["momentum_buffer"], MOMENTUM)
                    .flatten(1)
                    .to(self._dtype)
                    for w in alike
                ]
                made = orthogonal(directions[0] if len(alike) == 1 else torch.stack(directions))
                made = made.view(len(alike), *directions[0].shape)
                for weight, update in zip(alike, made, strict=True):
                    updates[weight].copy_(update)
            if shared:
                waiting.append(distributed.broadcast(sent, process, async_op=True))
        for sending in waiting:
            sending.wait()
        return updates


def orthogonal(matrix: Tensor) -> Tensor:
    """Matrices (…, M, N), their singular values brought near 1 by Newton-Schulz."""
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    add_product = torch.addmm if matrix.ndim == 2 else torch.baddbmm
    wide = matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix
    wide = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = wide @ wide.mT
        wide = add_product(wide, add_product(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if wide.shape == matrix.shape else wide.mT


def stacks(weights: Sequence[Tensor]) -> list[list[Tensor]]:
    """Weights whose matrices have one shape together, where a stack takes less time than each.

    A GPU waits for the start of every operation, which is what small matrices cost there; a CPU
    gains nothing.
    """
    if weights[0].device.type == "cpu":
        return [[weight] for weight in weights]
    alike: dict[tuple[int, int], list[Tensor]] = {}
    for weight in weights:
        alike.setdefault((len(weight), weight.numel() // len(weight)), []).append(weight)
    return list(alike.values())


def even_shares(weights: Sequence[Tensor], count: int) -> list[list[Tensor]]:
    """The weights in `count` shares that take about as long, the longest dealt out first."""

    def cost(weight: Tensor) -> int:
        high = len(weight)
        return weight.numel() * min(high, weight.numel() // high)

    shares: list[list[Tensor]] = [[] for _ in range(count)]
    for weight in sorted(weights, key=cost, reverse=True):
        min(shares, key=lambda share: sum(map(cost, share))).append(weight)
    return shares
