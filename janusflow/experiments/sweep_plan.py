"""The order of a sweep's work: pieces, each a cell on a chunk of the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from janusflow.experiments.sweep_design import Cell, SweepSettings
from janusflow.flow.solvers import make_solver

_DEPTH_OF_VQ = 64
"""Tokens of a picture by the bundled model; a row of one token is far cheaper than of a picture."""


@dataclass(frozen=True)
class Piece:
    """A cell on a chunk of the prompts.

    Attributes:
        cell: The way of drawing.
        start: First prompt.
        stop: The one after the last.
        is_reference: Whether others are measured by it.
    """

    cell: Cell
    start: int
    stop: int
    is_reference: bool = False

    @property
    def name(self) -> str:
        """Of its file."""
        kind = "reference" if self.is_reference else "cell"
        return f"{kind}-{self.cell.id}-{self.start:05d}"

    @property
    def work(self) -> int:
        """About how long it takes in rows of the network, for the time left."""
        cell = self.cell
        depth = _DEPTH_OF_VQ
        if cell.solver is not None and cell.num_inference_steps is not None:
            each = make_solver(cell.solver).evaluations_per_step
            depth = cell.num_inference_steps * (each or 1)
        return depth * (1 if cell.guidance_scale == 1.0 else 2) * (self.stop - self.start)


def pieces_of_cells(pieces: Sequence[Piece]) -> dict[str, list[Piece]]:
    """The pieces of each cell by its id, in the order of the prompts; no references."""
    found: dict[str, list[Piece]] = {}
    for piece in sorted(pieces, key=lambda piece: piece.start):
        if not piece.is_reference:
            found.setdefault(piece.cell.id, []).append(piece)
    return found


def plan(
    found: Sequence[Cell],
    settings: SweepSettings,
    num_prompts: int,
    *,
    with_references: bool,
    shared: bool = False,
) -> list[Piece]:
    """All pieces in the order of the work: each model is loaded once and each prompt encoded once.

    Args:
        found: The cells.
        settings: Of the sweep.
        num_prompts: How many prompts there are.
        with_references: Whether the flow head's cells need fine solutions.
        shared: Put a model's references before all of its cells, for processes that wait for
            each other in between.
    """
    step = max(1, settings.batch_size // settings.images_per_prompt)
    chunks = [(start, min(start + step, num_prompts)) for start in range(0, num_prompts, step)]
    models = list(dict.fromkeys(cell.model for cell in found))
    fine = {cell: cell.reference(settings.reference) for cell in found}
    groups = {cell: index for index, cell in enumerate(dict.fromkeys(fine.values()))}
    wanted = [(cell, groups[fine[cell]], False) for cell in found]
    if with_references:
        wanted += [(cell, group, True) for cell, group in groups.items() if cell is not None]

    def order(item: tuple[Cell, int, bool, int]) -> tuple[Any, ...]:
        cell, group, is_reference, start = item[:4]
        return (
            models.index(cell.model),
            shared and not is_reference,
            cell.dtype != settings.reference.dtype,  # references come before all that need them
            cell.dtype,
            cell.head,
            start,
            group,
            not is_reference,
        )

    parts = [(*item, start, stop) for item in wanted for start, stop in chunks]
    parts.sort(key=lambda part: order(part[:4]))
    return [Piece(cell, start, stop, ref) for cell, _, ref, start, stop in parts]
