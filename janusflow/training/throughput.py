"""How fast a run is: seconds a step, counts a second, and the share of what the machine can do.

The arithmetic of a part is counted once, forward and backward, and set against the fastest that
`torch.nn.functional.linear` runs here at the sizes of the layer that does most of it. The share of
time outside forward and backward is that of data, optimizers, averages, logs and checkpoints.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from janusflow.training.processes import sharded

_MOST_ROWS = 8192


@dataclass(frozen=True)
class Arithmetic:
    """What a part takes to compute."""

    flops: int
    """Floating-point operations, forward and backward; what gradient checkpointing computes again
    counts again."""
    matrix: tuple[int, int, int] | None
    """Rows (8192 at the most), width in and width out of the layer with the most operations, if
    any is a matrix product."""


def count_arithmetic(objective: nn.Module, batch: dict[str, Tensor]) -> Arithmetic:
    """Counts the operations of a part; leaves no gradients, and random numbers as they were.

    Args:
        objective: Not compiled: the counter sees single operations only.
        batch: A part, on the objective's device.
    """
    products: list[tuple[int, int, int]] = []

    def note(module: Any, _: Any, output: Tensor) -> None:
        if isinstance(module, nn.Linear):
            products.append(
                (
                    output.numel() // module.out_features,
                    module.in_features,
                    module.out_features,
                )
            )
        elif module.groups == 1:
            taps = module.kernel_size[0] * module.kernel_size[1]
            rows = output.numel() // module.out_channels
            products.append((rows, module.in_channels * taps, module.out_channels))

    hooks = [
        module.register_forward_hook(note)
        for module in objective.modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    weights = [weight for weight in objective.parameters() if weight.requires_grad]
    devices = {weight.device for weight in weights if weight.device.type != "cpu"}
    device_type = next(iter(devices)).type if devices else "cuda"
    try:
        with (
            torch.random.fork_rng(list(devices), device_type=device_type),
            FlopCounterMode(display=False) as counter,
        ):
            total = sum(objective(**batch).values())
            if sharded(objective):  # autograd knows the gathered weights, which are not at hand
                total.backward()
                objective.zero_grad(set_to_none=True)
            else:
                torch.autograd.grad(total, weights, allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    largest = max(products, key=lambda p: p[0] * p[1] * p[2], default=None)
    if largest is not None:
        largest = (min(largest[0], _MOST_ROWS), *largest[1:])
    return Arithmetic(counter.get_total_flops(), largest)


def matmul_peak(
    matrix: tuple[int, int, int], dtype: torch.dtype, device: torch.device, seconds: float = 0.25
) -> float:
    """Operations a second of the fastest `torch.nn.functional.linear` within `seconds`.

    Args:
        matrix: Rows, width in, width out.
        dtype: Of both sides.
        device: Where.
        seconds: How long to try, once at the least.
    """
    rows, width_in, width_out = matrix
    generator = torch.Generator(device).manual_seed(0)
    left = torch.randn(rows, width_in, generator=generator, device=device).to(dtype)
    right = torch.randn(width_out, width_in, generator=generator, device=device).to(dtype)
    flops = 2 * rows * width_in * width_out
    repeats = max(1, int(1e7 / flops))  # what the clock takes does not count for small ones
    nn.functional.linear(left[:1], right)  # what the first call loads does not count
    _wait(device)
    fastest, until = 0.0, time.perf_counter() + seconds
    while not fastest or time.perf_counter() < until:
        begin = time.perf_counter()
        for _ in range(repeats):
            nn.functional.linear(left, right)
        _wait(device)
        fastest = max(fastest, repeats * flops / (time.perf_counter() - begin))
    return fastest


def bfloat16_slowdown(device: torch.device) -> float:
    """How many times longer a `linear` takes in bfloat16 than in float32: below 1 if less.

    A processor without units for bfloat16 is slower by far.
    """
    float32, bfloat16 = (
        matmul_peak((1024, 1024, 1024), dtype, device, seconds=0.05)  # outlasts a thread's wait
        for dtype in (torch.float32, torch.bfloat16)
    )
    return float32 / bfloat16


class Meter:
    """Times the steps between two logs.

    Args:
        device: Of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flops_per_part = 0
        self.peak = 0.0
        self.reset()

    def reset(self) -> None:
        """Starts over."""
        self._since = time.perf_counter()
        self._steps = 0
        self._spans: list[tuple[Any, Any]] = []
        self.work: dict[str, float] = {}

    @contextmanager
    def computing(self, work: dict[str, int]) -> Iterator[None]:
        """The block computes forward and backward of a part that holds `work`."""
        begin = self._mark()
        yield
        self._spans.append((begin, self._mark()))
        for name, amount in work.items():
            self.work[name] = self.work.get(name, 0) + amount

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The block does not count."""
        begin = time.perf_counter()
        yield
        self._since += time.perf_counter() - begin

    def step(self) -> None:
        """A step is done."""
        self._steps += 1

    def figures(self, work: dict[str, float]) -> dict[str, float]:
        """Figures of the steps since the last time, which were at least one; starts over.

        Args:
            work: What the parts of these steps held, in all processes.
        """
        _wait(self.device)
        elapsed = time.perf_counter() - self._since
        computing = sum(self._seconds(*span) for span in self._spans)
        figures = {"seconds_per_step": round(elapsed / self._steps, 4)}
        for name, amount in work.items():
            figures[f"{name}_per_second"] = round(amount / elapsed, 2)
        if self.peak:
            done = self.flops_per_part * len(self._spans)
            figures["matmul_share"] = round(done / elapsed / self.peak, 4)
        figures["overhead_share"] = round(1 - computing / elapsed, 4)
        self.reset()
        return figures

    def _mark(self) -> Any:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(self.device, enable_timing=True)  # the device runs behind the clock
        event.record()
        return event

    @staticmethod
    def _seconds(begin: Any, end: Any) -> float:
        return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
