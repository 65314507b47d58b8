"""`python -m janusflow.training CONFIG.yaml`, for `accelerate launch -m`."""

import sys

from janusflow.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
