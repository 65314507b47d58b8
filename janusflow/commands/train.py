"""`janusflow train`: a training run from a config and overrides."""

from __future__ import annotations

import argparse


def run(arguments: argparse.Namespace) -> None:
    """Trains until done or out of its time; run it again to go on."""
    from janusflow.settings import overrides_from_arguments
    from janusflow.training.run import run as train

    overrides = overrides_from_arguments(arguments.overrides)
    if arguments.output_dir is not None:
        overrides.append(f"output_dir={arguments.output_dir}")
    train(arguments.config, overrides)
