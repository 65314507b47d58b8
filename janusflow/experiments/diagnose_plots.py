"""Figures of a diagnosis, each with words that say what it shows; they read without colours, too.

Lines are medians over pictures, bands and bars reach from the lower to the upper quartile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from janusflow.experiments.diagnose import Diagnosis
from janusflow.experiments.figures import Figure, finish, line_style, load_pyplot, made, show

if TYPE_CHECKING:
    import pandas as pd

_LABELS = {
    "conditional_norm": "|v_c|",
    "unconditional_norm": "|v_u|",
    "velocity_norm": "|v| guided",
    "guidance_gap": "|v_c - v_u| / |v_c|",
    "guidance_cosine": "cos(v_c, v_u)",
    "preview_error": "|x̂ - x_1|",
    "velocity_change": "|Δv / Δt|",
    "local_error": "local error, h/2 |Δv|",
    "gap": "|x_bfloat16 - x_float32| / |x_float32|",
}
_GAP = 2  # pixels between pictures


def figures(found: Diagnosis) -> Iterator[Figure]:
    """All figures; without guidance, that of guidance is left out.

    Raises:
        SettingsError: If matplotlib is not installed.
    """
    pyplot = load_pyplot()
    over_steps: list[tuple[str, str, list[list[str]]]] = [
        (
            "velocity-norms",
            "Norms of the velocities",
            [["conditional_norm", "unconditional_norm", "velocity_norm"]],
        ),
        (
            "guidance",
            "What the prompt changes: conditional against unconditional velocity",
            [["guidance_gap"], ["guidance_cosine"]],
        ),
        (
            "resolution",
            "How far the path is from a straight one, step by step",
            [["preview_error"], ["velocity_change"], ["local_error"]],
        ),
    ]
    for name, title, panels in over_steps:
        yield from _over_time(pyplot, found.steps, name, title, panels)
    yield _speed(pyplot, found)
    yield _previews(pyplot, found)
    yield _errors(pyplot, found)
    if found.precision is not None:
        title = "Gap between bfloat16 and float32, same noise"
        yield from _over_time(pyplot, found.precision, "bfloat16", title, [["gap"]])


def _over_time(
    pyplot: Any, frame: pd.DataFrame, name: str, title: str, panels: Sequence[Sequence[str]]
) -> Iterator[Figure]:
    """Panels side by side, each of one or more columns over t."""
    known = [[column for column in panel if frame[column].notna().any()] for panel in panels]
    known = [panel for panel in known if panel]
    if not known:
        return
    figure, axes = pyplot.subplots(
        1, len(known), figsize=(1.5 + 4 * len(known), 4.2), squeeze=False, layout="constrained"
    )
    told = []
    for axis, panel in zip(axes[0], known, strict=True):
        for index, column in enumerate(panel):
            spread = frame.groupby("t")[column].quantile([0.25, 0.5, 0.75]).unstack().dropna()
            style = line_style(pyplot, index, len(panel)) | {"markersize": 3}
            axis.fill_between(
                spread.index, spread[0.25], spread[0.75], color=style["color"], alpha=0.2, lw=0
            )
            axis.plot(spread.index, spread[0.5], label=_LABELS[column], **style)
            told.append(_course(_LABELS[column], spread[0.5]))
        axis.set_xlabel("t (0 noise, 1 image)")
        axis.set_ylabel("norm" if len(panel) > 1 else _LABELS[panel[0]])
        axis.grid(alpha=0.3)
        if len(panel) > 1:
            axis.legend(fontsize="small")
    pictures = frame["sample"].nunique()
    yield made(
        pyplot,
        figure,
        name,
        title,
        f"{title}. Over t, medians of {pictures} pictures with a band between quartiles. "
        f"{'; '.join(told)}.",
    )


def _course(label: str, medians: pd.Series) -> str:
    """A line in words: both ends, the least and the greatest."""
    words = [
        f"{word} {show(medians[t])} at t = {show(t)}"
        for word, t in (
            ("first", medians.index[0]),
            ("last", medians.index[-1]),
            ("least", medians.idxmin()),
            ("greatest", medians.idxmax()),
        )
    ]
    return f"{label}: {', '.join(words)}"


def _speed(pyplot: Any, found: Diagnosis) -> Figure:
    maps, times = found.speed, found.shown_times
    columns = min(3, len(maps))
    rows = -(-len(maps) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(1.5 + 2.3 * columns, 0.5 + 2.5 * rows), layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, one, t in zip(axes.flat, maps, times, strict=False):
        image = axis.imshow(one, cmap="gray", vmin=maps.min(), vmax=maps.max())
        axis.set_title(f"t = {t:.3g}", fontsize="medium")
    figure.colorbar(image, ax=axes, label="|v| of a latent cell, over channels")
    told = "; ".join(
        f"t = {show(t)}: {show(one.min())} to {show(one.max())}, mean {show(one.mean())}"
        for one, t in zip(maps, times, strict=True)
    )
    title = "Field of |v|, guided, of the first picture"
    alt = f"Maps of {maps.shape[1]} x {maps.shape[2]} latent cells, bright where |v| is great. "
    return made(pyplot, figure, "speed", title, f"{alt}{told}.")


def _previews(pyplot: Any, found: Diagnosis) -> Figure:
    tiles = np.pad(
        found.previews, [(0, 0), (0, 0), (_GAP, _GAP), (_GAP, _GAP), (0, 0)], constant_values=255
    )
    rows, columns, height, width, _ = tiles.shape
    figure, axis = pyplot.subplots(
        figsize=(1.5 + 1.3 * columns, 1 + 1.3 * rows * height / width), layout="constrained"
    )
    axis.imshow(tiles.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3))
    words = [f"t = {t:.3g}" for t in found.shown_times]
    axis.set_xticks(width * (np.arange(columns) + 0.5), [*words, "drawn"])
    axis.set_yticks(height * (np.arange(rows) + 0.5), range(rows))
    axis.set_ylabel("picture")
    axis.spines[:].set_visible(False)
    prompts = ", ".join(f"{i}: “{found.summary['prompts'][i]}”" for i in range(rows))
    return made(
        pyplot,
        figure,
        "previews",
        "Predicted image x̂ along t, and what is drawn",
        f"Predicted images x̂ decoded, at {', '.join(words)}, then the picture drawn, from left to "
        f"right; a row a prompt, {prompts}.",
    )


def _errors(pyplot: Any, found: Diagnosis) -> Figure:
    figure, axis = pyplot.subplots(figsize=(7, 5), layout="constrained")
    orders, settings = found.summary["orders"], found.summary["settings"]
    told = []
    for index, (solver, order) in enumerate(orders.items()):
        part = found.errors[found.errors["solver"] == solver]
        spread = part.groupby("nfe")["error"].quantile([0.25, 0.5, 0.75]).unstack()
        axis.errorbar(
            spread.index,
            spread[0.5],
            [spread[0.5] - spread[0.25], spread[0.75] - spread[0.5]],
            label=f"{solver}: order {order:.2f}",
            capsize=2,
            elinewidth=0.7,
            **line_style(pyplot, index, len(orders)),
        )
        least, most = spread.index[0], spread.index[-1]
        told.append(
            f"{solver}: order {order:.2f}, error {show(spread[0.5][least])} at {least} and "
            f"{show(spread[0.5][most])} at {most} evaluations"
        )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("evaluations (NFE)")
    axis.set_ylabel("error of the latents, relative")
    finish(pyplot, figure, axis)
    counts = sorted(set(found.errors["nfe"]))
    axis.set_xticks(counts, counts)
    axis.xaxis.set_tick_params(which="minor", bottom=False)
    reference = f"{settings['reference_solver']} with {settings['reference_steps']} steps"
    title = f"Distance to {reference}, with the order fitted over all points"
    alt = "Medians with quartiles, on log axes; a step down of one decade in error per decade in "
    return made(pyplot, figure, "errors", title, f"{alt}evaluations is order 1. {'; '.join(told)}.")
