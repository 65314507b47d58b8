"""An endless stream of samples from a mixture of sources, which goes on exactly where it was left.

A stream is a part p of P, and all parts together go through every source's epochs: the k-th sample
that part p takes from a source of n samples is number g = k P + p of the source, which is number
g mod n of the epoch g div n, each epoch in an order of its own. So the state is one count for each
source, and which source comes next depends on (seed, part, count) and the step alone.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from janusflow.data.mixture import Mixture, Ratios
from janusflow.data.permutation import Permutation
from janusflow.data.samples import BrokenSample, Sample
from janusflow.data.sources import Source
from janusflow.errors import SettingsError

logger = logging.getLogger(__name__)

T = TypeVar("T")

MOST_BROKEN = 10_000
"""So many broken samples in a row end a run, where a source has that many: it is no use."""
_WARNINGS = 5  # of each source, one by one; further ones are counted
_CHOICE, _ORDER, _SAMPLE = 0, 1, 2  # what random numbers are for

_permutation = lru_cache(maxsize=256)(Permutation)


def _as_it_is(sample: Sample) -> Any:
    return sample


class SampleStream(Generic[T]):
    """Samples for one part of a batch."""

    def __init__(
        self,
        sources: Sequence[Source],
        ratios: Ratios,
        seed: int,
        part: int = 0,
        parts: int = 1,
        *,
        prepare: Callable[[Sample], T] = _as_it_is,
        executor: Executor | None = None,
        ahead: int = 16,
        skip_log: str | Path | None = None,
    ) -> None:
        """Starts at the first sample.

        Args:
            sources: What to draw from; several streams may share them.
            ratios: See `DataSettings.mixture`.
            seed: Of everything that is drawn at random, 0 or more.
            part: Which of the streams this is.
            parts: How many there are.
            prepare: What to make of a sample, such as a crop of its picture; it may raise
                `BrokenSample`. It runs in the threads, where there are any.
            executor: Threads that read, decode and prepare ahead; several streams may share them.
            ahead: How many samples they may be ahead.
            skip_log: A JSONL file that names each broken sample; lines are added at its end.

        Raises:
            SettingsError: The sources do not fit the ratios, or two have one name.
        """
        if not 0 <= part < parts:
            raise SettingsError(f"part is {part} of {parts}; expected 0 to {parts - 1}")
        if seed < 0:
            raise SettingsError(f"seed is {seed}; expected 0 or more")
        names = [source.name for source in sources]
        if len(set(names)) < len(names):
            raise SettingsError(f"sources need names of their own, got {', '.join(names)}")
        self._sources = list(sources)
        self._mixture = Mixture(sources, ratios)
        self._seed, self._part, self._parts = seed, part, parts
        self._prepare = prepare
        self._executor, self._ahead = executor, ahead
        self._skip_log = None if skip_log is None else Path(skip_log)
        self._logged = [-1] * len(names)
        if self._skip_log is not None and self._skip_log.is_file():
            self._logged = self._last_logged(self._skip_log)
        # Not by place: a source keeps its order when another is added before it.
        self._streams = [zlib.crc32(name.encode()) for name in names]
        self._count = 0
        self._taken = [0] * len(names)
        self._skipped: list[Counter[str]] = [Counter() for _ in names]
        self._reading: dict[tuple[int, int], Future[T]] = {}
        self._phase = 0
        self._forget_plan()

    @property
    def skipped(self) -> dict[str, dict[str, int]]:
        """How many broken samples were met, by source and reason."""
        pairs = zip(self._sources, self._skipped, strict=True)
        return {source.name: dict(counts) for source, counts in pairs if counts}

    def next(self, step: int) -> T:
        """The next sample, as `prepare` makes it, from the mixture of `step`.

        Raises:
            SettingsError: A source has nothing but broken samples.
        """
        self._read_ahead(step)
        place = self._choose(step, self._count)
        self._count += 1
        source, broken = self._sources[place], set()
        while True:
            taken = self._taken[place]
            self._taken[place] += 1
            reading = self._reading.pop((place, taken), None)
            try:
                return self._read(place, taken) if reading is None else reading.result()
            except BrokenSample as error:
                self._skip(place, taken, error)
                broken.add(self._index(place, taken))
                if len(broken) >= min(len(source), MOST_BROKEN):
                    raise SettingsError(
                        f"source {source.name!r} has no good sample among {len(broken)} of its "
                        f"{len(source)}; the last one, {error.name}: {error}"
                    ) from error

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, as small JSON: after the last sample that `next` returned."""
        return {
            "seed": self._seed,
            "part": self._part,
            "parts": self._parts,
            "count": self._count,
            "sources": {
                source.name: {"samples": len(source), "taken": taken, "skipped": dict(skipped)}
                for source, taken, skipped in zip(
                    self._sources, self._taken, self._skipped, strict=True
                )
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on after the last sample of the stream that the state is of.

        Raises:
            SettingsError: The state is of another seed, part, or set of sources.
        """
        mine = self.state_dict()
        for key in ("seed", "part", "parts"):
            if state.get(key) != mine[key]:
                raise SettingsError(
                    f"this stream has {key} {mine[key]} and the state is of one with "
                    f"{state.get(key)}; go on with the settings that the run began with"
                )
        sizes, kept = (
            {name: source["samples"] for name, source in one["sources"].items()}
            for one in (mine, state)
        )
        if sizes != kept:
            raise SettingsError(
                f"the sources (with their samples) are {_listed(sizes)} and the state is of "
                f"{_listed(kept)}; go on with the sources that the run began with, or begin a new "
                "run"
            )
        self._count = state["count"]
        for place, source in enumerate(self._sources):
            self._taken[place] = state["sources"][source.name]["taken"]
            self._skipped[place] = Counter(state["sources"][source.name]["skipped"])
        self._forget_plan()

    def _choose(self, step: int, count: int) -> int:
        rng = np.random.default_rng([self._seed, _CHOICE, self._part, count])
        return self._mixture.source(step, rng.random())

    def _number(self, taken: int) -> int:
        """The number g of a sample among all that the parts take from its source."""
        return taken * self._parts + self._part

    def _index(self, place: int, taken: int) -> int:
        samples = len(self._sources[place])
        epoch, position = divmod(self._number(taken), samples)
        entropy = (self._seed, _ORDER, self._streams[place], epoch)
        return _permutation(samples, entropy)[position]

    def _read(self, place: int, taken: int) -> T:
        sample = self._sources[place][self._index(place, taken)]
        entropy = (self._seed, _SAMPLE, self._streams[place], self._number(taken))
        try:
            return self._prepare(replace(sample, entropy=entropy))
        except BrokenSample as broken:
            broken.name = sample.name
            raise

    # Reading ahead only keeps results under (source, taken). What comes next is decided by `next`
    # alone, so a wrong guess, where the mixture changes or a sample is broken, costs time at most.

    def _forget_plan(self) -> None:
        for reading in self._reading.values():
            reading.cancel()
        self._reading.clear()
        self._planned_count = self._count
        self._planned = list(self._taken)

    def _read_ahead(self, step: int) -> None:
        if self._executor is None:
            return
        if self._phase != self._mixture.phase(step):
            self._phase = self._mixture.phase(step)
            self._forget_plan()
        self._planned_count = max(self._planned_count, self._count)
        while len(self._reading) < self._ahead:
            place = self._choose(step, self._planned_count)
            taken = max(self._planned[place], self._taken[place])
            self._reading[place, taken] = self._executor.submit(self._read, place, taken)
            self._planned[place] = taken + 1
            self._planned_count += 1

    def _skip(self, place: int, taken: int, broken: BrokenSample) -> None:
        source, number = self._sources[place], self._number(taken)
        self._skipped[place][broken.reason] += 1
        total = self._skipped[place].total()
        if total <= _WARNINGS:
            more = "; further ones of this source are only counted" if total == _WARNINGS else ""
            logger.warning("skipped %s of source %s: %s%s", broken.name, source.name, broken, more)
        if self._skip_log is None or number <= self._logged[place]:
            return
        line = {
            "source": source.name,
            "name": broken.name,
            "reason": broken.reason,
            "detail": broken.detail,
            "epoch": number // len(source),
            "number": number,
        }
        with self._skip_log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._logged[place] = number

    def _last_logged(self, path: Path) -> list[int]:
        """The last number that this part has logged of each source.

        A run that goes on from a checkpoint meets broken samples again that it has logged already.
        """
        places = {source.name: place for place, source in enumerate(self._sources)}
        last = [-1] * len(places)
        with path.open(encoding="utf-8") as file:
            for text in file:
                try:
                    line = json.loads(text)
                except ValueError:  # cut off when the run was killed
                    continue
                place = places.get(line["source"])
                if place is not None and line["number"] % self._parts == self._part:
                    last[place] = max(last[place], line["number"])
        return last


def _listed(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({samples})" for name, samples in sizes.items()) or "none"
