"""What is said before the first step: what is trained, from what, and the memory it will take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from janusflow.training.muon import Muon
from janusflow.training.objective import Objective


def lines(
    objective: Objective,
    optimizers: Sequence[torch.optim.Optimizer],
    ema_device: str,
    shares: int,
) -> Iterator[str]:
    """Trainable and frozen parameters, what was loaded from where, and the memory of a process.

    Args:
        objective: Before its weights are spread.
        optimizers: AdamW keeps two moments of each of its weights, Muon one.
        ema_device: Where the averages lie.
        shares: Among how many processes all but `objective.whole_modules` is spread.
    """
    for name, child in objective.named_children():
        yield f"{name}: {_counts(child)}"
        for below, grandchild in child.named_children():
            if any(True for _ in grandchild.parameters()):
                yield f"  {name}.{below}: {_counts(grandchild)}"
    for name, source in objective.sources().items():
        yield f"{name} from {source}"
    kept = _memory(objective, optimizers, shares)
    parts = ", ".join(f"{name} {_bytes(size)}" for name, size in kept.items())
    yield f"memory of a process: {parts} (on the {ema_device}), in all {_bytes(sum(kept.values()))}"
    yield "  activations are not counted"


def _memory(
    objective: Objective, optimizers: Sequence[torch.optim.Optimizer], shares: int
) -> dict[str, float]:
    """Bytes of a process by what they hold."""
    kept: defaultdict[str, float] = defaultdict(float)
    whole = {weight for module in objective.whole_modules() for weight in module.parameters()}
    for weight in objective.parameters():
        kept[f"weights in {_name(weight)}"] += _size(weight) / (1 if weight in whole else shares)
    for buffer in objective.buffers():
        kept[f"weights in {_name(buffer)}"] += _size(buffer)
    trained = [weight for weight in objective.parameters() if weight.requires_grad]
    for weight in trained:
        kept[f"gradients in {_name(weight)}"] += _size(weight) / shares
    for optimizer in optimizers:
        number = 1 if isinstance(optimizer, Muon) else 2
        for group in optimizer.param_groups:
            for weight in group["params"]:
                kept[f"moments in {_name(weight)}"] += number * _size(weight) / shares
    kept["averages in float32"] = 4 * sum(weight.numel() for weight in trained) / shares
    return kept


def _counts(module: nn.Module) -> str:
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in module.parameters() if not p.requires_grad)
    return f"{trainable:,} trainable, {frozen:,} frozen parameters"


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bytes(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.2f} MiB"
