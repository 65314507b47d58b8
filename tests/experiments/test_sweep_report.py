"""Tables, figures and the page of a sweep, from tables that are made up."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from janusflow.experiments.figures import Figure
from janusflow.experiments.sweep_design import cells
from janusflow.experiments.sweep_metrics import Metric, find_metrics
from janusflow.experiments.sweep_plots import figures
from janusflow.experiments.sweep_report import write_report
from janusflow.experiments.sweep_settings import SweepSettings
from janusflow.experiments.sweep_table import SETTINGS, pareto, summarize, varied
from janusflow.settings import fill

METRICS = find_metrics(["shapes", "error", "psnr"], of_shapes=True)
EVALUATIONS = {"euler": 1, "midpoint": 2}
ORDER = {"euler": 1, "midpoint": 2}


def table_of(folder: Path, pictures: int = 4, **axes: Any) -> pd.DataFrame:
    """A table whose error falls exactly by the solver's order."""
    rows = []
    (folder / "images").mkdir(exist_ok=True)
    for cell, picture in product(cells(fill(SweepSettings, {"axes": axes})), range(pictures)):
        nfe = 16
        row = {name: getattr(cell, name, None) for name in SETTINGS}
        if cell.head == "flow":
            assert cell.num_inference_steps is not None
            nfe = cell.num_inference_steps * EVALUATIONS[cell.solver or ""]
            row["error"] = (1 + picture) * nfe ** -ORDER[cell.solver or ""]
            row["psnr"] = 20 - row["error"]
        name = f"images/{cell.id}-{picture}.png"
        Image.new("RGB", (16, 16), (nfe, 40 * picture, 90)).save(folder / name)
        row |= {
            "cell": cell.id,
            "picture": picture,
            "picture_seed": cell.seed + picture,
            "prompt": f"prompt <{picture}>",
            "nfe": nfe,
            "num_forward_passes": nfe,
            "seconds": 0.1 * nfe,
            "shapes": float(picture < nfe),
            "image": name,
        }
        rows.append(row)
    return pd.DataFrame(rows)


def figures_of(
    table: pd.DataFrame, folder: Path, metrics: list[Metric] = METRICS
) -> dict[str, Figure]:
    summary = summarize(table, [metric.name for metric in metrics])
    return {figure.name: figure for figure in figures(table, summary, metrics, folder)}


def test_the_front_holds_what_nothing_cheaper_reaches() -> None:
    costs, values = [4, 1, 2, 8, 2, 1], [0.7, 0.2, 0.5, 0.7, 0.6, 0.1]
    assert pareto(costs, values, lower_is_better=False) == [1, 4, 0]
    assert pareto(costs, [-value for value in values], lower_is_better=True) == [1, 4, 0]
    assert pareto([1, 2], [float("nan"), 0.1], lower_is_better=False) == [1]


def test_the_summary_takes_seeds_and_pictures_together(tmp_path: Path) -> None:
    table = table_of(tmp_path, num_inference_steps=[1, 2], seed=[0, 9])
    summary = summarize(table, ["shapes", "error"])
    assert summary["pictures"].tolist() == [8, 8]
    assert "seed" not in summary
    assert summary["shapes"].tolist() == [0.25, 0.5]
    values = table[table["nfe"] == 2]["error"]
    assert summary["error"][1] == pytest.approx(values.mean())
    expected = values.std(ddof=1) / len(values) ** 0.5
    assert summary["error_error_of_mean"][1] == pytest.approx(expected)
    assert varied(summary) == ["num_inference_steps"]


def test_a_setting_varies_where_it_has_an_effect(tmp_path: Path) -> None:
    table = table_of(tmp_path, guidance_scale=[1.0, 2.0])
    assert varied(summarize(table, [])) == ["guidance_scale"]


AXES = {"num_inference_steps": [2, 4, 8], "guidance_scale": [1.0, 3.0]}


def test_all_figures_are_drawn_and_say_what_they_show(tmp_path: Path) -> None:
    table = table_of(tmp_path, solver=["euler", "midpoint"], **AXES)
    drawn = figures_of(table, tmp_path)
    assert set(drawn) == {
        *(f"{m}-against-{c}" for m in ("shapes", "error", "psnr") for c in ("nfe", "seconds")),
        *(f"{m}-map-flow" for m in ("shapes", "error", "psnr")),
        *(f"contact-sheet-flow-{picture}" for picture in range(3)),
        "order-of-error",
    }
    orders = drawn["order-of-error"].alt
    assert "guidance 1, solver euler: order 1.00" in orders
    assert "guidance 3, solver midpoint: order 2.00" in orders
    quality = drawn["error-against-nfe"].alt
    assert "(lower is better)" in quality
    assert "of 12 ways of drawing" in quality
    assert quality.endswith("error 0.009766 at 16 (steps 8, guidance 1, solver midpoint).")
    alt = drawn["shapes-map-flow"].alt
    assert "solver euler: best 1 at guidance 1, steps 4; from 0.5 to 1" in alt
    sheet = drawn["contact-sheet-flow-1"].alt
    assert "“prompt <1>”, seed 1, solver euler" in sheet
    assert "steps 2, 4, 8 from left to right, guidance 1, 3 from top to bottom" in sheet
    for figure in drawn.values():
        assert figure.png.startswith(b"\x89PNG")
        assert b"<svg" in figure.svg
    (psnr,) = find_metrics(["psnr"], of_shapes=True)
    again = figures_of(table, tmp_path, [psnr])
    assert len(again) == 6
    assert all(drawn[name] == figure for name, figure in again.items()), "the same bytes again"


def test_a_picture_of_the_sheet_lies_where_its_settings_are(tmp_path: Path) -> None:
    table = table_of(tmp_path, pictures=1, **AXES)
    (figure,) = (
        figure
        for name, figure in figures_of(table, tmp_path, METRICS[:1]).items()
        if name.startswith("contact-sheet")
    )
    file = tmp_path / "sheet.png"
    file.write_bytes(figure.png)
    with Image.open(file) as sheet:
        seen = sheet.convert("RGB")
        reds = [seen.getpixel((x, seen.height // 3))[0] for x in range(seen.width)]
    nearest = [red for red in reds if red < 20 and reds.count(red) > 3]
    assert [red for i, red in enumerate(nearest) if i == 0 or nearest[i - 1] != red][-3:] == [
        2,
        4,
        8,
    ]


@pytest.mark.parametrize(
    ("axes", "left_out"),
    [
        ({"num_inference_steps": [4]}, "against|map|sheet|order"),
        ({"num_inference_steps": [4], "guidance_scale": [1.0, 2.0]}, "against|map|sheet|order"),
        ({"num_inference_steps": [4, 8]}, "map|sheet"),
        ({"num_inference_steps": [4, 8], "solver": ["euler", "midpoint"]}, "shapes"),
    ],
)
def test_a_figure_without_spread_is_left_out(
    axes: dict[str, Any], left_out: str, tmp_path: Path
) -> None:
    table = table_of(tmp_path, **axes)
    names = list(figures_of(table, tmp_path))
    assert not [name for name in names if re.search(left_out, name)]
    assert bool(names) == (len(axes["num_inference_steps"]) > 1)


def test_both_heads_have_figures_of_their_own(tmp_path: Path) -> None:
    table = table_of(tmp_path, head=["flow", "vq"], temperature=[0.5, 1.0], **AXES)
    table.loc[table["head"] == "vq", "shapes"] *= table["temperature"]
    drawn = figures_of(table, tmp_path, METRICS[:2])
    assert "temperature 0.5, 1 from left to right" in drawn["contact-sheet-vq-0"].alt
    assert "shapes-map-vq" in drawn
    assert "error-map-vq" not in drawn


def test_many_ways_of_drawing_become_points_and_no_map_of_gaps(tmp_path: Path) -> None:
    steps = [*range(2, 14)]
    table = table_of(tmp_path, 2, num_inference_steps=steps, guidance_scale=[1.0, *range(2, 13)])
    keep = table["num_inference_steps"] == table["guidance_scale"] + 1
    drawn = figures_of(table[keep].copy(), tmp_path, METRICS[1:2])
    assert "of 12 ways of drawing" in drawn["error-against-nfe"].alt
    assert not [name for name in drawn if "map" in name or "sheet" in name]


class Reader(HTMLParser):
    """What a screen reader would look for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture
def page(tmp_path: Path) -> Callable[..., str]:
    def write(**axes: Any) -> str:
        table = table_of(tmp_path, **axes)
        summary = summarize(table, [metric.name for metric in METRICS])
        (tmp_path / "figures").mkdir()
        settings = fill(SweepSettings, {"axes": axes})
        return write_report(tmp_path, settings, table, summary, METRICS).read_text("utf-8")

    return write


def test_the_report_is_whole_and_can_be_read_aloud(
    page: Callable[..., str], tmp_path: Path
) -> None:
    text = page(**AXES)
    reader = Reader()
    reader.feed(text)
    assert reader.all("html") == [{"lang": "en"}]
    assert [tag for tag, _ in reader.found if tag in ("h1", "h2")] == ["h1", *["h2"] * 4]
    images = reader.all("img")
    assert len(images) == len(list((tmp_path / "figures").glob("*.svg"))) == 13
    assert len(list((tmp_path / "figures").glob("*.png"))) == 13
    for image in images:
        assert len(image["alt"] or "") > 60
        assert (image["src"] or "").startswith("data:image/png;base64,")
    assert len(reader.all("table")) == len(reader.all("caption")) == 3 + 1
    assert {entry["scope"] for entry in reader.all("th")} == {"col", "row"}
    assert "http" not in text
    assert "prompt &lt;1&gt;" in text
    assert "guidance_scale" in text.split("<pre>")[1]


def test_the_tables_of_the_report_hold_the_numbers(page: Callable[..., str]) -> None:
    text = page(num_inference_steps=[2, 4], solver=["euler", "midpoint"])
    best = text.split("No way of drawing is better by error")[2].split("</table>")[0]
    rows = re.findall(r"<tr><th scope=\"row\">(.*?)</th><td>(.*?)</td>.*?<td>(\w+)</td></tr>", best)
    assert rows == [
        ("2", "1.25", "euler"),
        ("4", "0.1562", "midpoint"),
        ("8", "0.03906", "midpoint"),
    ]
