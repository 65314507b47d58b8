"""Runs of a config with weights in shards, on CPUs.

`python stage_run.py CONFIG FOLDER ...`, in each process that `accelerate launch` starts, trains
into one folder after another, and says in `layout.json` of each what was sharded.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from toy_run import let_processors_shard

from janusflow.training import processes
from janusflow.training.run import run


def layout(objective) -> dict:
    """How many modules gather their own weights, by class; the weights that no process shares."""
    # FSDP2 gives a module a class of its own, whose bases are FSDPModule and what it was.
    classes = [type(m).__mro__[2] for m in objective.modules() if isinstance(m, FSDPModule)]
    weights = objective.named_parameters()
    return {
        "gathering": Counter(kind.__name__ for kind in classes),
        "whole": [name for name, weight in weights if not isinstance(weight, DTensor)],
    }


def prepare_and_note(accelerator, objective, optimizers, prepare=processes.prepare):
    prepared = prepare(accelerator, objective, optimizers)
    if accelerator.is_main_process:
        folder = Path(accelerator.project_dir)
        folder.mkdir(exist_ok=True)
        (folder / "layout.json").write_text(json.dumps(layout(objective)))
    return prepared


if __name__ == "__main__":
    config, *folders = sys.argv[1:]
    processes.prepare = prepare_and_note
    for folder in folders:
        let_processors_shard()
        run(config, [f"output_dir={folder}"])
