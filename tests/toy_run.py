"""A small regression for tests of the training loop; as a script, a run of it in a process.

`python toy_run.py DIR '{"steps": 12}'` trains into DIR with these settings of the loop. With
ACCELERATE_USE_FSDP in the environment, weights are in shards.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

from janusflow.settings import fill
from janusflow.training.loop import LoopSettings, Objective, train
from janusflow.training.processes import begin


class Regression(Objective):
    """A small network that learns a fixed map from batches drawn by step and part."""

    def __init__(self, settings: LoopSettings | None = None) -> None:
        super().__init__()
        self.settings = settings or LoopSettings()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))

    def batch(self, step, part=0):
        generator = torch.Generator().manual_seed(self.settings.sample(step, part))
        return {"x": torch.randn(16, 4, generator=generator)}

    def forward(self, *, x):
        return {"squared": (self.net(x) - x[:, :2].sin()).square().mean()}

    def work(self, batch):
        return {"rows": len(batch["x"])}

    def export(self, folder):
        folder.mkdir(exist_ok=True)
        weights = {name: weight.tolist() for name, weight in self.state_dict().items()}
        (folder / "weights.json").write_text(json.dumps(weights))


class Streams(Regression):
    """The same from streams, one a part, which know nothing of steps; with a preview."""

    def __init__(self, settings: LoopSettings | None = None) -> None:
        super().__init__(settings)
        self.positions: dict[int, int] = {}

    def batch(self, step, part=0):
        position = self.positions.get(part, 0)
        self.positions[part] = position + 1
        generator = torch.Generator().manual_seed(1000 * part + position)
        return {"x": torch.randn(16, 4, generator=generator)}

    def data_state(self):
        return dict(self.positions)

    def load_data_state(self, states):
        self.positions = dict(states)

    def preview(self, step, folder):
        (folder / "preview.txt").write_text(str(step))
        x = torch.linspace(-1, 1, 64).view(16, 4)
        return {"score": round(-self.forward(x=x)["squared"].item(), 6)}


def loop(**changes) -> LoopSettings:
    """Settings for a few steps, in float32."""
    values = {"steps": 12, "precision": "no", "log_every": 1, "save_every": 4, **changes}
    return fill(LoopSettings, values)


def curve(folder: Path) -> list[dict[str, float]]:
    """The log of a run without the figures that time makes."""
    timed = ("second", "share")
    return [
        {
            name: figure
            for name, figure in json.loads(line).items()
            if not any(t in name for t in timed)
        }
        for line in (folder / "log.jsonl").read_text().splitlines()
    ]


def let_processors_shard() -> None:
    """Accelerate has FSDP on accelerators only; its code and PyTorch's run on CPUs as well."""
    begin()._shared_state["distributed_type"] = "MULTI_GPU"


if __name__ == "__main__":
    import os

    if os.environ.get("ACCELERATE_USE_FSDP"):
        let_processors_shard()
    settings = loop(**json.loads(sys.argv[2]))
    sys.exit(0 if train(Streams(settings), settings, Path(sys.argv[1])) else 3)
