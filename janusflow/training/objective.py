"""What a run trains: the interface between the loop and everything that can be trained.

An `Objective` holds the modules, makes their batches and turns these into named losses. It knows
nothing of steps, processes or checkpoints; all hooks but `batch` and `forward` have defaults.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from janusflow.errors import SettingsError


class Objective(nn.Module):
    """What is trained: modules, their batches and their losses."""

    free_settings: tuple[str, ...] = ()
    """Settings of its own, or whole sections, that do not change what is learned: a run may go on
    with others."""
    reaches_all_weights = True
    """False if the losses of a part may leave trainable weights without a gradient. Several
    processes then look for these weights in every part. Sharded weights need True."""
    can_be_sharded = True
    """False if a part goes through the same layers several times, which weights in shards (FSDP)
    cannot follow."""

    @abstractmethod
    def batch(self, step: int, part: int = 0) -> dict[str, Tensor]:
        """One part of the batch of a step, on the CPU.

        An objective without state gives the same for the same step and part. One that reads data
        holds a stream for each part that it is asked for, and gives that stream's next samples.
        """

    @property
    def has_streams(self) -> bool:
        """Whether batches come from streams; if not, they are functions of their step and part."""
        return type(self).data_state is not Objective.data_state

    @abstractmethod
    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """Named losses (scalars); their sum is minimised."""

    def data_state(self) -> dict[int, Any]:
        """Where the stream of each part is after its last batch, as JSON; {} without streams."""
        return {}

    def load_data_state(self, states: dict[int, Any]) -> None:
        """Takes the streams to where `data_state` said, given for all parts of all processes."""

    def whole_modules(self) -> list[nn.Module]:
        """Frozen ones that are called outside `forward`, as by `batch`: no process shares them."""
        return []

    def work(self, batch: dict[str, Tensor]) -> dict[str, int]:
        """What a part holds, such as `{"tokens": 4096, "images": 7}`, for figures a second."""
        return {}

    def sources(self) -> dict[str, str]:
        """What was loaded from where, to be printed at the start."""
        return {}

    def enable_gradient_checkpointing(self) -> None:
        """Trades time for memory: states inside the layers are computed again going backward.

        Raises:
            SettingsError: If the objective cannot.
        """
        raise SettingsError(
            f"{type(self).__name__} has no gradient checkpointing; "
            "set loop.gradient_checkpointing to false"
        )

    def preview(self, step: int, folder: Path) -> dict[str, float]:
        """Writes what training looks like into `folder`; returns figures for the log."""
        return {}

    def validate(self) -> dict[str, float]:
        """Figures on held-out data for the log, such as losses by bucket of t."""
        return {}

    def export(self, folder: Path) -> None:
        """Writes the finished model into `folder`, which exists and is empty."""

    def fresh(self) -> Objective:
        """Another one, untrained, which takes the weights that were trained in shards to export."""
        return type(self)(self.settings)


class Stream(Protocol):
    """What a part's batches are made from, one after another."""

    def next(self, step: int) -> Any:
        """The next item, for a batch of `step`."""

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is after the last item of a batch, as JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""


class StreamObjective(Objective):
    """One that reads data: each part has a stream, opened when it is first read from."""

    def __init__(self) -> None:
        super().__init__()
        self._streams: dict[int, Any] = {}
        self._kept: dict[int, Any] = {}

    @abstractmethod
    def open_stream(self, part: int) -> Stream:
        """The stream of a part, at its start."""

    def stream(self, part: int) -> Any:
        """The stream of a part, where it is."""
        if part not in self._streams:
            self._streams[part] = self.open_stream(part)
            if part in self._kept:
                self._streams[part].load_state_dict(self._kept.pop(part))
        return self._streams[part]

    def data_state(self) -> dict[int, Any]:
        """Of every stream that this process has read from."""
        return {part: stream.state_dict() for part, stream in self._streams.items()}

    def load_data_state(self, states: dict[int, Any]) -> None:
        """See `Objective`."""
        self._streams.clear()
        self._kept = dict(states)
