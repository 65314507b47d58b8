"""Converting model folders between layouts, and describing them, without loading them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from janusflow.errors import CheckpointError, SettingsError
from janusflow.files import atomic_folder, write_json
from janusflow.models.folders import TEXT_FILES, Checkpoint, open_checkpoint, resolve_model_folder
from janusflow.models.janus_config import config_to_janus, config_to_transformers
from janusflow.models.layouts import (
    CONFIG_FILE,
    JANUS_PUBLISHED,
    JANUS_TRANSFORMERS,
    OURS,
    PUBLISHED,
    model_folder,
    slots,
    token_ids,
)
from janusflow.models.published_config import config_to_published
from janusflow.models.transformers_files import write_transformers_files
from janusflow.models.weight_files import (
    SHARD_BYTES,
    UNUSED_FILE,
    Part,
    PlannedTensor,
    WeightFiles,
    write_safetensors,
    write_weights,
)

LAYOUTS = (OURS, "published", "transformers")


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    to: str = OURS,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes a model in another layout, with the very same numbers.

    Tokenizer, processor and other text files are copied, and so is a `vae` folder. Tensors of the
    published layouts that no model reads are kept as `unused.safetensors` in the others, so that
    there and back again gives the same tensors: names, types, shapes and bytes.

    Args:
        src: See `resolve_model_folder`.
        dst: A folder that is not there yet, or empty.
        to: "janusflow" for our layout, "published" for that of JanusFlow or Janus by the head that
            the model holds, or "transformers" for transformers' Janus.
        shard_bytes: Largest size of a weights file.

    Returns:
        The folder that was written.

    Raises:
        CheckpointError: If the source is no JanusFlow model or damaged, is in that layout already,
            cannot be expressed in it, or the destination exists or cannot be written.
        SettingsError: If the layout is unknown.
    """
    if to not in LAYOUTS:
        raise SettingsError(f"layout is {to!r}; expected one of {', '.join(LAYOUTS)}")
    target = Path(dst).expanduser()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"{target} exists already; give a folder that does not")
    source = resolve_model_folder(src)
    checkpoint = open_checkpoint(source, _model_class(), None)
    layout = _layout(to, checkpoint.config.generation_heads)
    if checkpoint.layout == layout:
        raise CheckpointError(f"{source} is in the layout {to!r} already")
    try:
        with atomic_folder(target) as folder:
            _copy_texts(source, folder)
            if layout == OURS:
                _write_ours_config(checkpoint, folder)
            else:
                write_json(folder / CONFIG_FILE, _foreign_config(checkpoint, layout, folder))
            if layout == JANUS_TRANSFORMERS:
                write_transformers_files(folder, checkpoint.config)
            _write_tensors(checkpoint, layout, folder, shard_bytes)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror or error}") from error
    return target


def _model_class() -> type[PreTrainedModel]:
    from janusflow.models.modeling import JanusFlowForConditionalGeneration

    return JanusFlowForConditionalGeneration


def _layout(to: str, heads: tuple[str, ...]) -> str:
    if to == "published":
        return JANUS_PUBLISHED if heads == ("vq",) else PUBLISHED
    return JANUS_TRANSFORMERS if to == "transformers" else OURS


def _write_ours_config(checkpoint: Checkpoint, folder: Path) -> None:
    checkpoint.config.architectures = [_model_class().__name__]
    checkpoint.config.save_pretrained(folder)


def _foreign_config(checkpoint: Checkpoint, layout: str, folder: Path) -> dict[str, Any]:
    if layout == JANUS_TRANSFORMERS:
        return config_to_transformers(checkpoint.config)
    write = config_to_janus if layout == JANUS_PUBLISHED else config_to_published
    return write(checkpoint.config, token_ids(folder))


def _write_tensors(checkpoint: Checkpoint, layout: str, folder: Path, shard_bytes: int) -> None:
    """All tensors in the slots of a layout, each made of the parts of others."""
    stored, sources = checkpoint.weights.tensors, checkpoint.sources
    shapes = {name: tuple(p.shape) for name, p in checkpoint.model.named_parameters()}
    plan = {}
    for name, slot in slots(shapes, layout).items():
        parts = tuple(sources[target] for target in slot.targets)
        dtypes = {stored[part.name].dtype for part in parts}
        if len(dtypes) > 1:
            raise CheckpointError(f"{', '.join(slot.targets)} must be of one type to become {name}")
        plan[name] = PlannedTensor(slot.shape, dtypes.pop(), parts)
    files = list(checkpoint.weights.files)
    kept = checkpoint.folder / UNUSED_FILE
    weights = WeightFiles(checkpoint.folder, [*files, kept] if kept.is_file() else files)
    unused = _unchanged(
        weights,
        [
            *checkpoint.unused,
            *(name for name, stored in weights.tensors.items() if stored.file == kept),
        ],
    )
    if layout in (PUBLISHED, JANUS_PUBLISHED):
        plan |= unused
    elif unused:
        write_safetensors(folder / UNUSED_FILE, unused, weights)
    write_weights(folder, plan, weights, shard_bytes=shard_bytes)


def _unchanged(weights: WeightFiles, names: Iterable[str]) -> dict[str, PlannedTensor]:
    return {
        name: PlannedTensor(weights.tensors[name].shape, weights.tensors[name].dtype, (Part(name),))
        for name in names
    }


def _copy_texts(source: Path, target: Path) -> None:
    """Copies what stands beside the weights, from a flat folder or a saved pipeline's."""
    for folder in (source, model_folder(source), source / "processor", source / "tokenizer"):
        for pattern in TEXT_FILES:
            for file in sorted(folder.glob(pattern)):
                skipped = (CONFIG_FILE, "model_index.json")
                if file.name not in skipped and not file.name.endswith(".index.json"):
                    shutil.copyfile(file, target / file.name)
    if (source / "vae").is_dir():
        shutil.copytree(source / "vae", target / "vae")


@dataclass(frozen=True)
class ModelInfo:
    """What `janusflow info` prints.

    Attributes:
        folder: The local folder.
        layout: See `identify_layout`.
        heads: Names of the generation heads.
        dtype: Type of the weights as loaded by default.
        parameters: Numbers of parameters by part; "vae" when the folder has one.
        unused: Names of stored tensors that no model reads.
        num_bytes: Bytes of all weights on disk.
        memory: Bytes of all parameters in memory, by type.
        weights_hash: See `weights_hash`.
    """

    folder: Path
    layout: str
    heads: tuple[str, ...]
    dtype: str
    parameters: dict[str, int]
    unused: tuple[str, ...]
    num_bytes: int
    memory: dict[str, int]
    weights_hash: str

    @property
    def total_parameters(self) -> int:
        """Parameters of all parts."""
        return sum(self.parameters.values())


_PARTS = {
    "language_model": "language model",
    "vision_model": "vision",
    "aligner": "aligner",
    "begin_embedding": "aligner",
    "flow_head": "flow head",
    "vq_head": "VQ head",
}


def describe(where: str | os.PathLike[str], **hub: Any) -> ModelInfo:
    """Describes a model without loading it.

    Args:
        where: See `resolve_model_folder`.
        **hub: See `resolve_model_folder`.

    Raises:
        CheckpointError: If the folder is no JanusFlow model, or damaged.
    """
    folder = resolve_model_folder(where, **hub)
    checkpoint = open_checkpoint(folder, _model_class(), None)
    parameters: dict[str, int] = {}
    for name, parameter in checkpoint.model.named_parameters():
        part = _PARTS[name.split(".")[0]]
        parameters[part] = parameters.get(part, 0) + parameter.numel()
    num_bytes = sum(stored.nbytes for stored in checkpoint.weights.tensors.values())
    if (folder / "vae").is_dir():
        vae = WeightFiles(folder / "vae").tensors.values()
        parameters["vae"] = sum(stored.numel for stored in vae)
        num_bytes += sum(stored.nbytes for stored in vae)
    total = sum(parameters.values())
    return ModelInfo(
        folder=folder,
        layout=checkpoint.layout,
        heads=checkpoint.config.generation_heads,
        dtype=str(checkpoint.dtype).removeprefix("torch."),
        parameters=parameters,
        unused=tuple(checkpoint.unused),
        num_bytes=num_bytes,
        memory={"float32": 4 * total, "bfloat16": 2 * total},
        weights_hash=checkpoint.weights.sha256(),
    )


def weights_hash(folder: str | os.PathLike[str]) -> str:
    """SHA-256 of a folder's weights: names, types, shapes and bytes of all tensors by name.

    It does not depend on how files divide the tensors.

    Raises:
        CheckpointError: If the folder holds no weights, or damaged ones.
    """
    return WeightFiles(model_folder(os.fspath(folder))).sha256()
