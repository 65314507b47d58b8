"""Many ways of drawing, as `janusflow sweep`: `python sampling/sweep.py CONFIG.yaml -o DIR`.

Any setting of the config can be overridden after it, by `--section.key value`. Several processes:
`accelerate launch --num_processes 2 sampling/sweep.py CONFIG.yaml -o DIR`, or on CPUs, where that
starts one only, `torchrun --nproc_per_node 2 sampling/sweep.py CONFIG.yaml -o DIR`.
"""

import sys

from janusflow.cli import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
