"""Pairs of a noise and the latents that a model's own path leads it to, made by `task: pairs`.

They are what reflow learns from (arXiv 2209.03003). A file `part-00000.safetensors` holds latents
and the seeds of their noises, `part-00000.json` beside it the prompts. Axes: n pairs of a file, C
latent channels, h w latent cells.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from janusflow.data.samples import Sample
from janusflow.data.sources.base import Source, SourceSettings
from janusflow.errors import SettingsError
from janusflow.files import atomic_path, write_json
from janusflow.flow.noise import image_noise


@dataclass(frozen=True)
class PairsSettings(SourceSettings):
    """A folder of pairs."""

    kinds: ClassVar[tuple[str, ...]] = ("generation",)

    path: str = ""
    """The folder `final` of a run of `task: pairs`."""


def write_pairs(path: Path, x_1: Tensor, seeds: list[int], prompts: list[str]) -> None:
    """Writes a file of pairs, the latents (n, C, h, w) last: what is there is whole."""
    write_json(path.with_suffix(".json"), prompts)
    with atomic_path(path) as scratch:
        save_file({"x_1": x_1.half().contiguous(), "seeds": torch.tensor(seeds)}, scratch)


class PairsSource(Source):
    """Pairs by their place in the files."""

    def __init__(self, name: str, settings: PairsSettings) -> None:
        """Finds the files.

        Raises:
            SettingsError: There is none, or they hold no pair.
        """
        super().__init__(name, settings)
        self._files = sorted(Path(settings.path).glob("part-*.safetensors"))
        if not settings.path or not self._files:
            raise SettingsError(
                f"path is {settings.path!r}; expected a folder of pairs (part-00000.safetensors)"
            )
        self._prompts = lru_cache(maxsize=8)(self._read_prompts)
        self._ends = list(accumulate(len(self._read_prompts(file)) for file in self._files))
        if not len(self):
            raise SettingsError(
                f"no pair is in the files of {settings.path}: none that was made was kept; make "
                "more by task pairs (num_pairs)"
            )

    @staticmethod
    def _read_prompts(file: Path) -> list[str]:
        return json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))

    def __len__(self) -> int:
        return self._ends[-1]

    def _place(self, index: int) -> tuple[Path, int]:
        number = bisect_right(self._ends, index)
        return self._files[number], index - (self._ends[number - 1] if number else 0)

    def label(self, index: int) -> str:
        """The file and the row."""
        file, row = self._place(index)
        return f"{file.name}:{row}"

    def read(self, index: int) -> Sample:
        """See `Source`."""
        file, row = self._place(index)
        with safe_open(file, "pt") as held:
            x_1 = held.get_slice("x_1")[row : row + 1].float()
            seed = int(held.get_slice("seeds")[row : row + 1])
        x_0, _ = image_noise(1, tuple(x_1.shape[1:]), seed=seed)
        return Sample(
            "generation", self.label(index), prompt=self._prompts(file)[row], ends=(x_0, x_1)
        )
