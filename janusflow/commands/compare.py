"""`janusflow compare`: flow against VQ, from a config to a report."""

from __future__ import annotations

import argparse
import sys

from janusflow.commands.common import check_output_folder


def run(arguments: argparse.Namespace) -> None:
    """Compares, going on where an earlier run stopped; prints the tables and names the report."""
    from janusflow.settings import fill, overrides_from_arguments, read_yaml

    values = read_yaml(arguments.config)
    overrides = overrides_from_arguments(arguments.overrides)

    from janusflow.experiments.compare import CompareSettings, compare
    from janusflow.experiments.compare_report import text_table, write_report

    settings = fill(CompareSettings, values, overrides)
    check_output_folder(arguments.output)
    found = compare(settings, arguments.output, progress=sys.stderr.isatty())
    report = write_report(found, settings, arguments.output)
    for name in ("tokenizers", "generation", "cost", "timings"):
        print(f"{name}\n{text_table(found.tables[name])}\n")
    print(f"trained alike? {found.trained_alike}\n")
    print(report)
