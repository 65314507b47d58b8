"""Commands in two processes on CPUs, which talk by gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
ACCELERATE = TESTS.parent / "configs" / "accelerate"


def in_two_processes(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """By PyTorch's own launcher."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return _python(launcher, arguments, environment)


def launched(config: Path, *arguments: str) -> subprocess.CompletedProcess:
    """By `accelerate launch` with a config for GPUs, of which there need be none."""
    launcher = ["accelerate.commands.launch", "--config_file", str(config), "--num_processes", "2"]
    return _python([*launcher, "--main_process_port", "0"], arguments, {})


def _python(launcher, arguments, environment):
    return subprocess.run(
        [sys.executable, "-m", *launcher, *arguments],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
