"""The training loop, whatever is trained.

A step is one update of the weights. Its batch has M = `microbatches` parts, shared evenly by the
processes; the gradient is the mean over all parts, so the number of processes changes nothing but
the order of a sum. The order in a step is: forward and backward of each part, clip, step, average.
The loop knows nothing of pictures or language models; what an objective is stands in `objective`,
processes and shards in `processes`.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from janusflow.errors import DivergedError, SettingsError
from janusflow.files import atomic_folder, write_json
from janusflow.training import announcement, changes, checkpoints, processes
from janusflow.training.ema import EMA
from janusflow.training.logs import Logs, check_trackers
from janusflow.training.making import made
from janusflow.training.objective import Objective
from janusflow.training.optimizers import (
    OptimizerSettings,
    build_optimizers,
    peak_rates,
    rate_factor,
    set_rates,
)
from janusflow.training.throughput import Meter, bfloat16_slowdown, count_arithmetic, matmul_peak
from janusflow.version import versions


@dataclass(frozen=True)
class LoopSettings:
    """How long, how precisely and how often."""

    steps: int = 1000
    seed: int = 0
    microbatches: int = 1
    """Parts of a step, over which the gradient is averaged; a multiple of the processes."""
    precision: str = "bf16"
    """"bf16" (autocast; weights stay float32; Muon's updates) or "no": all in float32."""
    workers: int = 0
    """Processes that make batches ahead, where a batch is a function of its number; 0 = none."""
    compile: bool = False
    """Compile the objective with torch.compile."""
    gradient_checkpointing: bool = False
    """Compute states inside the layers again going backward, for less memory."""
    ema_decay: float = 0.99
    ema_device: str = "device"
    """Where the averages lie: "device", beside the weights, or "cpu"."""
    log_every: int = 20
    trackers: list[str] = field(default_factory=list)
    """Where to log besides the console and log.jsonl: accelerate's "tensorboard", "wandb", …"""
    save_every: int = 200
    keep_last: int = 2
    """How many of the newest checkpoints stay."""
    best: str | None = None
    """Figure of previews or validation whose highest value makes a checkpoint stay as well; the
    lowest with "-" in front."""
    preview_every: int = 0
    """Steps between previews; 0 = none."""
    validate_every: int = 0
    """Steps between validations; 0 = none."""
    max_minutes: float = 0.0
    """Stop (resumably) after this wall time; 0 = no limit."""
    accept_changes: bool = False
    """Go on from a checkpoint that was made with other settings."""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)

    def __post_init__(self) -> None:
        for name in ("steps", "microbatches", "log_every", "save_every", "keep_last"):
            if getattr(self, name) < 1:
                raise SettingsError(f"loop.{name} is at least 1, not {getattr(self, name)}")
        if self.workers < 0:
            raise SettingsError(f"loop.workers is at least 0, not {self.workers}")
        if self.workers and "fork" not in torch.multiprocessing.get_all_start_methods():
            raise SettingsError(
                f"loop.workers is {self.workers}, which needs processes that fork, as on Linux; "
                "set it to 0"
            )
        if self.precision not in ("bf16", "no"):
            raise SettingsError(f"loop.precision is 'bf16' or 'no', not {self.precision!r}")
        if self.ema_device not in ("device", "cpu"):
            raise SettingsError(f"loop.ema_device is 'device' or 'cpu', not {self.ema_device!r}")
        if self.best is not None and not (self.preview_every or self.validate_every):
            raise SettingsError(
                f"loop.best is {self.best!r}, but nothing measures it; "
                "set loop.preview_every or loop.validate_every"
            )

    def sample(self, step: int, part: int) -> int:
        """Number of a part among those of all steps: what draws of (seed, number) are made of."""
        return step * self.microbatches + part


def train(
    objective: Objective,
    settings: LoopSettings,
    output_dir: Path,
    config: dict[str, Any] | None = None,
) -> bool:
    """Trains, resuming from the newest checkpoint in `output_dir` when there is one.

    Args:
        objective: What is trained.
        settings: How.
        output_dir: Where the run lives.
        config: All settings of the run, to be kept beside it and in its checkpoints; those of the
            loop when not given.

    Returns:
        True when the last step was reached and the averaged model exported, False when
        `max_minutes` ended the run before; the same call goes on from there.

    Raises:
        SettingsError: If the settings do not fit the machine, the objective, or the checkpoint, or
            another run is at work in the folder.
        DivergedError: If a gradient is not finite.
    """
    config = config or {"loop": asdict(settings)}
    if settings.workers and objective.has_streams:
        raise SettingsError(
            f"loop.workers is {settings.workers}, but this task reads streams of data, ahead by "
            "threads (data.ahead); set loop.workers to 0"
        )
    check_trackers(settings.trackers)
    accelerator = processes.accelerator_for(
        objective,
        output_dir,
        microbatches=settings.microbatches,
        precision=settings.precision,
        trackers=settings.trackers,
        optimizer=settings.optimizer,
    )
    with processes.alone_in(accelerator, output_dir):
        return _train(objective, settings, output_dir, config, accelerator)


def _train(
    objective: Objective,
    settings: LoopSettings,
    output_dir: Path,
    config: dict[str, Any],
    accelerator: Accelerator,
) -> bool:
    """The run itself, in a folder that no other run writes into."""
    main, device = accelerator.is_main_process, accelerator.device
    newest = _newest(output_dir, config, settings.accept_changes, objective.free_settings)
    if settings.gradient_checkpointing:
        objective.enable_gradient_checkpointing()
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    optimizers = build_optimizers(objective, settings.optimizer, dtype)
    rates = peak_rates(optimizers)
    shares = processes.shares(accelerator)
    for line in announcement.lines(objective, optimizers, settings.ema_device, shares):
        accelerator.print(line)

    model, optimizers = processes.prepare(accelerator, objective, optimizers)
    ema = EMA(objective, settings.ema_decay, "cpu" if settings.ema_device == "cpu" else None)
    kept = processes.kept_optimizers(accelerator, optimizers)
    start = checkpoints.restore(newest, objective, ema, kept) if newest else 0
    if newest:
        data = checkpoints.read_state(newest).get("data", {})
        objective.load_data_state({int(part): state for part, state in data.items()})
    best = checkpoints.best_figure(output_dir, settings.best)
    accelerator.wait_for_everyone()  # all have read; now the main process may write
    if main:
        checkpoints.clean(output_dir)
        write_json(output_dir / "settings.json", {**config, "versions": versions()})
    logs = Logs(accelerator, output_dir, start, config)
    several = f" in {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    logs.say(f"starting at step {start} of {settings.steps}{several}")
    forward: Any = torch.compile(model) if settings.compile else model

    parameters = [p for p in objective.parameters() if p.requires_grad]
    parts = range(accelerator.process_index, settings.microbatches, accelerator.num_processes)
    numbers = [(step, part) for step in range(start, settings.steps) for part in parts]
    batches = made(lambda number: objective.batch(*number), numbers, settings.workers, device)
    pinned = settings.workers > 0 and device.type == "cuda"
    meter = Meter(device)
    began = time.monotonic()
    stopped = False
    for step in range(start, settings.steps):
        factor = rate_factor(step, settings.steps, settings.optimizer)
        set_rates(optimizers, rates, factor)
        totals: dict[str, Tensor] = {}
        for part in parts:
            batch = {k: v.to(device, non_blocking=pinned) for k, v in next(batches).items()}
            work = objective.work(batch)
            if step == start and part == parts[0]:
                _measure(meter, logs, objective, batch, settings)
            with accelerator.accumulate(model), meter.computing(work):  # syncs in the last part
                losses = forward(**batch)
                accelerator.backward(sum(losses.values()))  # divides by the parts of a process
            for name, loss in losses.items():
                totals[name] = totals[name] + loss.detach() if name in totals else loss.detach()
        norm = processes.clip(accelerator, parameters, settings.optimizer.max_grad_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ema.update(objective)
        meter.step()

        done = step + 1
        last = done == settings.steps
        stopped = not last and _out_of_time(accelerator, settings, began)
        saving = done % settings.save_every == 0 or last or stopped
        if done % settings.log_every == 0:
            figures = _mean_losses(accelerator, totals, settings.microbatches)
            figures |= {"grad_norm": round(float(norm), 4), "rate": round(factor, 4)}
            figures |= meter.figures(processes.summed(accelerator, meter.work))
            logs.write(done, figures)
        looking = step == start or saving or done % settings.log_every == 0  # a GPU waits for it
        if looking and not torch.isfinite(norm):
            change = "set loop.compile to false, or " if settings.compile else ""
            raise DivergedError(
                f"the gradient is not finite at step {done}, which is not saved; {change}lower "
                "loop.optimizer.learning_rate"
            )
        with meter.paused():
            figures = _evaluate(accelerator, objective, ema, settings, done, output_dir)
        if figures:
            logs.write(done, figures)
        if settings.best is not None and checkpoints.better(settings.best, figures, best):
            best, saving = figures[settings.best.removeprefix("-")], True
        if saving:
            checkpoints.save(
                output_dir,
                done,
                objective,
                ema,
                kept,
                main=main,
                keep_last=settings.keep_last,
                best=settings.best,
                data=processes.merged(accelerator, objective.data_state(), parts),
                figures=figures,
                settings=config,
            )
        if stopped:
            break

    if stopped:
        logs.say(
            f"stopped at step {done} of {settings.steps}, as loop.max_minutes is "
            f"{settings.max_minutes:g}; the same command goes on from there"
        )
    else:
        _export(accelerator, objective, ema, output_dir)
        logs.say(f"done: {output_dir / 'final'}")
    batches.close()
    logs.close()
    accelerator.wait_for_everyone()
    return not stopped


def _newest(
    output_dir: Path, config: dict[str, Any], accept_changes: bool, free: tuple[str, ...]
) -> Path | None:
    """The checkpoint to go on from, if there is one."""
    found = checkpoints.checkpoints(output_dir)
    if not found:
        return None
    if not accept_changes:
        before = checkpoints.read_state(found[-1]).get("settings", {})
        changes.refuse(changes.changed(before, config, free), found[-1])
    return found[-1]


def _measure(
    meter: Meter,
    logs: Logs,
    objective: Objective,
    batch: dict[str, Tensor],
    settings: LoopSettings,
) -> None:
    """Counts what a part takes and holds, measures the machine, and says it."""
    arithmetic = count_arithmetic(objective, batch)
    meter.flops_per_part = arithmetic.flops
    holds = {name: amount * settings.microbatches for name, amount in objective.work(batch).items()}
    counts = "".join(f", about {amount:,} {name}" for name, amount in holds.items())
    logs.say(
        f"a step: {settings.microbatches} parts{counts}; "
        f"a part: {arithmetic.flops / 1e9:,.2f} GFLOP forward and backward"
    )
    if arithmetic.matrix is not None:
        if settings.precision == "bf16" and meter.device.type == "cpu":
            slowdown = bfloat16_slowdown(meter.device)
            if slowdown >= 2:  # what the clock tells for sure
                logs.say(
                    f"bfloat16 is {slowdown:.0f} times slower than float32 on this processor: "
                    "--loop.precision no is faster"
                )
        dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        meter.peak = matmul_peak(arithmetic.matrix, dtype, meter.device)
        size = " x ".join(map(str, arithmetic.matrix))
        logs.say(f"peak of linear at {size} in {dtype}: {meter.peak / 1e9:,.1f} GFLOP/s")
    meter.reset()


def _mean_losses(
    accelerator: Accelerator, totals: dict[str, Tensor], microbatches: int
) -> dict[str, float]:
    """Means over all parts of all processes, as in the gradient: a loss that a part lacks is 0."""
    sums = processes.summed(accelerator, {name: total.item() for name, total in totals.items()})
    return {name: round(total / microbatches, 5) for name, total in sums.items()}


def _evaluate(
    accelerator: Accelerator,
    objective: Objective,
    ema: EMA,
    settings: LoopSettings,
    done: int,
    output_dir: Path,
) -> dict[str, float]:
    """Figures of the averages, where a preview or a validation is due.

    All processes work, as weights in shards need; what the main one finds counts for all.
    """
    last = done == settings.steps
    previewing, validating = (
        bool(every) and (done % every == 0 or last)
        for every in (settings.preview_every, settings.validate_every)
    )
    if not previewing and not validating:
        return {}
    figures: dict[str, float] = {}
    with ema.applied(objective), processes.evaluating(objective):
        if previewing:
            with processes.folder_of_main(accelerator, output_dir) as folder:
                figures |= objective.preview(done, folder)
        if validating:
            figures |= objective.validate()
    name = (settings.best or "").removeprefix("-")
    complete = (previewing or not settings.preview_every) and (
        validating or not settings.validate_every
    )
    if name and complete and name not in figures:
        raise SettingsError(
            f"loop.best is {settings.best!r}, but there are only {', '.join(figures) or 'none'}"
        )
    return processes.of_main(accelerator, figures)


def _out_of_time(accelerator: Accelerator, settings: LoopSettings, began: float) -> bool:
    if not settings.max_minutes:
        return False
    return processes.of_main(accelerator, time.monotonic() - began > 60 * settings.max_minutes)


def _export(accelerator: Accelerator, objective: Objective, ema: EMA, output_dir: Path) -> None:
    """Writes the averaged model into `output_dir/final`, in the main process."""
    accelerator.wait_for_everyone()  # the last checkpoint is there
    if not accelerator.is_main_process:
        return
    with atomic_folder(output_dir / "final") as folder:
        if processes.sharded(objective):
            other = objective.fresh()
            checkpoints.load_averages(checkpoints.checkpoints(output_dir)[-1], other)
            other.export(folder)
        else:
            with ema.applied(objective):
                objective.export(folder)
