"""`janusflow convert`: from one checkpoint layout to another."""

from __future__ import annotations

import argparse


def run(arguments: argparse.Namespace) -> None:
    """Converts, and prints the new folder."""
    from janusflow.models.checkpoints import convert

    convert(arguments.source, arguments.target, to=arguments.to)
    print(arguments.target)
