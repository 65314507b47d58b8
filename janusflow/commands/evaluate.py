"""`janusflow eval`: a benchmark's scores as a table, and as JSON."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from janusflow.commands.common import (
    check_writable,
    drawing_options,
    load_pipeline,
    resolved_settings,
)


def run(arguments: argparse.Namespace) -> None:
    """Scores, prints the table and writes the JSON."""
    draws = arguments.benchmark == "shapes"
    for file in (arguments.json, arguments.sheet if draws else None):
        if file is not None:
            check_writable(file)

    from janusflow.evaluation.shapes import score_answers, score_pictures
    from janusflow.flow.solvers import make_solver

    options: dict[str, Any] = {"num": arguments.num, "seed": arguments.seed}
    options["progress"] = sys.stderr.isatty()
    if arguments.batch_size is not None:
        options["batch_size"] = arguments.batch_size
    if draws and arguments.solver is not None:
        make_solver(arguments.solver)
    pipe = load_pipeline(arguments, pictures=draws)
    if draws:
        options |= {"sheet": arguments.sheet, **drawing_options(arguments, pipe)}
    scores = (score_pictures if draws else score_answers)(pipe, **options)
    print_table(scores)
    if arguments.json is not None:
        from janusflow.files import write_json

        write_json(arguments.json, {**scores, "settings": resolved_settings(arguments, pipe)})


def print_table(scores: dict[str, Any]) -> None:
    """One line a kind, then the overall score and the number of prompts."""
    kinds = {
        name: value
        for name, value in scores.items()
        if isinstance(value, float) and name != "overall"
    }
    width = max(map(len, [*kinds, "overall"]))
    for name, value in kinds.items():
        print(f"{name:<{width}}  {value:.3f}")
    print(f"{'overall':<{width}}  {scores['overall']:.3f}  ({scores['num_prompts']} prompts)")
