"""A thousand cells of the bundled model: memory stays, and the time is the model's."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from janusflow.experiments.sweep import sweep
from janusflow.experiments.sweep_settings import SweepSettings
from janusflow.settings import fill

CELLS = 1000
VALUES = {
    "design": "random",
    "axes": {
        "num_inference_steps": [2, 3, 4, 6],
        "guidance_scale": [1.0, 1.5, 2.0, 3.0, 4.0],
        "solver": ["euler", "ab2", "midpoint", "heun"],
    },
    "random": {"num_cells": CELLS, "log_uniform": {"shift": [0.5, 3.0]}},
    "prompts": {"num": 4},
    "reference": {"num_inference_steps": 50},
    "batch_size": 4,
}


def resident_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
    return 1024 * int(line.split()[1])


@contextmanager
def watched(units: Path) -> Iterator[dict[int, int]]:
    """Resident memory by the number of cells that were done, while a sweep runs."""
    found: dict[int, int] = {}
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.5):
            found[len([*units.glob("cell-*.json")])] = resident_bytes()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").is_file(), reason="reads memory as Linux tells it"
)
def test_a_thousand_cells_take_no_more_memory_than_fifty_and_little_time_but_the_model_s(
    tmp_path: Path,
) -> None:
    began = time.perf_counter()
    with watched(tmp_path / "units") as memory:
        found = sweep(fill(SweepSettings, VALUES), tmp_path)
    assert found is not None
    assert len(found.cells) == CELLS
    assert len(found.table) == 4 * CELLS
    early = memory[min(cells for cells in memory if cells >= 50)]
    late = memory[max(cells for cells in memory if cells < CELLS)]
    seconds = found.seconds
    outside = 1 - seconds.model / seconds.wall
    print(f"{time.perf_counter() - began:.0f} s, {outside:.1%} of {seconds.wall:.0f} s outside the")
    print(f"model; {early / 2**20:.0f} MiB after 50 cells, {late / 2**20:.0f} MiB before the last,")
    print(f"{resident_bytes() / 2**20:.0f} MiB after the report")
    assert late < 1.05 * early
    assert outside < 0.1
