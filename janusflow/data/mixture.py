"""What is trained on: sources by name, and how often each kind of sample comes, step by step."""

from __future__ import annotations

import difflib
import logging
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from janusflow.data.samples import KINDS
from janusflow.data.sources import Source, open_source, source_settings
from janusflow.errors import SettingsError

logger = logging.getLogger(__name__)

Ratios = Mapping[int, Mapping[str, float]]


@dataclass(frozen=True)
class DataSettings:
    """Sources and their mixture."""

    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name: `format` (see `janusflow.data.sources.FORMATS`), `kind`, `weight`, and what the
    format needs."""
    mixture: dict[int, dict[str, float]] = field(default_factory=dict)
    """From a step on, how often each kind comes: `{0: {understanding: 30, generation: 50, text:
    20}, 10000: {…}}`. By default every kind that has a source comes as often as the others."""
    threads: int = 2
    """Threads that read and decode ahead; 0 = none."""
    ahead: int = 16
    """How many samples of a stream they read ahead."""

    def __post_init__(self) -> None:
        for name, values in self.sources.items():
            source_settings(name, values)
        check_ratios(self.mixture)
        for name in ("threads", "ahead"):
            if getattr(self, name) < 0:
                raise SettingsError(f"data.{name} is {getattr(self, name)}; expected 0 or more")


def open_sources(settings: DataSettings) -> list[Source]:
    """Opens all sources.

    Raises:
        SettingsError: There are none, or one cannot be opened.
    """
    if not settings.sources:
        raise SettingsError(
            "there is no source of samples; add one, such as "
            "data.sources: {photos: {format: folder, kind: generation, path: …}}"
        )
    return [
        open_source(name, source_settings(name, values))
        for name, values in settings.sources.items()
    ]


def check_ratios(ratios: Ratios) -> None:
    """Checks the ratios of a mixture by themselves.

    Raises:
        SettingsError: They do not begin at step 0, name an unknown kind, are negative or all 0.
    """
    if ratios and min(ratios) != 0:
        raise SettingsError(
            f"the mixture begins at step {min(ratios)}; say what comes from step 0 on"
        )
    for step, shares in ratios.items():
        where = f"the mixture from step {step} on"
        for kind, share in shares.items():
            if kind not in KINDS:
                near = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(KINDS)}"
                raise SettingsError(f"{where} has the unknown kind {kind!r}; {hint}")
            if not 0 <= share < math.inf:
                raise SettingsError(f"{where} has {kind}: {share}; expected 0 or more")
        if not sum(shares.values()):
            raise SettingsError(f"{where} is 0 for every kind; make one larger")


class Mixture:
    """How likely each source is at a step: by the ratio of its kind, and its weight within it."""

    def __init__(self, sources: Sequence[Source], ratios: Ratios) -> None:
        """Checks that sources and ratios fit.

        Raises:
            SettingsError: A kind has a ratio and no source, or the ratios are wrong.
        """
        check_ratios(ratios)
        weights: dict[str, float] = {}
        for source in sources:
            weights[source.kind] = weights.get(source.kind, 0.0) + source.weight
        ratios = ratios or {0: dict.fromkeys(weights, 1.0)}
        asked = {kind for shares in ratios.values() for kind, share in shares.items() if share}
        for kind in sorted(asked - weights.keys()):
            raise SettingsError(
                f"the mixture asks for {kind} and no source is of that kind; add one, or set its "
                "ratio to 0"
            )
        for source in sources:
            if source.kind not in asked:
                logger.warning(
                    "nothing of %s is used: the mixture has no %s", source.name, source.kind
                )
        self._from_step = sorted(ratios)
        self._cumulative = []
        for step in self._from_step:
            shares = ratios[step]
            chances = [
                shares.get(source.kind, 0.0) * source.weight / weights[source.kind]
                for source in sources
            ]
            cumulative = np.cumsum(chances)
            self._cumulative.append(cumulative / cumulative[-1])

    def phase(self, step: int) -> int:
        """Which of the ratios, in the order of their steps, are those of a step."""
        return bisect_right(self._from_step, step) - 1

    def source(self, step: int, number: float) -> int:
        """The place of the source that a random number in [0, 1) falls on."""
        return int(np.searchsorted(self._cumulative[self.phase(step)], number, side="right"))
