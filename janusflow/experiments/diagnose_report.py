"""A diagnosis on disk: tables, figures, a summary, and one page with all of it."""

from __future__ import annotations

from pathlib import Path

import yaml

from janusflow.errors import SettingsError
from janusflow.experiments.diagnose import Diagnosis
from janusflow.experiments.diagnose_plots import figures
from janusflow.experiments.figures import show
from janusflow.experiments.page import data_uri, write_page
from janusflow.experiments.sweep_plots import plain
from janusflow.files import atomic_folder, write_json

_BODY = """\
<p>{{ summary.settings.model }}, {{ summary.settings.solver }} with
{{ summary.settings.num_inference_steps }} steps, guidance {{ summary.settings.guidance_scale }},
{{ summary.settings.dtype }}: {{ summary.nfe }} evaluations, {{ summary.num_forward_passes }} rows
of the network a picture.</p>
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
<h2>Figures</h2>
<p>Lines are medians over pictures, bands and bars reach from the lower to the upper quartile.</p>
{% for figure, address in figures %}
<figure>
<img src="{{ address }}" alt="{{ figure.alt }}">
<figcaption>{{ figure.title }}</figcaption>
</figure>
{% endfor %}
<h2>Settings</h2>
<pre>{{ settings }}</pre>
"""


def check_free(folder: Path) -> None:
    """Refuses a folder that holds something, which a diagnosis would take the place of.

    Raises:
        SettingsError: If it does, or is a file.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise SettingsError(f"{folder} holds something already; give a new or an empty folder")


def write_report(found: Diagnosis, folder: Path) -> Path:
    """Writes the whole folder at once, or nothing.

    Args:
        found: What came out.
        folder: New or empty; `steps.csv`, `pictures.csv`, `errors.csv`, `precision.csv`,
            `summary.json`, `figures/*.png`, `figures/*.svg` and `report.html` come into it.

    Returns:
        The page.

    Raises:
        SettingsError: If the folder holds something, or a library is not installed.
    """
    check_free(folder)
    drawn = list(figures(found))
    with atomic_folder(folder.absolute()) as scratch:
        for name in ("steps", "pictures", "errors", "precision"):
            if (table := getattr(found, name)) is not None:
                table.to_csv(scratch / f"{name}.csv", index=False, lineterminator="\n")
        write_json(scratch / "summary.json", found.summary)
        (scratch / "figures").mkdir()
        for figure in drawn:
            for kind in ("svg", "png"):
                (scratch / "figures" / f"{figure.name}.{kind}").write_bytes(getattr(figure, kind))
        write_page(
            scratch / "report.html",
            "Diagnosis of a flow",
            _BODY,
            summary=found.summary,
            tables=_tables(found),
            figures=[(figure, data_uri(figure.png)) for figure in drawn],
            settings=yaml.safe_dump(
                {name: found.summary[name] for name in ("settings", "weights", "versions")},
                sort_keys=False,
            ),
        )
    return folder / "report.html"


def _tables(found: Diagnosis) -> list[tuple[str, list[str], list[list[str]]]]:
    """Captions, names of columns and rows."""
    keys = ("median", "lower_quartile", "upper_quartile")
    spreads = {k: v for k, v in found.summary.items() if isinstance(v, dict) and "median" in v}
    ways = [[plain(name), *(show(v[key]) for key in keys)] for name, v in spreads.items()]
    orders = [[solver, show(order)] for solver, order in found.summary["orders"].items()]
    rows = found.pictures.astype(object).to_numpy().tolist()
    whole = show(found.summary["straightness_of_all"])
    return [
        (
            f"Whole paths, over pictures; straightness of all, weighted by chord², is {whole}",
            ["measure", *map(plain, keys)],
            ways,
        ),
        ("Order of the endpoint error, fitted", ["solver", "order"], orders),
        (
            "Pictures",
            [plain(str(name)) for name in found.pictures],
            [[show(value) for value in row] for row in rows],
        ),
    ]
