"""The toy model, and folders of its weights in the published layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models.toy import (
    PUBLISHED_CONFIG,
    published_tensors,
    tiny_config,
    tiny_model_of,
    write_config,
)
from safetensors.torch import save_file
from torch import Tensor

from janusflow import JanusFlowForConditionalGeneration

WriteFolder = Callable[..., Path]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_model() -> JanusFlowForConditionalGeneration:
    """Not to be changed; `fresh_model` may be."""
    return tiny_model_of(tiny_config())


@pytest.fixture
def fresh_model() -> JanusFlowForConditionalGeneration:
    return tiny_model_of(tiny_config())


@pytest.fixture
def write_published(tmp_path: Path, tiny_model: JanusFlowForConditionalGeneration) -> WriteFolder:
    """Return a function that writes the tiny model as a published folder.

    `changes` maps names of tensors to replacements; None removes one.
    """

    def write(
        name: str = "published",
        changes: dict[str, Tensor | None] | None = None,
        dtype: torch.dtype = torch.float32,
        weights: bool = True,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        write_config(folder, PUBLISHED_CONFIG)
        if weights:
            tensors: dict[str, Any] = {**published_tensors(tiny_model), **(changes or {})}
            kept = {k: v.to(dtype) for k, v in tensors.items() if v is not None}
            save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return write
