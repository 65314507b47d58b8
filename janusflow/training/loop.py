"""The training loop, whatever is trained.

An `Objective` is a module that turns a batch into named losses; batches are a function of
(seed, step), so a run that was stopped goes on with the very next sample. The order in a step is:
losses, backward, clip, step, average. The loop knows nothing of pictures or language models.
"""

from __future__ import annotations

import json
import time
from abc import abstractmethod
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from janusflow.errors import SettingsError
from janusflow.files import write_json
from janusflow.training import checkpoints
from janusflow.training.ema import EMA
from janusflow.training.optimizers import OptimizerSettings, build_optimizers, rate_factor
from janusflow.version import versions


@dataclass(frozen=True)
class LoopSettings:
    """How long, how precisely and how often."""

    steps: int = 1000
    seed: int = 0
    precision: str = "bf16"
    """"bf16" (autocast; weights stay float32) or "no"."""
    compile: bool = False
    """Compile the objective with torch.compile."""
    ema_decay: float = 0.99
    log_every: int = 20
    save_every: int = 200
    preview_every: int = 0
    """Steps between previews; 0 = none."""
    max_minutes: float = 0.0
    """Stop (resumably) after this wall time; 0 = no limit."""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise SettingsError(f"loop.steps is at least 1, not {self.steps}")
        if self.precision not in ("bf16", "no"):
            raise SettingsError(f"loop.precision is 'bf16' or 'no', not {self.precision!r}")


class Objective(nn.Module):
    """What is trained: modules, their batches and their losses."""

    @abstractmethod
    def batch(self, step: int) -> dict[str, Tensor]:
        """The batch of a step, on the CPU; the same for the same step."""

    @abstractmethod
    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """Named losses (scalars); their sum is minimised."""

    def preview(self, step: int, folder: Path) -> dict[str, float]:
        """Writes what training looks like into `folder`; returns figures for the log."""
        return {}

    def export(self, folder: Path) -> None:
        """Writes the finished model."""


def train(objective: Objective, settings: LoopSettings, output_dir: Path) -> bool:
    """Trains, resuming from the newest checkpoint in `output_dir` when there is one.

    Returns:
        True when the last step was reached and the averaged model exported, False when
        `max_minutes` ended the run before; the same call goes on from there.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(mixed_precision=settings.precision)
    optimizers = build_optimizers(objective, settings.optimizer)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    ema = EMA(objective, settings.ema_decay)
    _announce(accelerator, objective)

    found = checkpoints.checkpoints(output_dir)
    start = checkpoints.restore(found[-1], objective, ema, optimizers) if found else 0
    accelerator.print(f"starting at step {start} of {settings.steps}", flush=True)
    objective.to(accelerator.device)
    ema.averages = {n: average.to(accelerator.device) for n, average in ema.averages.items()}
    model: Any = accelerator.prepare_model(objective)
    if settings.compile:
        model = torch.compile(model)

    parameters = [p for p in objective.parameters() if p.requires_grad]
    began = logged = time.monotonic()
    finished = True
    for step in range(start, settings.steps):
        batch = {k: v.to(accelerator.device) for k, v in objective.batch(step).items()}
        losses = model(**batch)
        accelerator.backward(sum(losses.values()))
        norm = accelerator.clip_grad_norm_(parameters, settings.optimizer.max_grad_norm)
        factor = rate_factor(step, settings.steps, settings.optimizer)
        for optimizer, rates in zip(optimizers, peaks, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ema.update(objective)

        done = step + 1
        if done % settings.log_every == 0:
            now = time.monotonic()
            figures = {name: round(loss.item(), 5) for name, loss in losses.items()}
            figures |= {"grad_norm": round(float(norm), 4), "rate": round(factor, 4)}
            figures["seconds_per_step"] = round((now - logged) / settings.log_every, 4)
            logged = now
            _log(accelerator, output_dir, {"step": done, **figures})
            if not torch.isfinite(norm):
                raise FloatingPointError(f"the gradient is not finite at step {done}")
        last = done == settings.steps
        if done % settings.save_every == 0 and accelerator.is_main_process and not last:
            checkpoints.save(output_dir, done, objective, ema, optimizers)
        if settings.preview_every and (done % settings.preview_every == 0 or last):
            if accelerator.is_main_process:
                with ema.applied(objective), torch.no_grad():
                    objective.eval()
                    figures = objective.preview(done, output_dir)
                    objective.train()
                _log(accelerator, output_dir, {"step": done, **figures})
            logged = time.monotonic()
        if (
            settings.max_minutes
            and time.monotonic() - began > 60 * settings.max_minutes
            and not last
        ):
            finished = False
            break

    if accelerator.is_main_process:
        if start < settings.steps:
            checkpoints.save(output_dir, step + 1, objective, ema, optimizers)
        if finished:
            with ema.applied(objective):
                objective.export(output_dir / "final")
    return finished


def write_settings(output_dir: Path, settings: Any) -> None:
    """Leaves the resolved settings and the versions beside the run."""
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / "settings.json", {**asdict(settings), "versions": versions()})


def _announce(accelerator: Accelerator, objective: Objective) -> None:
    for name, child in objective.named_children():
        trainable = sum(p.numel() for p in child.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in child.parameters() if not p.requires_grad)
        accelerator.print(f"{name}: {trainable:,} trainable, {frozen:,} frozen parameters")


def _log(accelerator: Accelerator, output_dir: Path, record: dict[str, Any]) -> None:
    if accelerator.is_main_process:
        line = json.dumps(record)
        print(line, flush=True)
        with (output_dir / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(line + "\n")
