"""`python -m janusflow.training CONFIG.yaml`, for `accelerate launch -m`."""

import sys

from torch import distributed

from janusflow.cli import main

code = main(["train", *sys.argv[1:]])
if code == 0 and distributed.is_initialized():
    distributed.destroy_process_group()  # its threads may still be at work when Python ends
sys.exit(code)
