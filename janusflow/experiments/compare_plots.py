"""Figures of a comparison, as PNG bytes: quality against cost, contact sheets, error maps."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from janusflow.experiments.figures import load_pyplot

if TYPE_CHECKING:
    from janusflow.experiments.compare import Comparison, Row

_GAP = 2
_SCALE = 2


def figures(comparison: Comparison) -> dict[str, bytes]:
    """All figures by name.

    Raises:
        SettingsError: If matplotlib is not installed.
    """
    pyplot = load_pyplot()
    generation = {row["variant"]: row for row in comparison.tables["generation"]}
    cost = {row["variant"]: row for row in comparison.tables["cost"]}
    timings = {row["variant"]: row for row in comparison.tables["timings"]}
    measures = [name for name in ("score", "frechet") if name in next(iter(generation.values()))]
    return {
        "quality_against_nfe": _curves(
            pyplot, measures, generation, {n: row["nfe"] for n, row in cost.items()}, cost, "NFE"
        ),
        "quality_against_seconds": _curves(
            pyplot,
            measures,
            generation,
            {name: row["seconds_a_picture"] for name, row in timings.items()},
            cost,
            "seconds a picture",
        ),
        "side_by_side": _png(_sheet(list(comparison.sheets.values()))),
        "error_maps": _png(error_maps(comparison.originals, comparison.reconstructions)),
    }


def _curves(
    pyplot: Any,
    measures: Sequence[str],
    generation: dict[str, Row],
    places: dict[str, float],
    cost: dict[str, Row],
    label: str,
) -> bytes:
    """Each measure with its interval over a cost, a line for each head."""
    figure, axes = pyplot.subplots(
        1, len(measures), figsize=(5 * len(measures), 3.6), squeeze=False
    )
    for axis, measure in zip(axes[0], measures, strict=True):
        for head in ("flow", "vq"):
            names = sorted(
                (n for n in generation if cost[n]["head"] == head), key=lambda name: places[name]
            )
            values = np.array([generation[name][measure] for name in names])
            low, high = (
                np.array([generation[name][f"{measure}_{end}"] for name in names])
                for end in ("low", "high")
            )
            # An interval need not hold the value itself.
            errors = np.clip([values - low, high - values], 0, None)
            axis.errorbar(
                [places[n] for n in names], values, errors, marker="o", capsize=3, label=head
            )
        axis.set_xscale("log")
        ticks = sorted(set(places.values()))
        axis.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks], rotation=45)
        axis.minorticks_off()
        axis.set_xlabel(label)
        axis.set_ylabel({"score": "shapes score", "frechet": "Fréchet distance"}[measure])
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return buffer.getvalue()


def _sheet(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of pictures (N, H, W, 3) uint8 under each other, on white."""
    lines = []
    for pictures in rows:
        padded = np.pad(pictures, ((0, 0), (_GAP, _GAP), (_GAP, _GAP), (0, 0)), constant_values=255)
        lines.append(np.concatenate(list(padded), axis=1))
    return np.concatenate(lines)


def error_maps(originals: np.ndarray, reconstructions: dict[str, np.ndarray]) -> np.ndarray:
    """Originals, then for each head what is made of them and four times the absolute error."""
    rows = [originals]
    for pictures in reconstructions.values():
        error = np.abs(pictures.astype(int) - originals).max(-1, keepdims=True)
        rows += [pictures, np.repeat(np.clip(4 * error, 0, 255).astype(np.uint8), 3, axis=-1)]
    return _sheet(rows)


def _png(pixels: np.ndarray) -> bytes:
    image = Image.fromarray(pixels)
    small = max(image.size) < 2000
    if small:
        image = image.resize(
            (image.width * _SCALE, image.height * _SCALE), Image.Resampling.NEAREST
        )
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
