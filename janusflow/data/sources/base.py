"""What every source of samples has: a name, a kind, a weight, a length, and samples by index."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from janusflow.data.samples import KINDS, BrokenSample, Sample
from janusflow.errors import SettingsError


@dataclass(frozen=True)
class SourceSettings:
    """Settings that all formats have."""

    kinds: ClassVar[tuple[str, ...]] = KINDS
    """The kinds of samples that this format can hold."""

    format: str = ""
    kind: str = ""
    """What its samples teach: "understanding", "generation" or "text"."""
    weight: float = 1.0
    """How often it is drawn from, beside the other sources of its kind."""

    def __post_init__(self) -> None:
        if self.kind not in self.kinds:
            raise SettingsError(
                f"kind is {self.kind!r}; a source of format {self.format} is for "
                f"{' or '.join(map(repr, self.kinds))}"
            )
        if not 0 < self.weight < float("inf"):
            raise SettingsError(f"weight is {self.weight}; it must be above 0")


@dataclass(frozen=True)
class CaptionSettings(SourceSettings):
    """Settings of formats that hold pictures with captions."""

    question: str = "Describe this picture."
    """What captions answer, where the kind is "understanding"."""


class Source(ABC):
    """Samples by index. Its methods may run in several threads at once."""

    def __init__(self, name: str, settings: SourceSettings) -> None:
        self.name = name
        self.kind = settings.kind
        self.weight = settings.weight

    @abstractmethod
    def __len__(self) -> int:
        """How many samples there are, broken ones included."""

    @abstractmethod
    def label(self, index: int) -> str:
        """Where a sample comes from, as its `name` says; it must do for broken ones, too."""

    @abstractmethod
    def read(self, index: int) -> Sample:
        """The sample; `source[index]` names the broken ones, too.

        Raises:
            BrokenSample: It cannot be learned from.
        """

    def __getitem__(self, index: int) -> Sample:
        """The sample.

        Raises:
            BrokenSample: It cannot be learned from; its `name` is set.
            IndexError: There is no such index.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} samples, no {index}")
        try:
            return self.read(index)
        except BrokenSample as broken:
            broken.name = self.label(index)
            raise
