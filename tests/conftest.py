"""Set before any test module imports a library: no test reaches for a network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
