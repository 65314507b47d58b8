"""Flow against VQ, as `janusflow compare`: `python sampling/compare_heads.py CONFIG.yaml -o DIR`.

Any setting of the config can be overridden after it, by `--section.key value`.
"""

import sys

from janusflow.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
