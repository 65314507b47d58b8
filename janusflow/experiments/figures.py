"""What figures of experiments share: how they look, and how they are kept."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from janusflow.errors import SettingsError

_MARKERS = "osD^vPX*"
_LINES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Figure:
    """A figure.

    Attributes:
        name: Of its files.
        title: A line.
        alt: What it shows, in words and numbers.
        svg: As scalable graphics.
        png: As pixels.
    """

    name: str
    title: str
    alt: str
    svg: bytes
    png: bytes


def load_pyplot() -> Any:
    """`matplotlib.pyplot`, drawing into files where no other backend was chosen before.

    Raises:
        SettingsError: If matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise SettingsError("figures need matplotlib: pip install 'janusflow[eval]'") from error
    if matplotlib.get_backend(auto_select=False) is None:
        matplotlib.use("Agg")  # the others may need a display
    from matplotlib import pyplot

    return pyplot


def show(value: Any) -> str:
    """A value of a table."""
    if pd.isna(value):
        return "–"
    return f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)


def line_style(pyplot: Any, index: int, total: int) -> dict[str, Any]:
    """Marker, line and a shade that grows lighter."""
    return {
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": _LINES[index % len(_LINES)],
        "color": pyplot.get_cmap("viridis")(0.8 * index / max(total - 1, 1)),
        "markersize": 5,
        "linewidth": 1.3,
    }


def finish(pyplot: Any, figure: Any, axis: Any) -> None:
    """A legend below, and plain numbers on log axes."""
    for scale in (axis.xaxis, axis.yaxis):
        if scale.get_scale() == "log":
            scale.set_major_locator(pyplot.matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
            scale.set_major_formatter(pyplot.matplotlib.ticker.StrMethodFormatter("{x:g}"))
            scale.set_minor_locator(pyplot.matplotlib.ticker.NullLocator())
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")


def made(pyplot: Any, figure: Any, name: str, title: str, alt: str) -> Figure:
    """A figure of matplotlib as it is kept, always the same bytes of the same figure."""
    figure.suptitle(title, fontsize="medium")
    figure.draw_without_rendering()  # lays it out, which takes longest
    figure.set_layout_engine("none")
    contents = {}
    for kind, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
        buffer = io.BytesIO()
        with pyplot.rc_context({"svg.hashsalt": name}):  # else its ids are other ones each time
            figure.savefig(buffer, format=kind, dpi=110, metadata=metadata)
        contents[kind] = buffer.getvalue()
    pyplot.close(figure)
    return Figure(name, title, alt, **contents)
