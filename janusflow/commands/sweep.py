"""`janusflow sweep`: many ways of drawing, from a config to a table and a report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from janusflow.commands.common import check_output_folder


def run(arguments: argparse.Namespace) -> None:
    """Sweeps, going on where an earlier run stopped; says where the results are."""
    from janusflow.settings import fill, overrides_from_arguments, read_yaml

    values = read_yaml(arguments.config)
    overrides = overrides_from_arguments(arguments.overrides)

    from janusflow.experiments.sweep import sweep
    from janusflow.experiments.sweep_design import SweepSettings

    settings = fill(SweepSettings, values, overrides)
    check_output_folder(arguments.output)
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # where a metric of the user's own may lie
    found = sweep(settings, arguments.output, progress=True)
    if found is None:
        return
    seconds = found.seconds
    print(f"{len(found.table)} rows, {found.table['cell'].nunique()} cells")
    print(
        f"{seconds.wall:.1f} s: {seconds.loading:.1f} s loading, {seconds.model:.1f} s in the "
        f"model, {seconds.wall - seconds.loading - seconds.model:.1f} s all else"
    )
    print(arguments.output / "tables" / "pictures.csv")
    print(found.report)
