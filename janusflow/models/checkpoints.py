"""Checkpoints: loading model folders of any known layout; the public face of its neighbours.

Loading is strict (every weight in its place, none left over but those that no model reads) and
streams: besides the weights in their final type, only a piece of one tensor is in memory. Names
and sections are the business of `layouts` and `published_config`, files that of `weight_files`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from janusflow.errors import CheckpointError, SettingsError
from janusflow.models.conversion import ModelInfo, convert, describe, weights_hash
from janusflow.models.folders import Checkpoint, open_checkpoint, resolve_model_folder
from janusflow.models.layouts import (
    CONFIG_FILE,
    OURS,
    identify_layout,
    model_folder,
    read_config,
)

__all__ = [
    "ModelInfo",
    "convert",
    "describe",
    "identify_layout",
    "load_model",
    "model_folder",
    "resolve_model_folder",
    "training_record",
    "weights_hash",
]

_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")

logger = logging.getLogger(__name__)


def training_record(source: str) -> dict[str, Any] | None:
    """What the joint run that made a model wrote about it, None where there is no record."""
    file = model_folder(resolve_model_folder(source)) / "training.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def load_model(
    cls: type[Any],
    where: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    max_memory: dict[int | str, int | str] | None = None,
    attn_implementation: str | None = None,
    low_cpu_mem_usage: bool = True,
    use_safetensors: bool | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    **kwargs: Any,
) -> Any:
    """Loads a model in evaluation mode from a folder or hub id in any known layout, strictly.

    Args:
        cls: The model's class.
        where: See `resolve_model_folder`.
        dtype: Type of the weights. None or "auto": the one named in the config, or else the one
            that the weights are stored in.
        torch_dtype: The older name of `dtype`.
        device_map: A device, "auto" and its kin, or a map from modules to devices, as in
            transformers; None = CPU.
        max_memory: By device, for `device_map="auto"`.
        attn_implementation: "sdpa", "eager", ….
        low_cpu_mem_usage: Taken for compatibility; loading always streams.
        use_safetensors: True refuses `.bin` files.
        revision: See `resolve_model_folder`.
        cache_dir: See `resolve_model_folder`.
        token: See `resolve_model_folder`.
        local_files_only: See `resolve_model_folder`.
        force_download: See `resolve_model_folder`.
        **kwargs: Whatever else `transformers.PreTrainedModel.from_pretrained` takes, such as
            `quantization_config`; for checkpoints in our own layout only.

    Raises:
        CheckpointError: If the folder is no JanusFlow model or damaged, or a weight is missing,
            unexpected or of the wrong shape.
        SettingsError: If the type or an option cannot be had.
        TypeError: If an option is unknown.
    """
    folder = resolve_model_folder(
        where,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
        force_download=force_download,
    )
    folder = model_folder(folder)
    wanted = _as_dtype(dtype if dtype is not None else torch_dtype)
    layout = identify_layout(folder)
    quantized = "quantization_config" in read_config(folder / CONFIG_FILE)
    if layout == OURS and (kwargs or quantized):
        options = {
            "device_map": device_map,
            "max_memory": max_memory,
            "attn_implementation": attn_implementation,
            "use_safetensors": use_safetensors,
        }
        given = {key: value for key, value in options.items() if value is not None}
        return _load_with_transformers(
            cls, folder, dtype="auto" if wanted is None else wanted, **given, **kwargs
        )
    if "quantization_config" in kwargs:
        raise SettingsError(
            "quantization_config needs our own layout; run `janusflow convert` first and load that"
        )
    if kwargs:
        raise TypeError(f"from_pretrained() got unexpected options: {', '.join(sorted(kwargs))}")
    checkpoint = open_checkpoint(folder, cls, attn_implementation)
    if use_safetensors and checkpoint.weights.files[0].suffix == ".bin":
        raise CheckpointError(f"{folder} has .bin files only, and use_safetensors was asked for")
    wanted = wanted or checkpoint.dtype
    model = checkpoint.model
    devices = _devices(model, device_map, max_memory, wanted)
    _fill(checkpoint, wanted, devices)
    _set_generation_config(checkpoint)
    checkpoint.config.dtype = wanted
    for part in (model.language_model, model.vision_model):
        part.config.dtype = wanted
    checkpoint.config._name_or_path = model.name_or_path = os.fspath(where)
    logger.info(
        "%s: %s layout, %.1f M parameters as %s, heads: %s; not used: %s",
        where,
        checkpoint.layout,
        sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        str(wanted).removeprefix("torch."),
        ", ".join(checkpoint.config.generation_heads) or "none",
        ", ".join(checkpoint.unused) or "none",
    )
    model.eval()
    if len(set(devices.values())) > 1:
        from accelerate import dispatch_model

        return dispatch_model(model, devices)
    return model


def _as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise SettingsError(
            f"dtype is {dtype!r}; expected float32, bfloat16, float16, float64 or auto"
        )
    return found


def _devices(
    model: nn.Module, device_map: Any, max_memory: Any, dtype: torch.dtype
) -> dict[str, Any]:
    """Devices by the modules that they hold; "" stands for the whole model."""
    if device_map is None:
        return {"": torch.device("cpu")}
    if isinstance(device_map, str) and device_map in _SPREAD:
        from accelerate import infer_auto_device_map
        from accelerate.utils import get_balanced_memory

        parts: dict[str, Any] = {"no_split_module_classes": model._no_split_modules, "dtype": dtype}
        if device_map != "sequential":
            low = device_map == "balanced_low_0"
            max_memory = get_balanced_memory(model, max_memory, low_zero=low, **parts)
        device_map = infer_auto_device_map(model, max_memory=max_memory, **parts)
    if not isinstance(device_map, Mapping):
        device_map = {"": device_map}
    if "disk" in device_map.values():
        raise SettingsError("the model does not fit into memory, and weights are not kept on disk")
    try:
        return {name: torch.device(device) for name, device in device_map.items()}
    except (RuntimeError, TypeError) as error:
        raise SettingsError(f"device_map names no device: {device_map}") from error


def _device_of(name: str, devices: Mapping[str, Any]) -> Any:
    holders = [key for key in devices if key == "" or name == key or name.startswith(f"{key}.")]
    if not holders:
        raise SettingsError(f"device_map has no device for {name}")
    return devices[max(holders, key=len)]


def _fill(checkpoint: Checkpoint, dtype: torch.dtype, devices: Mapping[str, Any]) -> None:
    """Gives the model its weights, one tensor at a time."""
    model, sources = checkpoint.model, checkpoint.sources
    for name, parameter in list(model.named_parameters()):
        target = torch.empty(parameter.shape, dtype=dtype, device=_device_of(name, devices))
        checkpoint.weights.copy(sources[name], target)
        _place(model, name, nn.Parameter(target, requires_grad=parameter.requires_grad))
    for name, buffer in list(model.named_buffers()):
        _place(model, name, buffer.to(_device_of(name, devices)))
    model.tie_weights()


def _place(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, tensor)


def _set_generation_config(checkpoint: Checkpoint) -> None:
    """So that `generate` stops: ids by name in the layouts of others, as saved in ours."""
    config, model = checkpoint.config, checkpoint.model
    text: Any = config.text_config
    saved = (checkpoint.folder / "generation_config.json").is_file()
    if saved:
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    if not saved or checkpoint.layout != OURS:
        model.generation_config.bos_token_id = text.bos_token_id
        model.generation_config.eos_token_id = text.eos_token_id
        model.generation_config.pad_token_id = config.pad_token_id
        model.generation_config._from_model_config = False


def _load_with_transformers(cls: type[Any], folder: Path, **options: Any) -> Any:
    """Loads our own layout by the library's loader, which knows quantization, as strictly."""
    wants_info = options.pop("output_loading_info", False)
    try:
        model, info = PreTrainedModel.from_pretrained.__func__(
            cls, folder, output_loading_info=True, **options
        )
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder} cannot be loaded: {reason}") from error
    found = {key: sorted(map(str, value)) for key, value in info.items() if value}
    if found:
        text = "; ".join(f"{key}: {', '.join(value[:3])}" for key, value in found.items())
        raise CheckpointError(f"{folder} does not fit its {CONFIG_FILE}: {text}")
    return (model, info) if wants_info else model
