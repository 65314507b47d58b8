"""Tables for a page from a sweep's `tables/pictures.csv`, in Markdown, on standard output.

`python sampling/pivot.py DIR/tables/pictures.csv --rows solver --columns nfe --by guidance_scale
--values shapes error` prints for each guidance and each value a table of means over pictures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import pandas as pd


def tables(
    pictures: pd.DataFrame, rows: list[str], columns: str, by: str | None, values: list[str]
) -> Iterator[str]:
    """Tables with a caption each."""
    groups = [("", pictures)] if by is None else pictures.groupby(by, sort=True)
    for group, part in groups:
        for value in values:
            kept = {name: pd.unique(part[name]) for name in rows}
            means = part.pivot_table(value, rows, columns, "mean", observed=True)
            order = [means.index.get_level_values(n).map(list(kept[n]).index) for n in rows]
            means = means.iloc[pd.MultiIndex.from_arrays(order).argsort()]
            caption = f"**{value}**" + (f", {by.replace('_', ' ')} {group:g}" if by else "")
            yield "\n".join([caption, "", *_markdown(means, rows, columns)])


def _markdown(means: pd.DataFrame, rows: list[str], columns: str) -> Iterator[str]:
    heads = [f"{name:g}" for name in means.columns]
    yield f"| {', '.join(rows)} \\ {columns} | {' | '.join(heads)} |"
    yield "|---" * (len(heads) + 1) + "|"
    for name, row in means.iterrows():
        shown = ", ".join(map(str, name)) if isinstance(name, tuple) else str(name)
        cells = ("" if pd.isna(value) else f"{value:.3f}" for value in row)
        yield f"| {shown} | {' | '.join(cells)} |"


def main(argv: list[str] | None = None) -> int:
    """Reads the arguments and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", help="tables/pictures.csv of a sweep")
    parser.add_argument("--rows", nargs="+", default=["solver"], metavar="NAME")
    parser.add_argument("--columns", default="nfe", metavar="NAME")
    parser.add_argument("--by", metavar="NAME", help="a table for each of its values")
    parser.add_argument("--values", nargs="+", default=["shapes"], metavar="NAME")
    given = parser.parse_args(argv)
    pictures = pd.read_csv(given.pictures)
    named = [*given.rows, given.columns, *given.values, *([given.by] if given.by else [])]
    if unknown := [name for name in named if name not in pictures]:
        parser.error(f"{given.pictures} has no column {', '.join(unknown)}")
    print(*tables(pictures, given.rows, given.columns, given.by, given.values), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
