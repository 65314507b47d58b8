"""Shared by the commands: where results may go, and the pipeline that makes them."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from janusflow.errors import SettingsError
from janusflow.version import versions

if TYPE_CHECKING:
    import torch

    from janusflow.pipeline import JanusFlowPipeline

logger = logging.getLogger(__name__)


def check_writable(target: Path) -> None:
    """Refuses a file that could not be written, before hours are spent on what goes into it.

    Raises:
        SettingsError: If it is a folder, or its folder is missing or cannot be written.
    """
    if target.is_dir():
        raise SettingsError(f"{target} is a folder; give a file name")
    if not target.parent.is_dir():
        raise SettingsError(f"there is no folder {target.parent} to write {target.name} into")
    try:
        with tempfile.TemporaryFile(dir=target.parent):  # mode bits alone say little: root, mounts
            pass
    except OSError as error:
        raise SettingsError(f"the folder {target.parent} cannot be written: {error}") from error


def check_output_folder(folder: Path) -> None:
    """Refuses a folder of results that could not be made or written.

    Raises:
        SettingsError: If it is a file, or it or the folder that it would stand in cannot be
            written.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise SettingsError(f"{there} is a file; -o names a folder")
    check_writable(there / "results")


def pick_device(name: str) -> torch.device:
    """The device of a name; "auto" is the first of CUDA, MPS and the CPU that is there.

    Raises:
        SettingsError: If it is unknown or not there.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(f"no device {name!r} here ({reason}); cpu always works") from error
    if device.type == "meta":
        raise SettingsError("the device meta computes nothing; cpu always works")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a name; "auto" is bfloat16 on a CUDA device that has it, else float32."""
    import torch

    if name == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
        name = "bfloat16" if fast else "float32"
    return getattr(torch, name)


def load_pipeline(arguments: argparse.Namespace, *, pictures: bool = True) -> JanusFlowPipeline:
    """The pipeline that `--model`, `--vae`, `--device` and `--dtype` ask for."""
    from janusflow.pipeline import JanusFlowPipeline

    device = pick_device(arguments.device)
    pipe = JanusFlowPipeline.from_pretrained(
        arguments.model,
        vae=arguments.vae if pictures else None,
        torch_dtype=pick_dtype(arguments.dtype, device),
        device=device,
    )
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty(), leave=False)
    return pipe


_OPTIONS = {  # of each head: the pipeline's argument, or its guidance's, and the command's
    "flow": {
        "num_inference_steps": "steps",
        "solver": "solver",
        "shift": "shift",
        "rtol": "rtol",
        "atol": "atol",
        "method": "guidance_method",
        "interval": "guidance_interval",
        "rescale": "guidance_rescale",
    },
    "vq": {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p"},
}
_DEFAULTS = {
    "num_inference_steps": 30,
    "solver": "euler",
    "shift": 1.0,
    "rtol": None,
    "atol": None,
    "method": "cfg",
    "interval": (0.0, 1.0),
    "rescale": 0.0,
}


def drawing_options(arguments: argparse.Namespace, pipe: JanusFlowPipeline) -> dict[str, Any]:
    """What `--head`, `--guidance` and the head's own options ask of the pipeline.

    Defaults, those of `--preset` first, are written back to the arguments, for `resolved_settings`;
    a warning names options of the other head.

    Raises:
        SettingsError: If the model does not hold the head, or there is no such preset for it.
    """
    from janusflow.flow.guidance import Guidance

    head = arguments.head = pipe.pick_head(arguments.head)
    preset = _preset(arguments.preset, head)
    defaults = {**_DEFAULTS, **pipe.model.config.drawing_defaults_of(head), **preset}
    options: dict[str, Any] = {"head": head}
    for owner, names in _OPTIONS.items():
        for keyword, name in {"guidance_scale": "guidance", **names}.items():
            given = getattr(arguments, name)
            if owner == head:
                options[keyword] = defaults[keyword] if given is None else given
                setattr(arguments, name, options[keyword])
            elif given is not None and name in names.values():
                logger.warning("the %s head makes no use of --%s", head, name.replace("_", "-"))
                setattr(arguments, name, None)
    if head == "flow":
        scale = options.pop("guidance_scale")
        parts = {name: options.pop(name) for name in ("method", "interval", "rescale")}
        options["guidance"] = Guidance(scale, tuple(parts.pop("interval")), **parts)
    return options


def _preset(name: str | None, head: str) -> dict[str, Any]:
    from janusflow.flow.presets import PRESETS

    if name is None:
        return {}
    if name not in PRESETS:
        raise SettingsError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    if head != "flow":
        raise SettingsError(f"the preset {name!r} is of the flow head; draw with --head flow")
    return PRESETS[name]


def resolved_settings(
    arguments: argparse.Namespace, pipe: JanusFlowPipeline, **more: Any
) -> dict[str, Any]:
    """What makes a result again: arguments, device, dtype, the model's hash and versions."""
    from janusflow.models.checkpoints import resolve_model_folder, weights_hash

    skipped = ("module", "takes_overrides", "prompts", "output", "grid", "json", "sheet")
    given = {
        key: value
        for key, value in vars(arguments).items()
        if key not in skipped and value is not None
    }
    return {
        **given,
        "device": str(pipe.device),
        "dtype": str(pipe.model.dtype).removeprefix("torch."),
        **more,
        "weights": weights_hash(resolve_model_folder(arguments.model)),
        "versions": versions(),
    }
