"""A comparison on disk: tables as CSV and JSON, figures, and one page with all of it."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

from janusflow.experiments.compare import CompareSettings, Comparison
from janusflow.experiments.compare_plots import figures
from janusflow.experiments.page import data_uri, write_page
from janusflow.files import atomic_path, write_json

_TABLES = {
    "tokenizers": (
        "What the autoencoders can show",
        "Both reconstruct the same pictures: no picture that a head draws can be better than this.",
    ),
    "generation": (
        "What the heads draw",
        "The same prompts and seeds; intervals of 95 % by bootstrap. A Fréchet distance "
        "from few pictures is biased upwards, and its interval lies lower: compare equal numbers.",
    ),
    "cost": (
        "What it takes, counted",
        "For one picture: evaluations that must follow each other, rows that the network computes, "
        "floating-point operations, and the weights that are used.",
    ),
    "timings": (
        "What it takes, measured here",
        "For one picture on this machine; this table alone differs from run to run. Memory is the "
        "most that tensors besides the weights take at a time.",
    ),
}
_FIGURES = {
    "quality_against_nfe": "Quality against evaluations that follow each other",
    "quality_against_seconds": "Quality against seconds",
    "side_by_side": "The same prompts and seeds, a row for each way of drawing",
    "error_maps": "Originals; then for each autoencoder its reconstructions and 4 x their errors",
}
_BODY = """\
<p>{{ settings.flow_model }} with the flow head, {{ settings.vq_model }} with the VQ head.
<strong>Trained alike?</strong> {{ alike }}</p>
{% for name, (title, note) in tables.items() %}
<h2>{{ title }}</h2>
<p>{{ note }}</p>
<div class="wide"><table>
<tr>{% for column in rows[name][0] %}<th>{{ column | replace("_", " ") }}</th>{% endfor %}</tr>
{% for row in rows[name] %}<tr>{% for value in row.values() %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
{% endfor %}
{% for name, title in titles.items() %}
<h2>{{ title }}</h2>
{% if name == "side_by_side" %}<p>Rows: {{ variants | join(", ") }}. Prompts:</p>
<ol>{% for prompt in prompts %}<li>{{ prompt }}</li>{% endfor %}</ol>{% endif %}
<p><img alt="{{ title }}" src="{{ images[name] }}"></p>
{% endfor %}
<h2>Settings</h2>
<pre>{{ settings_text }}</pre>
"""


def write_report(comparison: Comparison, settings: CompareSettings, folder: Path) -> Path:
    """Writes `tables/*.csv`, `results.json`, `figures/*.png` and `report.html` into a folder.

    Returns:
        The page.

    Raises:
        SettingsError: If a library of the extra `eval` is not installed.
    """
    drawn = figures(comparison)
    for name in ("tables", "figures"):
        (folder / name).mkdir(exist_ok=True)
    for name, rows in comparison.tables.items():
        with atomic_path(folder / "tables" / f"{name}.csv") as scratch:
            scratch.write_text(_csv(rows), encoding="utf-8")
    for name, png in drawn.items():
        with atomic_path(folder / "figures" / f"{name}.png") as scratch:
            scratch.write_bytes(png)
    results = {
        "trained_alike": comparison.trained_alike,
        **comparison.tables,
        "settings": asdict(settings),
    }
    write_json(folder / "results.json", results)
    import yaml

    write_page(
        folder / "report.html",
        "Flow against VQ",
        _BODY,
        settings=settings,
        settings_text=yaml.safe_dump(asdict(settings), sort_keys=False),
        alike=comparison.trained_alike,
        tables=_TABLES,
        rows=comparison.tables,
        titles=_FIGURES,
        variants=list(comparison.sheets),
        prompts=comparison.prompts,
        images={name: data_uri(png) for name, png in drawn.items()},
    )
    return folder / "report.html"


def _csv(rows: list[dict[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def text_table(rows: list[dict[str, Any]]) -> str:
    """Rows in aligned columns, for a terminal."""
    cells = [list(map(str, rows[0])), *[list(map(str, row.values())) for row in rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        rest = (f"{cell:>{w}}" for cell, w in zip(line[1:], widths[1:], strict=True))
        lines.append("  ".join([f"{line[0]:<{widths[0]}}", *rest]))
    return "\n".join(lines)
