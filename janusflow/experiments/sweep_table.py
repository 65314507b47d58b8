"""Tables of a sweep: one row a picture and cell, one row a cell, and one row a way of drawing.

A setting that has no effect is empty. Of the columns, `seconds` alone differs from run to run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from janusflow.data.shapes.language import Request
from janusflow.experiments.sweep_design import Cell
from janusflow.experiments.sweep_plan import Piece
from janusflow.experiments.units import Units
from janusflow.files import atomic_path

SETTINGS = [
    part
    for name in (entry.name for entry in fields(Cell))
    for part in ((f"{name}_start", f"{name}_stop") if name == "guidance_interval" else (name,))
]
"""Columns of a cell's settings."""
WAY = [name for name in SETTINGS if name != "seed"]
"""What makes a row of the summary."""
CELL = ["cell", *SETTINGS]
"""What makes a row of the table of cells."""
COSTS = ["nfe", "num_forward_passes", "seconds"]
_TYPES = {
    **dict.fromkeys(("num_inference_steps", "zero_init_steps", "top_k"), "Int64"),
    "guidance_method": "string",
    "solver": "string",
    **dict.fromkeys(
        (
            "guidance_interval_start",
            "guidance_interval_stop",
            "guidance_rescale",
            "shift",
            "rtol",
            "temperature",
            "top_p",
        ),
        "float64",
    ),
}


def picture_table(
    found: Sequence[Cell],
    pieces: Sequence[Piece],
    units: Units,
    prompts: Sequence[str],
    requests: Sequence[Request] | None,
    repeats: int,
) -> pd.DataFrame:
    """One row a picture and cell, in the order of the design.

    Args:
        found: The cells.
        pieces: All of them, in any order.
        units: Their results.
        prompts: All of them.
        requests: What they mean, for those of the shapes world.
        repeats: Pictures of a prompt.
    """
    place = {cell: index for index, cell in enumerate(found)}
    drawn = [piece for piece in pieces if not piece.is_reference]
    rows: list[dict[str, Any]] = []
    for piece in sorted(drawn, key=lambda piece: (place[piece.cell], piece.start)):
        cell, values = piece.cell, units.read_values(piece.name)
        shared = {"cell": cell.id, **_columns(cell)}
        for offset, image in enumerate(values["images"]):
            index = piece.start * repeats + offset
            prompt = index // repeats
            rows.append(
                {
                    **shared,
                    "picture": index,
                    "picture_seed": cell.seed + index,
                    "prompt": prompts[prompt],
                    "kind": requests[prompt].kind if requests is not None else None,
                    **{name: values[name] for name in COSTS},
                    **{name: column[offset] for name, column in values["metrics"].items()},
                    "image": f"images/{image}",
                }
            )
    measures = dict.fromkeys(values["metrics"], "float64")
    return pd.DataFrame(rows).astype({**_TYPES, "kind": "string", **measures})


def _columns(cell: Cell) -> dict[str, Any]:
    values = {entry.name: getattr(cell, entry.name) for entry in fields(cell)}
    start, stop = values["guidance_interval"] or (None, None)
    values |= {"guidance_interval_start": start, "guidance_interval_stop": stop}
    return {name: values[name] for name in SETTINGS}


def summarize(
    table: pd.DataFrame,
    measures: Sequence[str],
    keys: Sequence[str] = WAY,
    of_sets: Callable[[Sequence[str]], dict[str, Any]] | None = None,
) -> pd.DataFrame:
    """One row a way of drawing, all its seeds and pictures together, or one row a cell.

    A measure's mean has its name, its standard error `…_error_of_mean`, pictures being taken for
    independent. Costs are those of a picture: means, of seconds the median.

    Args:
        table: One row a picture and cell.
        measures: Names of those of single pictures.
        keys: `WAY`, or `CELL`.
        of_sets: Measures of all pictures of some cells, given by their ids.
    """
    groups = table.groupby([*keys], dropna=False, sort=False)
    columns: dict[str, Any] = {
        "pictures": groups.size(),
        "nfe": groups["nfe"].mean(),
        "num_forward_passes": groups["num_forward_passes"].mean(),
        "seconds": groups["seconds"].median(),
    }
    for name in measures:
        columns[name] = groups[name].mean()
        columns[error_of_mean(name)] = groups[name].sem()
    found = pd.DataFrame(columns).reset_index()
    if of_sets is None:
        return found
    rows = [of_sets(tuple(cells)) for cells in groups["cell"].unique()]
    return pd.concat([found, pd.DataFrame(rows)], axis=1)


def error_of_mean(measure: str) -> str:
    """The column of a measure's standard error."""
    return f"{measure}_error_of_mean"


def varied(summary: pd.DataFrame) -> list[str]:
    """Settings that have more than one value, rows where they have no effect left out."""
    return [name for name in SETTINGS if name in summary and summary[name].nunique() > 1]


def pareto(costs: Iterable[float], values: Iterable[float], *, lower_is_better: bool) -> list[int]:
    """Places of the points that no other is both cheaper than and as good as, cheapest first."""
    goodness = np.array(list(values), float) * (-1 if lower_is_better else 1)
    front: list[int] = []
    prices = np.array(list(costs), float)
    for place in np.lexsort((-goodness, prices)):
        if np.isfinite(goodness[place]) and (not front or goodness[place] > goodness[front[-1]]):
            front.append(int(place))
    return front


def write_tables(folder: Path, tables: Mapping[str, pd.DataFrame]) -> None:
    """Writes tables by their names, as Parquet and CSV."""
    for name, frame in tables.items():
        with atomic_path(folder / f"{name}.parquet") as scratch:
            frame.to_parquet(scratch, index=False)
        with atomic_path(folder / f"{name}.csv") as scratch:
            frame.to_csv(scratch, index=False, lineterminator="\n")
