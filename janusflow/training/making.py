"""What training reads, made ahead by worker processes while the device computes.

A GPU takes a batch of the bundled model faster than one core draws its pictures. What is made is a
function of a number, so that it is the same whoever makes it; streams of data are read ahead by
threads of their own (`janusflow.data.stream`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset


class _Made(Dataset):
    """What `make` makes, by its number."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make = make

    def __getitem__(self, number: Any) -> Any:
        return self.make(number)


def made(
    make: Callable[[Any], Any],
    numbers: Iterable[Any],
    workers: int = 0,
    device: torch.device | None = None,
) -> Generator[Any, None, None]:
    """Yields `make(number)` of all numbers, in their order.

    Args:
        make: Makes tensors, or dicts of them, on the CPU, and nothing else of what it touches.
        numbers: What it is called with.
        workers: Processes that call it ahead; with 0 it is called here, when its turn comes.
        device: Where the tensors go later: they are laid where a copy to a GPU does not wait.
    """
    if not workers:
        yield from map(make, numbers)
        return
    yield from DataLoader(
        _Made(make),
        sampler=numbers,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="fork",  # what they call is here, and need not be sent
        pin_memory=device is not None and device.type == "cuda",
        generator=torch.Generator(),  # else it takes a number from training's
    )
