"""How straight, guided, resolved and precise a model's paths are: tables, figures and a page.

`python sampling/diagnose.py --model tiny -o DIR`. What the figures mean: docs/diagnostics.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from janusflow.errors import JanusFlowError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model", default="tiny", help="folder, hub id or tiny (tiny)")
    add("--vae", default="default", metavar="WHERE", help="autoencoder (the model's own)")
    add("-o", "--output", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    add("--prompts", default="shapes", metavar="FILE", help="a prompt a line, or shapes (shapes)")
    add("--num", type=int, default=8, help="of prompts (8)")
    add("--steps", type=int, default=30, help="of the recorded run (30)")
    add("--guidance", type=float, default=2.0, help="1.0 is off (2.0)")
    add("--solver", default="euler", help="of the recorded run (euler)")
    add("--seed", type=int, default=0, help="of prompts, and of the first picture's noise (0)")
    add("--error-solvers", nargs="+", metavar="NAME", help="to compare with the reference")
    add("--error-evaluations", nargs="+", type=int, metavar="NFE", help="that each of them makes")
    add("--reference-solver", default="midpoint", metavar="NAME", help="(midpoint)")
    add("--reference-steps", type=int, default=200, metavar="N", help="(200)")
    add("--no-bfloat16", action="store_true", help="leave its comparison with float32 out")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--device", default="cpu", help="cpu, cuda, mps or auto (cpu)")
    arguments = parser.parse_args()
    try:
        print(diagnosed(arguments))
    except (JanusFlowError, OSError) as error:
        print(f"diagnose: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def diagnosed(arguments: argparse.Namespace) -> Path:
    from janusflow.commands.common import check_output_folder, pick_device
    from janusflow.experiments.diagnose import DiagnoseSettings, diagnose
    from janusflow.experiments.prompts import PromptSettings

    lists = {
        name: given
        for name in ("error_solvers", "error_evaluations")
        if (given := getattr(arguments, name)) is not None
    }
    settings = DiagnoseSettings(
        model=arguments.model,
        vae=arguments.vae,
        prompts=PromptSettings(arguments.prompts, arguments.num, arguments.seed),
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance,
        solver=arguments.solver,
        reference_solver=arguments.reference_solver,
        reference_steps=arguments.reference_steps,
        bfloat16=not arguments.no_bfloat16,
        dtype=arguments.dtype,
        device=str(pick_device(arguments.device)),
        **lists,
    )
    check_output_folder(arguments.output)

    from janusflow.experiments.diagnose_report import check_free, write_report

    check_free(arguments.output)
    return write_report(diagnose(settings, progress=True), arguments.output)


if __name__ == "__main__":
    sys.exit(main())
