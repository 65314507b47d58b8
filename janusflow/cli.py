"""The `janusflow` command: arguments in, exit status out.

Status 0, or 2 with one line on standard error for a user's mistake, or 130 when interrupted; a
traceback is a bug. This module and `--help` import nothing heavy: what a command does is in
`janusflow.commands`, each imported when it is called.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from janusflow.errors import JanusFlowError, SettingsError
from janusflow.version import __version__

# Read when these libraries are imported. What they have to say of a mistake, we say in one line.
_QUIET = {
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "KINETO_LOG_LEVEL": "99",  # torch's profiler, which counts memory for us
    "TRANSFORMERS_VERBOSITY": "error",
}


class _Parser(argparse.ArgumentParser):
    """A parser that leaves printing and exiting to `main`."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments without the command's name; those of the process when not given.

    Returns:
        The exit status.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # an answer may hold what a terminal cannot show
    notes = _NoteKeeper()
    logging.getLogger("janusflow").addHandler(notes)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            arguments, rest = _parser().parse_known_args(argv)
            if rest and not arguments.takes_overrides:
                raise SettingsError(f"unknown arguments: {' '.join(rest)}")
            if arguments.takes_overrides:
                arguments.overrides = rest
                notes.live = True  # a training may take days
            import_module(f"janusflow.commands.{arguments.module}").run(arguments)
            sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain once more when it closes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (JanusFlowError, OSError) as error:
        print(f"janusflow: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finally:
        logging.getLogger("janusflow").removeHandler(notes)
    notes.show()
    return 0


class _NoteKeeper(logging.Handler):
    """Keeps warnings until a command has ended well: of a mistake, one line is shown."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.notes: list[str] = []
        self.live = False

    def emit(self, record: logging.LogRecord) -> None:
        self.notes.append(f"janusflow: {record.levelname.lower()}: {record.getMessage()}")
        if self.live:
            self.show()

    def show(self) -> None:
        for note in dict.fromkeys(self.notes):
            print(note, file=sys.stderr)
        self.notes.clear()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="janusflow",
        description="Pictures from text and answers about pictures, with one language model.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"janusflow {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, help: str, *, module: str | None = None) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        command.set_defaults(module=module or name, takes_overrides=False)
        return command

    generate = add("generate", "Draw pictures of prompts.")
    generate.add_argument("prompts", nargs="+", metavar="PROMPT")
    _add_model(generate)
    _add_sampling(generate)
    generate.add_argument(
        "--negative", metavar="TEXT", help="what to be guided away from, instead of no condition"
    )
    generate.add_argument(
        "--image",
        metavar="FILE",
        help="flow: picture to edit; the published model never learned to",
    )
    generate.add_argument(
        "--edit", metavar="METHOD", help="flow: sdedit, flowedit or inversion (sdedit)"
    )
    generate.add_argument(
        "--source-prompt", metavar="TEXT",
        help="flow: what the picture shows, for flowedit and inversion (nothing said)",
    )  # fmt: skip
    generate.add_argument(
        "--strength", type=_finite, metavar="S",
        help="flow: of an edit, above 0 and at most 1 (0.6, 0.85 or 1, by method)",
    )  # fmt: skip
    generate.add_argument(
        "--mask-image", metavar="FILE", help="flow: white where the picture is to be drawn anew"
    )
    generate.add_argument(
        "--num-images", type=_at_least(1), default=1, metavar="N", help="a prompt (1)"
    )
    generate.add_argument(
        "-o", "--output", type=Path, default=Path("out.png"), metavar="FILE",
        help="PNG file (out.png); several pictures are numbered: out-0.png, out-1.png, …",
    )  # fmt: skip
    generate.add_argument(
        "--grid", action="store_true", help="also write a contact sheet of all, as FILE itself"
    )

    ask = add("ask", "Answer a question about pictures.")
    ask.add_argument("images", nargs="+", metavar="IMAGE")
    ask.add_argument("question", metavar="QUESTION")
    _add_model(ask)
    ask.add_argument("--max-new-tokens", type=_at_least(1), default=64, metavar="N")

    info = add("info", "Tell what a model folder holds.")
    info.add_argument("model", metavar="MODEL", help='a folder, a hub id, or "tiny"')
    info.add_argument("--json", action="store_true", help="as JSON")

    convert = add("convert", "Rewrite a model in another layout, bit by bit the same weights.")
    convert.add_argument("source", metavar="SRC")
    convert.add_argument("target", type=Path, metavar="DST", help="a folder that is made")
    convert.add_argument(
        "--to", choices=("janusflow", "published", "transformers"), default="janusflow",
        help="the project's layout (default), that of JanusFlow or Janus, transformers' of Janus",
    )  # fmt: skip

    train = add(
        "train", "Train what a config describes, or go on where it stopped. Any setting of the "
        "config can be overridden after it, by --section.key value.",
    )  # fmt: skip
    train.add_argument("config", type=Path, metavar="CONFIG.yaml")
    train.add_argument("--output-dir", type=Path, metavar="DIR", help="instead of the config's")
    train.set_defaults(takes_overrides=True)

    compare = add(
        "compare", "Compare the flow head with the VQ head, going on where an earlier run stopped. "
        "Any setting of the config can be overridden after it, by --section.key value.",
    )  # fmt: skip
    compare.add_argument("config", type=Path, metavar="CONFIG.yaml")
    compare.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="folder of the results"
    )
    compare.set_defaults(takes_overrides=True)

    sweep = add(
        "sweep", "Draw the same prompts and noise in many ways and measure them, going on where an "
        "earlier run stopped. Any setting of the config can be overridden after it, by "
        "--section.key value.",
    )  # fmt: skip
    sweep.add_argument("config", type=Path, metavar="CONFIG.yaml")
    sweep.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="folder of the results"
    )
    sweep.set_defaults(takes_overrides=True)

    evaluate = add("eval", "Score a model on a benchmark.", module="evaluate")
    benchmarks = evaluate.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for name, help in (
        ("shapes", "Pictures of the shapes world, by its exact scorer."),
        ("shapes-vqa", "Answers to questions about drawn pictures of the shapes world."),
    ):
        benchmark = benchmarks.add_parser(name, help=help, description=help, allow_abbrev=False)
        _add_model(benchmark)
        benchmark.add_argument(
            "--num", type=_at_least(1), default=300, metavar="N", help="prompts (300)"
        )
        if name == "shapes":
            _add_sampling(benchmark)
            benchmark.add_argument(
                "--sheet", type=Path, metavar="FILE", help="PNG of the first 64, misses in red"
            )
        else:
            _add_seed(benchmark)
        benchmark.add_argument(
            "--batch-size", type=_at_least(1), metavar="N", help="at once, by memory"
        )
        benchmark.add_argument("--json", type=Path, metavar="FILE", help="write the scores there")
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="tiny", help='a folder, a hub id, or "tiny", the bundled model (default)'
    )
    parser.add_argument(
        "--vae", default="default", metavar="WHERE",
        help="autoencoder: a folder or hub id, where it is not the model's own",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps, … (auto)")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="of the weights; auto is bfloat16 on CUDA and float32 elsewhere",
    )  # fmt: skip


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--head", help="generation head: flow or vq (the model's first)")
    parser.add_argument(
        "--guidance", type=_finite, metavar="W", help="1.0 is off (2.0 for flow, 5.0 for vq)"
    )
    parser.add_argument(
        "--steps", type=_at_least(1), metavar="N", help="flow: intervals in time (30)"
    )
    parser.add_argument(
        "--preset", metavar="NAME", help="flow: steps, solver and shift where not given: fast"
    )
    parser.add_argument("--solver", help="flow: of the ODE (euler)")
    parser.add_argument(
        "--shift", type=_finite, metavar="S", help="flow: above 1, more steps near the noise (1.0)"
    )
    parser.add_argument("--rtol", type=_finite, metavar="R", help="flow: of adaptive solvers")
    parser.add_argument("--atol", type=_finite, metavar="A", help="flow: of adaptive solvers")
    parser.add_argument(
        "--guidance-method", metavar="NAME", help="flow: cfg, cfg-zero or apg (cfg)"
    )
    parser.add_argument(
        "--guidance-interval", type=_finite, nargs=2, metavar=("A", "B"),
        help="flow: times between which there is guidance, 0 is noise (0 1)",
    )  # fmt: skip
    parser.add_argument(
        "--guidance-rescale", type=_finite, metavar="R", help="flow: share of rescaling (0)"
    )
    parser.add_argument(
        "--temperature", type=_finite, metavar="T", help="vq: of the draws, 0 is greedy (1.0)"
    )
    parser.add_argument(
        "--top-k", type=_at_least(1), metavar="K", help="vq: draw from so many tokens (all)"
    )
    parser.add_argument(
        "--top-p", type=_finite, metavar="P", help="vq: draw from the likeliest up to P (all)"
    )
    _add_seed(parser)


def _add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seed", type=_at_least(0), default=0, metavar="N",
        help="of the first picture; the next has the next seed (0)",
    )  # fmt: skip


def _at_least(lowest: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = lowest - 1
        if value < lowest:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at least {lowest}, got {text!r}"
            )
        return value

    return read


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
