"""Training checkpoints: one folder a step, safetensors and JSON, written atomically.

A checkpoint holds weights, averages, the optimizers' moments, where the data is, the step, the
settings and the figures of a preview, all whole: a run may go on with another number of processes
or another layout of weights. All other randomness is a function of (seed, step, part). A folder
takes its name when it is complete and loses it before it is removed, so whatever carries the name
can be read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from janusflow.errors import CheckpointError
from janusflow.files import atomic_folder, write_json
from janusflow.training.ema import EMA
from janusflow.training.processes import laid_out_like, whole
from janusflow.training.zero_moments import ZeroMoments

Optimizers = Sequence[torch.optim.Optimizer | ZeroMoments]


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    ema: EMA,
    optimizers: Optimizers,
    *,
    main: bool = True,
    keep_last: int = 2,
    best: str | None = None,
    **state: Any,
) -> Path:
    """Writes `folder/step-{step}`; then removes all but the newest and the best.

    All processes have to call it, and the main one writes.

    Args:
        folder: The run's.
        step: Steps done.
        model: Its weights and buffers are kept.
        ema: Its averages are kept.
        optimizers: Their moments are kept.
        main: Whether this process writes.
        keep_last: How many of the newest checkpoints stay.
        best: Name of the figure whose highest value makes a checkpoint stay as well; its lowest
            with "-" in front. Figures are in `state["figures"]`.
        state: What else to keep, as JSON.
    """
    target = folder / f"step-{step:07d}"
    if target.exists():
        return target
    with atomic_folder(target) if main else nullcontext() as scratch:

        def write(name: str, tensors: Mapping[str, Tensor]) -> None:
            kept = {}
            for key, tensor in tensors.items():
                gathered = whole(tensor.detach())
                if scratch is not None:
                    kept[key] = gathered.cpu().contiguous()
            if scratch is not None:
                save_file(kept, scratch / f"{name}.safetensors")

        write("model", model.state_dict())
        with ema.applied(model):
            weights = dict(model.named_parameters())
            write("ema", {name: weights[name] for name in ema.averages})
        for index, optimizer in enumerate(optimizers):
            write(f"optimizer-{index}", _moments(model, optimizer))
        if scratch is not None:
            content = {"step": step, "ema_updates": ema.num_updates, **state}
            write_json(scratch / "state.json", content)
    if main:
        kept = {*checkpoints(folder)[-keep_last:], *_best_first(folder, best)[:1]}
        for old in set(checkpoints(folder)) - kept:
            gone = old.rename(old.with_name(f".{old.name}-removed"))
            shutil.rmtree(gone)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in a run's folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / "state.json").exists())


def clean(folder: Path) -> None:
    """Removes what a run that was killed was about to write or to remove."""
    for pattern in (".step-*", ".final-*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path)


def read_state(path: Path) -> dict[str, Any]:
    """What a checkpoint holds besides tensors."""
    return json.loads((path / "state.json").read_text(encoding="utf-8"))


def best_figure(folder: Path, best: str | None) -> float | None:
    """The best value of a figure that a checkpoint was kept with."""
    found = _best_first(folder, best)
    return _figure(found[0], best) if found else None


def better(best: str, figures: Mapping[str, float], before: float | None) -> bool:
    """Whether `figures` are better than the value `before`, in the figure that `best` names."""
    name, sign = best.removeprefix("-"), -1 if best.startswith("-") else 1
    return name in figures and (before is None or sign * figures[name] > sign * before)


def restore(path: Path, model: nn.Module, ema: EMA, optimizers: Optimizers) -> int:
    """Loads a checkpoint in place, strictly, and returns its step.

    Raises:
        CheckpointError: If it holds no moments.
    """
    if not (path / "optimizer-0.safetensors").exists():
        raise CheckpointError(
            f"{path} holds weights but no moments, so the run cannot go on from it; take another "
            "--output-dir"
        )
    present = model.state_dict()
    weights = load_file(path / "model.safetensors")
    model.load_state_dict(
        {name: laid_out_like(w, present.get(name, w)) for name, w in weights.items()}
    )
    state = read_state(path)
    ema.load(model, load_file(path / "ema.safetensors"), state["ema_updates"])
    for index, optimizer in enumerate(optimizers):
        tensors = load_file(path / f"optimizer-{index}.safetensors")
        _restore_moments(model, optimizer, tensors)
    return state["step"]


def load_averages(path: Path, model: nn.Module) -> None:
    """Gives a model of whole weights the averages of a checkpoint, and its other weights."""
    weights = load_file(path / "model.safetensors")
    model.load_state_dict({**weights, **load_file(path / "ema.safetensors")})


def _best_first(folder: Path, best: str | None) -> list[Path]:
    if best is None:
        return []
    found = [path for path in checkpoints(folder) if _figure(path, best) is not None]
    sign = 1 if best.startswith("-") else -1
    return sorted(found, key=lambda path: sign * _figure(path, best))  # the oldest among equals


def _figure(path: Path, best: str | None) -> Any:
    return read_state(path).get("figures", {}).get(str(best).removeprefix("-"))


def _names(model: nn.Module, optimizer: torch.optim.Optimizer | ZeroMoments) -> list[str]:
    """Names of an optimizer's weights, in its order."""
    names = {weight: name for name, weight in model.named_parameters()}
    return [names[weight] for group in optimizer.param_groups for weight in group["params"]]


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer | ZeroMoments) -> dict[str, Tensor]:
    names = _names(model, optimizer)
    return {
        f"{names[index]}.{moment}": torch.as_tensor(value)
        for index, moments in optimizer.state_dict()["state"].items()
        for moment, value in moments.items()
    }


def _restore_moments(
    model: nn.Module, optimizer: torch.optim.Optimizer | ZeroMoments, tensors: dict[str, Tensor]
) -> None:
    names = _names(model, optimizer)
    weights = dict(model.named_parameters())
    # The first checkpoints had the weights' numbers for their names.
    numbers = {str(number): number for number in range(len(names))}
    numbers |= {name: number for number, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, moment = key.rsplit(".", 1)
        weight = weights[names[numbers[name]]]
        state.setdefault(numbers[name], {})[moment] = laid_out_like(tensor, weight)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
