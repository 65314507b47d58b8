"""Model folders: finding one, and checking that its weights are those that its config asks for.

Nothing here reads a weight: names, shapes and types stand in the headers of the files.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import PreTrainedModel

from janusflow.errors import CheckpointError
from janusflow.models.configuration import JanusFlowConfig
from janusflow.models.layouts import (
    CONFIG_FILE,
    JANUS_TRANSFORMERS,
    Slot,
    identify_layout,
    load_config,
    model_folder,
    slots,
    without_unused,
)
from janusflow.models.weight_files import Part, WeightFiles

BUNDLED = "tiny"
TEXT_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*")


def resolve_model_folder(
    where: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """The local folder of a model, downloaded if need be.

    Args:
        where: A folder, "tiny" for the bundled model (a folder of that name is "./tiny"), or a
            hub id, `owner/name`.
        revision: Branch, tag or commit on the hub.
        cache_dir: Where downloads are kept.
        token: For private models.
        local_files_only: Take what was downloaded before, never ask the hub.
        force_download: Download again.

    Raises:
        CheckpointError: If there is no such folder and no such model on the hub, or the hub
            cannot be reached.
    """
    name = os.fspath(where)
    if name == BUNDLED:
        bundled = Path(str(package_files("janusflow"))) / "assets" / BUNDLED
        if not bundled.is_dir():
            raise CheckpointError(
                f"the bundled model {BUNDLED!r} is missing from this installation ({bundled})"
            )
        return bundled
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{name} is a file; give the folder that holds the model")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise CheckpointError(
            f"no model folder {name}; give a folder, a hub id (owner/name) or {BUNDLED!r}"
        )
    from huggingface_hub import snapshot_download

    options: dict[str, Any] = {
        "revision": revision,
        "cache_dir": cache_dir,
        "token": token,
        "local_files_only": local_files_only,
        "force_download": force_download,
    }
    try:
        found = Path(
            snapshot_download(name, allow_patterns=["*.safetensors", *TEXT_FILES], **options)
        )
        if not any(found.rglob("*.safetensors")):
            snapshot_download(name, allow_patterns=["*.bin", *TEXT_FILES], **options)
    except Exception as error:  # hub, HTTP and file system errors of many kinds
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(
            f"{name} is no local folder, and the hub did not give it: {reason}"
        ) from error
    return found


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose weights were found to be those of its config, none read yet."""

    folder: Path
    layout: str
    config: JanusFlowConfig
    model: PreTrainedModel  # on the meta device, with real buffers
    weights: WeightFiles
    slots: dict[str, Slot]
    unused: list[str]

    @property
    def sources(self) -> dict[str, Part]:
        """Which part of the checkpoint each tensor of the model is."""
        return {
            target: Part(name, index, len(slot.targets))
            for name, slot in self.slots.items()
            for index, target in enumerate(slot.targets)
        }

    @property
    def dtype(self) -> torch.dtype:
        """The type that the config names, or the one that most weights have."""
        if isinstance(self.config.dtype, torch.dtype):
            return self.config.dtype
        sizes: Counter[torch.dtype] = Counter()
        for name in self.slots:
            sizes[self.weights.tensors[name].dtype] += self.weights.tensors[name].numel
        return sizes.most_common(1)[0][0]


def open_checkpoint(
    folder: Path, model_class: type[PreTrainedModel], attention: str | None
) -> Checkpoint:
    """Builds a model without weights and finds them in its folder.

    Args:
        folder: A model's folder, or a saved pipeline's.
        model_class: What to build.
        attention: Implementation of attention; None = the class's choice.

    Raises:
        CheckpointError: If the folder is no JanusFlow model or damaged, or a weight is missing,
            unexpected or of the wrong shape.
    """
    folder = model_folder(folder)
    config = load_config(folder)  # first: it refuses what is no JanusFlow model
    layout = identify_layout(folder)
    weights = WeightFiles(folder)
    if layout == JANUS_TRANSFORMERS and "lm_head.weight" in weights.tensors:
        # Its config says "tied" where it says nothing; the weights that are there win, as there.
        config.text_config.tie_word_embeddings = config.tie_word_embeddings = False
    if attention is not None:
        config._attn_implementation = attention
    with init_empty_weights(include_buffers=False):
        model = model_class(config)
    model.tie_weights()  # becoming empty has untied them
    # Tied weights share a parameter: the second name is a copy.
    names = {name for name, _ in model.named_parameters()}
    tied = set(model.state_dict()) - names
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    expected = slots(shapes, layout)
    read = without_unused(weights.tensors, layout, tied)
    _check(folder, expected, {name: weights.tensors[name].shape for name in read}, weights)
    unused = sorted(set(weights.tensors) - read)
    return Checkpoint(folder, layout, config, model, weights, expected, unused)


def _check(
    folder: Path,
    expected: Mapping[str, Slot],
    found: Mapping[str, tuple[int, ...]],
    weights: WeightFiles,
) -> None:
    """Compares names, shapes and types.

    Raises:
        CheckpointError: Naming the first few weights that are not as expected.
    """
    problems = []
    missing = [name for name in expected if name not in found]
    extra = sorted(name for name in found if name not in expected)
    shared = [name for name in expected if name in found]
    wrong = [
        f"{name} ({list(found[name])}, expected {list(expected[name].shape)})"
        for name in shared
        if found[name] != expected[name].shape
    ]
    whole = [
        f"{name} ({weights.tensors[name].dtype})"
        for name in shared
        if not weights.tensors[name].dtype.is_floating_point
    ]
    for what, names in (
        ("missing", missing),
        ("unexpected", extra),
        ("of the wrong shape", wrong),
        ("no floating-point numbers", whole),
    ):
        if names:
            rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
            problems.append(f"{len(names)} weights {what}: {', '.join(names[:3])}{rest}")
    if problems:
        raise CheckpointError(f"{folder} does not fit its {CONFIG_FILE}: {'; '.join(problems)}")
