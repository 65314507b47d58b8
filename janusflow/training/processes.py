"""The processes of a run: how many there are, how they share parts and weights.

One process, several with whole weights (DDP), with moments in shards (DeepSpeed's ZeRO 1) or with
all in shards (FSDP2), by accelerate's configs. Everything that is done to weights outside forward
and backward goes through `whole` and `laid_out_like`, so that no other module knows of shards.

Without GPUs, processes talk by gloo: `accelerate launch` starts several with `multi_gpu.yaml`, as
`python -m torch.distributed.run --nproc_per_node 2 -m janusflow.training CONFIG` does. Accelerate
has shards on accelerators only.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration, broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from janusflow.errors import SettingsError
from janusflow.files import held_alone
from janusflow.training.objective import Objective
from janusflow.training.optimizers import OptimizerSettings
from janusflow.training.zero_moments import ZeroMoments

_PATIENCE = timedelta(hours=4)
"""How long processes wait for each other: one of them encodes all pictures, or writes."""


def begin() -> PartialState:
    """Joins the other processes, if the command was started in several."""
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=_PATIENCE)


def accelerator_for(
    objective: Objective,
    output_dir: Path,
    *,
    microbatches: int,
    precision: str,
    trackers: list[str],
    optimizer: OptimizerSettings,
) -> Accelerator:
    """The accelerator of a run of `microbatches` parts a step.

    Raises:
        SettingsError: If the processes cannot share the parts evenly, or cannot do what is asked.
    """
    count = begin().num_processes
    if microbatches % count:
        raise SettingsError(
            f"loop.microbatches is {microbatches}, which {count} processes cannot share evenly; "
            f"set it to a multiple of {count}"
        )
    AcceleratorState._reset_state()  # else the precision of this process's last run stays
    accelerator = Accelerator(
        mixed_precision=precision,
        gradient_accumulation_steps=microbatches // count,
        log_with=list(trackers) or None,
        project_config=ProjectConfiguration(str(output_dir), logging_dir=str(output_dir / "logs")),
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=not objective.reaches_all_weights)
        ],
    )
    kind = accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED) and optimizer.name == "muon":
        raise SettingsError(
            "optimizer.name is 'muon', which needs whole matrices, but FSDP and DeepSpeed cut "
            "them up; set it to 'adamw', or take configs/accelerate/multi_gpu.yaml"
        )
    if kind is DistributedType.FSDP and not objective.can_be_sharded:
        raise SettingsError(
            "this task goes through the same layers several times in a step, which FSDP's shards "
            "cannot follow; take configs/accelerate/multi_gpu.yaml"
        )
    if kind is DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise SettingsError(
                "FSDP's first version cannot write whole checkpoints; set fsdp_version: 2 in "
                "accelerate's config, as configs/accelerate/fsdp.yaml has it"
            )
        # Weights are gathered and gradients summed in float32, as without shards. Accelerate's own
        # policy would also round what goes in: times of the path to bfloat16's 8 bits.
        plugin.mixed_precision_policy = MixedPrecisionPolicy()
        plugin.ignored_modules = objective.whole_modules()  # else called without their weights
    if kind is DistributedType.DEEPSPEED:
        plugin = accelerator.state.deepspeed_plugin
        if plugin.zero_stage != 1:
            raise SettingsError(
                f"DeepSpeed's zero_stage is {plugin.zero_stage}; only 1 is known to get the "
                "gradients of one process (2 does not where processes hold samples of different "
                "kinds): set it to 1, as configs/accelerate/deepspeed_zero1.yaml has it, or take "
                "fsdp.yaml beside it"
            )
        plugin.deepspeed_config["gradient_clipping"] = optimizer.max_grad_norm
        # Batches are ours, so DeepSpeed needs no more than a number here.
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
    return accelerator


@contextmanager
def alone_in(accelerator: Accelerator, folder: Path) -> Iterator[None]:
    """Keeps other runs out of a run's folder.

    Raises:
        SettingsError: In all processes, if another run is at work in it.
    """
    problem = None
    with ExitStack() as stack:
        if accelerator.is_main_process:
            try:
                stack.enter_context(held_alone(folder, "run"))
            except SettingsError as error:
                problem = str(error)
        problem = of_main(accelerator, problem)
        if problem is not None:
            raise SettingsError(problem)
        yield


def prepare(
    accelerator: Accelerator, objective: Objective, optimizers: list[torch.optim.Optimizer]
) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    """The objective and its optimizers, on the device and laid out over the processes."""
    for module in objective.whole_modules():
        module.to(accelerator.device)  # FSDP leaves what it does not spread where it is
    model, *prepared = accelerator.prepare(objective, *optimizers)
    shards = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if shards and accelerator.mixed_precision == "bf16":
        # Accelerate does this for whole weights; of shards it would round the weights instead.
        autocast = torch.autocast(accelerator.device.type, torch.bfloat16)
        objective.forward = autocast(objective.forward)  # type: ignore[method-assign]
    return model, prepared


def kept_optimizers(
    accelerator: Accelerator, optimizers: list[Any]
) -> list[torch.optim.Optimizer] | list[ZeroMoments]:
    """The optimizers as checkpoints keep them: with their weights, and moments by weight."""
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        return [ZeroMoments(wrapped.optimizer) for wrapped in optimizers]
    return optimizers


def clip(accelerator: Accelerator, weights: list[nn.Parameter], most: float) -> Tensor:
    """Clips the gradients to an L2 norm, over all weights; returns what it was."""
    return whole(torch.as_tensor(accelerator.clip_grad_norm_(weights, most)))


def shares(accelerator: Accelerator) -> int:
    """Among how many processes all that is kept of a weight is spread."""
    sharding = accelerator.distributed_type is DistributedType.FSDP
    return accelerator.num_processes if sharding else 1


def sharded(module: nn.Module) -> bool:
    """Whether a module's weights are spread over the processes."""
    return any(isinstance(weight, DTensor) for weight in module.parameters())


def whole(tensor: Tensor) -> Tensor:
    """A tensor from its shards; all processes have to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, or the tensor when there are none."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def laid_out_like(tensor: Tensor, weight: Tensor) -> Tensor:
    """A whole tensor in the shards of a weight; a number stays one."""
    if not isinstance(weight, DTensor) or tensor.ndim == 0:
        return tensor
    tensor = tensor.to(weight.to_local().device)
    return distribute_tensor(tensor, weight.device_mesh, weight.placements, src_data_rank=None)


@contextmanager
def evaluating(objective: nn.Module) -> Iterator[None]:
    """The objective in evaluation mode, whichever of its modules is called."""
    if isinstance(objective, FSDPModule):
        objective.unshard()  # the layers gather their own weights, the root does when called itself
    try:
        with torch.no_grad():
            objective.eval()
            yield
    finally:
        objective.train()
        if isinstance(objective, FSDPModule):
            objective.reshard()


@contextmanager
def folder_of_main(accelerator: Accelerator, folder: Path) -> Iterator[Path]:
    """`folder` in the main process; in others, which do the same, one that is thrown away."""
    if accelerator.is_main_process:
        yield folder
    else:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)


def of_main(accelerator: Accelerator, value: Any) -> Any:
    """What the main process has, in all processes."""
    if accelerator.num_processes == 1:
        return value
    return broadcast_object_list([value])[0]


def summed(accelerator: Accelerator, figures: dict[str, float]) -> dict[str, float]:
    """Sums of figures by name over all processes, which need not have the same names."""
    if accelerator.num_processes == 1:
        return figures
    total: dict[str, float] = {}
    for some in gather_object([figures]):
        for name, figure in some.items():
            total[name] = total.get(name, 0) + figure
    return total


def merged(accelerator: Accelerator, states: dict[int, Any], parts: range) -> dict[int, Any]:
    """States of all parts; each process knows those of its own, `parts`, and maybe old others."""
    states = {part: state for part, state in states.items() if part in parts}
    if accelerator.num_processes == 1:
        return states
    return {part: state for some in gather_object([states]) for part, state in some.items()}
