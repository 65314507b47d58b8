"""Ways of drawing that have a name: what `--preset` takes, and `pipe(prompt, **PRESETS["fast"])`.

How they were chosen and what they reach is in `docs/samplers.md`.
"""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "fast": {
        "num_inference_steps": 6,
        "solver": "unipc",
        "shift": 1.3,
        "guidance_scale": 1.75,
    },
}
"""Arguments of the pipeline by name; all are of the flow head."""
