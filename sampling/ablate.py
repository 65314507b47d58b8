"""Published claims tested: `python sampling/ablate.py configs/ablation/tiny.yaml -o DIR`.

Trains a base run and others that differ in one respect, and prints what each does to the figures,
with the outcome of every hypothesis of the design. Given again, it goes on where it stopped. Any
setting of the base run can be overridden for all runs, by `--section.key value`.
"""

from __future__ import annotations

import argparse
import sys

from janusflow.errors import JanusFlowError
from janusflow.experiments.ablation import run_ablation
from janusflow.settings import overrides_from_arguments


def main(argv: list[str] | None = None) -> int:
    """Reads the arguments, trains and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="a design, such as configs/ablation/tiny.yaml")
    parser.add_argument("-o", "--output-dir", required=True, metavar="DIR")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time")
    given, rest = parser.parse_known_args(argv)
    try:
        overrides = overrides_from_arguments(rest)
        print(run_ablation(given.config, given.output_dir, overrides, jobs=given.jobs))
    except JanusFlowError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
