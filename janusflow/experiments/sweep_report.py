"""A sweep's figures on disk, and one page with all that it found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from janusflow.experiments.figures import show
from janusflow.experiments.page import data_uri, write_page
from janusflow.experiments.sweep_metrics import Measure
from janusflow.experiments.sweep_plots import figures, plain
from janusflow.experiments.sweep_settings import SweepSettings
from janusflow.experiments.sweep_table import COSTS, error_of_mean, pareto, varied
from janusflow.files import atomic_path

_MOST_ROWS = 300
_BODY = """\
<p>{{ cells }} cells in {{ ways }} ways of drawing, {{ prompts | length }} prompts, {{ pictures }}
pictures. Means are over pictures and seeds; intervals in figures are two standard errors to either
side, of pictures taken for independent. The noise of a picture is the same in all cells of a seed,
so that differences are surer than those intervals.</p>
{% for note in notes %}
<p>{{ note }}</p>
{% endfor %}
<h2>Figures</h2>
{% for figure in figures %}
<figure>
<img src="{{ addresses[figure.name] }}" alt="{{ figure.alt }}">
<figcaption>{{ figure.title }}</figcaption>
</figure>
{% endfor %}
<h2>Tables</h2>
{% for caption, columns, rows in tables %}
<div class="wide" role="region" aria-label="{{ caption }}" tabindex="0"><table>
<caption>{{ caption }}</caption>
<thead><tr>{% for column in columns %}<th scope="col">{{ column }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr><th scope="row">{{ row[0] }}</th>{% for value in row[1:] %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% endfor %}
<p>Everything, in <code>tables/</code>, as Parquet and CSV: a row a picture and cell in
<code>pictures</code>, a row a cell in <code>cells</code>, a row a way of drawing in
<code>settings</code>.</p>
<h2>Prompts</h2>
<ol>{% for prompt in prompts %}<li>{{ prompt }}</li>{% endfor %}</ol>
<h2>Settings</h2>
<pre>{{ settings }}</pre>
"""


def write_report(
    folder: Path,
    settings: SweepSettings,
    table: pd.DataFrame,
    summary: pd.DataFrame,
    metrics: Sequence[Measure],
) -> Path:
    """Writes `figures/*.svg`, `figures/*.png` and `report.html`; gives the page."""
    drawn = list(figures(table, summary, metrics, folder))
    for figure in drawn:
        for kind in ("svg", "png"):
            with atomic_path(folder / "figures" / f"{figure.name}.{kind}") as scratch:
                scratch.write_bytes(getattr(figure, kind))
    page = folder / "report.html"
    write_page(
        page,
        "Sweep",
        _BODY,
        cells=table["cell"].nunique(),
        ways=len(summary),
        pictures=len(table),
        prompts=list(dict.fromkeys(table["prompt"])),
        figures=drawn,
        addresses={figure.name: data_uri(figure.png) for figure in drawn},
        notes=[note for note in dict.fromkeys(metric.note for metric in metrics) if note],
        tables=list(_tables(summary, metrics)),
        settings=yaml.safe_dump(asdict(settings), sort_keys=False),
    )
    return page


def _tables(
    summary: pd.DataFrame, metrics: Sequence[Measure]
) -> list[tuple[str, list[str], list[list[str]]]]:
    """Captions, names of columns and rows: the best for every cost, then all."""
    names = varied(summary)
    measures = [metric.name for metric in metrics]
    found = []
    for metric in metrics:
        front = summary.iloc[
            pareto(summary["nfe"], summary[metric.name], lower_is_better=metric.lower_is_better)
        ]
        columns = ["nfe", metric.name, *_others(summary, metric.name), *names]
        caption = f"No way of drawing is better by {metric.name} with as few evaluations"
        found.append(_shown(caption, front, columns))
    shown = summary.head(_MOST_ROWS)
    caption = "All ways of drawing; – where a setting has no effect"
    if len(shown) < len(summary):
        caption = f"The first {len(shown)} of {len(summary)} ways of drawing; – where a setting has"
        caption += " no effect"
    return [*found, _shown(caption, shown, [*names, *COSTS, *measures])]


def _others(summary: pd.DataFrame, measure: str) -> list[str]:
    """Columns beside a measure: its standard error, or whether it or its twin is biased."""
    return [n for n in (error_of_mean(measure), f"{measure}_biased") if n in summary]


def _shown(
    caption: str, frame: pd.DataFrame, columns: list[str]
) -> tuple[str, list[str], list[list[str]]]:
    rows: list[list[Any]] = frame[columns].astype(object).to_numpy().tolist()
    return caption, [plain(name) for name in columns], [[show(v) for v in row] for row in rows]
