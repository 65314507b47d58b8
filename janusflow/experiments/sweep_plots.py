"""Figures of a sweep, each with words that say what it shows; they read without colours, too.

A figure whose axes have no spread is left out. Measures are means over pictures and seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from janusflow.experiments.figures import Figure, finish, line_style, load_pyplot, made, show
from janusflow.experiments.sweep_metrics import Measure
from janusflow.experiments.sweep_table import error_of_mean, pareto, varied
from janusflow.flow.diagnostics import fitted_order

_COSTS = {"nfe": "evaluations (NFE)", "seconds": "seconds a picture"}
_PLANE = (
    "num_inference_steps",
    "temperature",
    "guidance_scale",
    "solver",
    "shift",
    "guidance_method",
    "guidance_interval_start",
    "guidance_interval_stop",
    "guidance_rescale",
    "zero_init_steps",
    "rtol",
    "top_k",
    "top_p",
)
"""Settings that span heat maps and contact sheets; of those that vary, the first two."""
_MOST_LINES = 8
_MOST_PANELS = 6
_MOST_SHEETS = 3
_THUMBNAIL = 128


def figures(
    table: pd.DataFrame, summary: pd.DataFrame, metrics: Sequence[Measure], folder: Path
) -> Iterator[Figure]:
    """All figures that have something to show.

    Args:
        table: One row a picture and cell.
        summary: One row a way of drawing.
        metrics: Columns of the summary that are shown.
        folder: Of the sweep, where the pictures are.
    """
    pyplot = load_pyplot()
    for metric in metrics:
        for cost in _COSTS:
            yield from _quality(pyplot, summary, metric, cost)
    if any(metric.name == "error" for metric in metrics):
        yield from _order(pyplot, summary)
    for head, part in summary.groupby("head"):
        for metric in metrics:
            yield from _heat_map(pyplot, part, metric, str(head))
        yield from _sheets(pyplot, table[table["head"] == head], part, str(head), folder)


def label(row: Mapping[str, Any] | pd.Series, names: Sequence[str]) -> str:
    """Settings of a row, those that have an effect in it."""
    return ", ".join(f"{plain(n)} {show(row[n])}" for n in names if not pd.isna(row[n]))


def plain(name: str) -> str:
    """A column's name as words."""
    return {"num_inference_steps": "steps", "guidance_scale": "guidance", "nfe": "NFE"}.get(
        name, name.replace("_", " ")
    )


def _quality(pyplot: Any, summary: pd.DataFrame, metric: Measure, cost: str) -> Iterator[Figure]:
    known = summary[summary[metric.name].notna()].reset_index(drop=True)
    if known[cost].nunique() < 2 or known[metric.name].nunique() < 2:
        return
    figure, axis = pyplot.subplots(figsize=(7, 5), layout="constrained")
    names = [name for name in varied(known) if name != "num_inference_steps"]
    lines = _lines(known, names)
    if len(lines) <= _MOST_LINES:
        for index, (text, line) in enumerate(lines):
            ordered = line.sort_values(cost)
            axis.errorbar(
                ordered[cost],
                ordered[metric.name],
                _errors(ordered, metric.name),
                label=text,
                capsize=2,
                elinewidth=0.7,
                **line_style(pyplot, index, len(lines)),
            )
    else:
        axis.plot(known[cost], known[metric.name], "o", color="0.5", markersize=4)
    front = known.iloc[
        pareto(known[cost], known[metric.name], lower_is_better=metric.lower_is_better)
    ]
    axis.plot(
        front[cost],
        front[metric.name],
        "-",
        drawstyle="steps-post",
        color="0.75",
        linewidth=5,
        zorder=0,
        label="Pareto front",
    )
    axis.set_xscale("log")
    if metric.name == "error" and (known["error"] > 0).all():
        axis.set_yscale("log")
    axis.set_xlabel(_COSTS[cost])
    axis.set_ylabel(metric.name)
    finish(pyplot, figure, axis)
    points = "; ".join(
        f"{metric.name} {show(row[metric.name])} at {show(row[cost])}"
        + (f" ({text})" if (text := label(row, varied(known))) else "")
        for _, row in front.iterrows()
    )
    yield made(
        pyplot,
        figure,
        f"{metric.name}-against-{cost}",
        f"{metric.name} against {_COSTS[cost]}",
        f"{metric.name} ({_better(metric)} is better) against "
        f"{_COSTS[cost]} of {len(known)} ways of drawing. The Pareto front, cheapest first: "
        f"{points}.",
    )


def _order(pyplot: Any, summary: pd.DataFrame) -> Iterator[Figure]:
    known = summary[summary["error"] > 0]
    names = [name for name in varied(known) if name != "num_inference_steps"]
    lines = [(t, line) for t, line in _lines(known, names) if line["nfe"].nunique() > 1]
    if not lines:
        return
    figure, axis = pyplot.subplots(figsize=(7, 5), layout="constrained")
    told = []
    for index, (text, line) in enumerate(lines[:_MOST_LINES]):
        ordered = line.sort_values("nfe")
        order = fitted_order(ordered["nfe"].tolist(), ordered["error"].tolist())
        entry = f"{text or 'error'}: order {order:.2f}"
        style = line_style(pyplot, index, len(lines[:_MOST_LINES]))
        axis.loglog(ordered["nfe"], ordered["error"], label=entry, **style)
        told.append(
            f"{entry}, error {show(ordered['error'].iloc[0])} at {show(ordered['nfe'].iloc[0])} "
            f"evaluations and {show(ordered['error'].iloc[-1])} at {show(ordered['nfe'].iloc[-1])}"
        )
    axis.set_xlabel(_COSTS["nfe"])
    axis.set_ylabel("error of the latents, relative")
    finish(pyplot, figure, axis)
    title = "Distance to the fine solution, with the order fitted over all points"
    if len(lines) > _MOST_LINES:
        title += f" (the first {_MOST_LINES} of {len(lines)} lines)"
    yield made(pyplot, figure, "order-of-error", title, f"On log axes: {'; '.join(told)}.")


def _heat_map(pyplot: Any, part: pd.DataFrame, metric: Measure, head: str) -> Iterator[Figure]:
    plane = _plane(part)
    known = part[part[metric.name].notna()]
    if plane is None or known[metric.name].nunique() < 2:
        return
    across, down = plane
    names = [name for name in varied(known) if name not in plane]
    panels = [
        (text, _grid(panel, across, down, metric.name))
        for text, panel in _lines(known, names)
        if (panel[[*plane]].nunique() > 1).all()
    ]
    panels = [(text, grid) for text, grid in panels if grid.notna().to_numpy().mean() > 0.5]
    if not panels:
        return
    shown = panels[:_MOST_PANELS]
    low, high = known[metric.name].min(), known[metric.name].max()
    height, width = (max(grid.shape[axis] for _, grid in shown) for axis in (0, 1))
    figure, axes = pyplot.subplots(
        len(shown),
        figsize=(2 + 0.65 * width, len(shown) * (1.3 + 0.4 * height)),
        squeeze=False,
        layout="constrained",
    )
    told = []
    for axis, (text, grid) in zip(axes[:, 0], shown, strict=True):
        image = axis.imshow(grid, aspect="auto", cmap="cividis", vmin=low, vmax=high)
        for (row, column), value in np.ndenumerate(grid.to_numpy(float)):
            if np.isfinite(value):
                dark = value < (low + high) / 2
                axis.text(
                    column, row, f"{value:.3g}", ha="center", va="center", fontsize="small",
                    color="white" if dark else "black",
                )  # fmt: skip
        axis.set_xticks(range(grid.shape[1]), map(show, grid.columns))
        axis.set_yticks(range(grid.shape[0]), map(show, grid.index))
        axis.set_xlabel(plain(across))
        axis.set_ylabel(plain(down))
        if text:
            axis.set_title(text, fontsize="medium")
        figure.colorbar(image, ax=axis)
        stacked = grid.stack().dropna()
        best = stacked.idxmin() if metric.lower_is_better else stacked.idxmax()
        told.append(
            (f"{text}: " if text else "")
            + f"best {show(float(stacked[best]))} at {plain(down)} {show(best[0])}, "
            f"{plain(across)} {show(best[1])}; from {show(float(stacked.min()))} to "
            f"{show(float(stacked.max()))}"
        )
    title = f"{metric.name} by {plain(across)} and {plain(down)}, {head} head"
    if len(panels) > len(shown):
        title += f" (the first {len(shown)} of {len(panels)} maps)"
    yield made(
        pyplot,
        figure,
        f"{metric.name}-map-{head}",
        title,
        f"Heat map of {metric.name} ({_better(metric)} is better), {plain(across)} from left to "
        f"right, {plain(down)} from top to bottom. {'. '.join(told)}.",
    )


def _sheets(
    pyplot: Any, table: pd.DataFrame, part: pd.DataFrame, head: str, folder: Path
) -> Iterator[Figure]:
    plane = _plane(part)
    if plane is None:
        return
    across, down = plane
    names = [name for name in varied(part) if name not in plane]
    text, first = _lines(part, names)[0]
    if (first[[*plane]].nunique() < 2).any():
        return
    same = table.merge(first[[*plane, *names]], on=[*plane, *names])
    same = same[same["seed"] == same["seed"].iloc[0]]
    for picture in sorted(same["picture"].unique())[:_MOST_SHEETS]:
        chosen = same[same["picture"] == picture]
        grid = chosen.pivot_table(index=down, columns=across, values="image", aggfunc="first")
        if grid.notna().to_numpy().mean() <= 0.5:
            return
        pixels, side = _contact_sheet(grid, folder)
        figure, axis = pyplot.subplots(
            figsize=(1.5 + pixels.shape[1] / 100, 1.5 + pixels.shape[0] / 100),
            layout="constrained",
        )
        axis.imshow(pixels)
        axis.set_xticks([side * (i + 0.5) for i in range(grid.shape[1])], map(show, grid.columns))
        axis.set_yticks([side * (i + 0.5) for i in range(grid.shape[0])], map(show, grid.index))
        axis.set_xlabel(plain(across))
        axis.set_ylabel(plain(down))
        axis.spines[:].set_visible(False)
        row = chosen.iloc[0]
        fixed = f", {text}" if text else ""
        yield made(
            pyplot,
            figure,
            f"contact-sheet-{head}-{picture}",
            f"“{row['prompt']}”, seed {row['picture_seed']}{fixed}",
            f"Contact sheet of one prompt and seed, “{row['prompt']}”, seed "
            f"{row['picture_seed']}{fixed}: {plain(across)} "
            f"{', '.join(map(show, grid.columns))} from left to right, {plain(down)} "
            f"{', '.join(map(show, grid.index))} from top to bottom.",
        )


def _errors(rows: pd.DataFrame, measure: str) -> pd.Series | None:
    """Two standard errors; None for a measure of sets, which has no mean."""
    column = error_of_mean(measure)
    return 2 * rows[column].fillna(0) if column in rows else None


def _better(metric: Measure) -> str:
    return "lower" if metric.lower_is_better else "higher"


def _plane(part: pd.DataFrame) -> tuple[str, str] | None:
    """The settings that span the figures of a head: its columns and its rows."""
    names = [name for name in _PLANE if part[name].nunique() > 1]
    return (names[0], names[1]) if len(names) > 1 else None


def _grid(panel: pd.DataFrame, across: str, down: str, measure: str) -> pd.DataFrame:
    return panel.pivot_table(index=down, columns=across, values=measure, aggfunc="mean")


def _contact_sheet(grid: pd.DataFrame, folder: Path) -> tuple[np.ndarray, int]:
    """Pictures in rows and columns on white, and the side of a place."""
    tiles: dict[tuple[int, int], Image.Image] = {}
    for place, name in np.ndenumerate(grid.to_numpy()):
        if isinstance(name, str):
            with Image.open(folder / name) as picture:
                picture.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
                tiles[place] = picture.copy()
    side = 4 + max(max(tile.size) for tile in tiles.values())
    sheet = Image.new("RGB", (side * grid.shape[1], side * grid.shape[0]), "white")
    for (row, column), tile in tiles.items():
        sheet.paste(tile, (side * column + 2, side * row + 2))
    return np.asarray(sheet), side


def _lines(frame: pd.DataFrame, names: Sequence[str]) -> list[tuple[str, pd.DataFrame]]:
    """Rows that share the given settings, with words for these.

    A row where one of them has no effect belongs to all that it agrees with in the others.
    """
    places: dict[tuple, list[int]] = {}
    for place, row in enumerate(frame[list(names)].itertuples(index=False, name=None)):
        places.setdefault(tuple(None if pd.isna(v) else v for v in row), []).append(place)
    partial = [key for key in places if None in key]

    def agree(key: tuple, other: tuple) -> bool:
        return key != other and all(a in (None, b) for a, b in zip(key, other, strict=True))

    found = []
    for key, own in places.items():
        if not (key in partial and any(agree(key, other) for other in places)):
            more = [place for other in partial if agree(other, key) for place in places[other]]
            text = label(dict(zip(names, key, strict=True)), names)
            found.append((text, frame.iloc[sorted(own + more)]))
    return found
