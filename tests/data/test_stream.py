"""The stream: its order, its parts, its state, its mixture, and what becomes of broken samples."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from data.made import write_files, write_folder, write_lines

from janusflow import SettingsError
from janusflow.data import stream as stream_module
from janusflow.data.mixture import DataSettings, Mixture, open_sources
from janusflow.data.permutation import Permutation
from janusflow.data.samples import BrokenSample, Sample
from janusflow.data.sources import Source, SourceSettings
from janusflow.data.stream import SampleStream
from janusflow.data.transforms import short_side_crop
from janusflow.settings import fill


class Numbers(Source):
    """Samples named by their index, some of them broken."""

    def __init__(
        self,
        name: str,
        num: int,
        kind: str = "text",
        weight: float = 1.0,
        broken: frozenset[int] | range = frozenset(),
    ) -> None:
        super().__init__(name, SourceSettings("numbers", kind, weight))
        self.num = num
        self.broken = broken
        self.reads: list[int] = []
        self.threads: set[int] = set()

    def __len__(self) -> int:
        return self.num

    def label(self, index: int) -> str:
        return f"{self.name}:{index}"

    def read(self, index: int) -> Sample:
        self.reads.append(index)
        self.threads.add(threading.get_ident())
        if index in self.broken:
            raise BrokenSample("out of order", f"number {index}")
        return Sample(self.kind, self.label(index))


def names(stream: SampleStream, num: int, step: int = 0) -> list[str]:
    return [stream.next(step).name for _ in range(num)]


def mixed(**options: object) -> SampleStream:
    """Three sources, one with broken samples."""
    sources = [
        Numbers("a", 7, "generation", 2.0),
        Numbers("b", 30, "generation", broken=frozenset(range(0, 30, 4))),
        Numbers("c", 11, "text"),
    ]
    ratios = {0: {"generation": 2, "text": 1}, 40: {"generation": 1, "text": 4}}
    return SampleStream(sources, ratios, **{"seed": 5, **options})


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


# --- the order of an epoch ---------------------------------------------------------------------


@pytest.mark.parametrize("n", [*range(1, 40), 255, 256, 257, 1000, 4097])
def test_a_permutation_holds_every_number_once(n: int) -> None:
    order = Permutation(n, (1, 2, n))
    assert sorted(order[i] for i in range(n)) == list(range(n))


def test_a_permutation_of_a_hundred_million_needs_no_list() -> None:
    order = Permutation(100_000_000, (3,))
    numbers = [order[i] for i in range(0, 100_000_000, 5003)]
    assert len(set(numbers)) == len(numbers)
    assert 0 <= min(numbers) < 20_000
    assert 99_980_000 < max(numbers) < 100_000_000
    assert abs(np.mean(numbers) / 5e7 - 1) < 0.02
    assert abs(np.corrcoef(np.arange(len(numbers)), numbers)[0, 1]) < 0.03
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03


def test_every_number_is_as_likely_at_every_position() -> None:
    for n in (2, 3, 5, 17):
        counts = np.zeros((n, n))
        for seed in range(2000):
            order = Permutation(n, (seed,))
            for position in range(n):
                counts[position, order[position]] += 1
        expected = 2000 / n
        # Five standard deviations of a count.
        assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all(), counts


def test_a_position_beyond_the_end_is_an_index_error() -> None:
    with pytest.raises(IndexError, match="position 3 of 3"):
        Permutation(3, (0,))[3]


# --- order and parts ---------------------------------------------------------------------------


def test_the_order_is_a_function_of_the_seed() -> None:
    first = names(mixed(), 200)
    assert names(mixed(), 200) == first
    assert names(mixed(seed=6), 200) != first
    assert names(mixed(part=1, parts=2), 200) != names(mixed(part=0, parts=2), 200)


@pytest.mark.parametrize(("num", "parts"), [(24, 1), (24, 4), (23, 4), (3, 5)])
def test_the_parts_together_take_each_sample_of_each_epoch_once(num: int, parts: int) -> None:
    source = Numbers("a", num)
    streams = [SampleStream([source], {}, 1, part, parts) for part in range(parts)]
    epochs = 4
    rounds = -(-epochs * num // parts)
    taken = [names(stream, rounds) for stream in streams]
    in_order = [taken[g % parts][g // parts] for g in range(epochs * num)]
    orders = [tuple(in_order[e * num : (e + 1) * num]) for e in range(epochs)]
    assert all(len(set(order)) == num for order in orders)
    assert len(set(orders)) > 1, "each epoch has an order of its own"


def test_a_source_keeps_its_order_when_another_comes_beside_it() -> None:
    alone = SampleStream([Numbers("b", 50)], {}, 0)
    both = SampleStream([Numbers("a", 9), Numbers("b", 50)], {}, 0)
    beside = [name for name in names(both, 200) if name.startswith("b")]
    assert names(alone, 60) == beside[:60]


def test_random_numbers_of_a_sample_depend_on_its_place_and_change_with_the_epoch() -> None:
    def drawn(stream: SampleStream, num: int) -> dict[tuple[str, int], float]:
        seen: Counter[str] = Counter()
        found = {}
        for _ in range(num):
            sample = stream.next(0)
            seen[sample.name] += 1
            found[sample.name, seen[sample.name]] = sample.rng().random()
            assert sample.rng().random() == found[sample.name, seen[sample.name]]
        return found

    first = drawn(mixed(), 150)
    assert drawn(mixed(), 150) == first
    assert len(set(first.values())) == 150
    assert not set(drawn(mixed(seed=6), 150).values()) & set(first.values())


# --- the mixture -------------------------------------------------------------------------------


def test_the_mixture_changes_at_its_step_and_keeps_its_ratios() -> None:
    sources = [
        Numbers("u", 100, "understanding"),
        Numbers("g1", 100, "generation", 3.0),
        Numbers("g2", 100, "generation"),
        Numbers("t", 100, "text"),
    ]
    ratios = {
        0: {"understanding": 30, "generation": 50, "text": 20},
        10_000: {"understanding": 14, "generation": 80, "text": 6},
    }
    stream = SampleStream(sources, ratios, 0)

    def observed(step: int) -> list[float]:
        counts = Counter(name.partition(":")[0] for name in names(stream, 5000, step))
        return [counts[source.name] / 5000 for source in sources]

    # Four standard deviations of a share of 5000 draws are at most 0.0283.
    assert observed(9_999) == pytest.approx([0.3, 0.375, 0.125, 0.2], abs=0.0283)
    assert observed(10_000) == pytest.approx([0.14, 0.6, 0.2, 0.06], abs=0.0283)
    assert observed(0) == pytest.approx([0.3, 0.375, 0.125, 0.2], abs=0.0283)


def test_the_source_changes_with_the_step_and_nothing_else() -> None:
    mixture = Mixture(
        [Numbers("g", 1, "generation"), Numbers("t", 1)],
        {0: {"generation": 1}, 5: {"text": 1}},
    )
    assert [mixture.source(step, 0.0) for step in (0, 4, 5, 6)] == [0, 0, 1, 1]
    assert mixture.source(0, 1 - 2**-53) == 0


def test_by_default_every_kind_comes_as_often() -> None:
    sources = [Numbers("g", 9, "generation"), Numbers("t1", 9), Numbers("t2", 9)]
    counts = Counter(name[0] for name in names(SampleStream(sources, {}, 0), 2000))
    assert counts["g"] / 2000 == pytest.approx(0.5, abs=0.045)


@pytest.mark.parametrize(
    ("ratios", "match"),
    [
        ({0: {"understanding": 1}}, "asks for understanding and no source"),
        ({0: {"text": 1}, 9: {"generation": 2}}, "asks for generation and no source"),
        ({5: {"text": 1}}, "begins at step 5"),
        ({0: {"text": -1}}, "text: -1"),
        ({0: {"text": float("nan")}}, "text: nan"),
        ({0: {"text": 1}, 9: {"text": 0}}, "from step 9 on is 0 for every kind"),
        ({0: {"txet": 1}}, "did you mean 'text'"),
        ({0: {"pictures": 1}}, "known: understanding, generation, text"),
    ],
)
def test_a_mixture_that_cannot_be_is_a_mistake(ratios: dict, match: str) -> None:
    with pytest.raises(SettingsError, match=match):
        SampleStream([Numbers("t", 3)], ratios, 0)


def test_a_source_that_the_mixture_never_draws_from_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    SampleStream([Numbers("t", 3), Numbers("g", 3, "generation")], {0: {"text": 1}}, 0)
    assert "nothing of g is used: the mixture has no generation" in caplog.text


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"part": 2, "parts": 2}, "part is 2 of 2"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_stream_that_cannot_be_is_a_mistake(options: dict, match: str) -> None:
    with pytest.raises(SettingsError, match=match):
        mixed(**options)


def test_two_sources_of_one_name_are_a_mistake() -> None:
    with pytest.raises(SettingsError, match="names of their own, got t, t"):
        SampleStream([Numbers("t", 3), Numbers("t", 4)], {}, 0)


# --- resume ------------------------------------------------------------------------------------


def walk(stream: SampleStream, first: int, num: int) -> list[str]:
    """Two samples a step, so that the mixture changes on the way."""
    return [stream.next(k // 2).name for k in range(first, first + num)]


@pytest.mark.parametrize("threads", [0, 2])
def test_a_stream_goes_on_with_the_very_next_sample(threads: int, pool: ThreadPoolExecutor) -> None:
    executor = pool if threads else None
    whole = walk(mixed(part=1, parts=3), 0, 200)
    for stop in np.random.default_rng(0).integers(0, 160, 25).tolist():
        stream = mixed(part=1, parts=3, executor=executor)
        walk(stream, 0, stop)
        state = json.loads(json.dumps(stream.state_dict()))
        resumed = mixed(part=1, parts=3, executor=executor)
        walk(resumed, 0, 3)  # wherever it was
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        assert walk(resumed, stop, 40) == whole[stop : stop + 40]
        stream.load_state_dict(state)
        assert walk(stream, stop, 40) == whole[stop : stop + 40]


def test_the_state_is_small_whatever_was_read() -> None:
    stream = SampleStream([Numbers("a", 100_000_000)], {}, 0)
    names(stream, 500)
    assert len(json.dumps(stream.state_dict())) < 200


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (SampleStream([Numbers("a", 9)], {}, 1), "seed 0 and the state is of one with 1"),
        (SampleStream([Numbers("a", 9)], {}, 0, 0, 2), "parts 1 .* with 2"),
        (SampleStream([Numbers("b", 9)], {}, 0), r"are a \(9\) and the state is of b \(9\)"),
        (SampleStream([Numbers("a", 8)], {}, 0), r"are a \(9\) and the state is of a \(8\)"),
    ],
)
def test_the_state_of_another_stream_is_refused(other: SampleStream, match: str) -> None:
    with pytest.raises(SettingsError, match=match):
        SampleStream([Numbers("a", 9)], {}, 0).load_state_dict(other.state_dict())


# --- broken samples ----------------------------------------------------------------------------


def test_a_broken_sample_is_replaced_by_the_next_of_its_source_and_counted(tmp_path: Path) -> None:
    broken = frozenset([2, 5])
    log = tmp_path / "skipped.jsonl"
    stream = SampleStream([Numbers("a", 10, broken=broken)], {}, 0, skip_log=log)
    whole = names(SampleStream([Numbers("a", 10)], {}, 0), 30)
    good = [name for name in whole if name not in ("a:2", "a:5")]
    assert names(stream, 24) == good
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert stream.skipped == {"a": {"out of order": len(lines)}}
    skipped = [(line["epoch"], line["name"]) for line in lines]
    assert len(set(skipped)) == len(skipped) >= 4
    assert {name for _, name in skipped} == {"a:2", "a:5"}
    assert lines[0]["source"] == "a"
    assert lines[0]["reason"] == "out of order"
    assert lines[0]["detail"].startswith("number ")


def test_going_on_from_a_checkpoint_names_no_broken_sample_twice(tmp_path: Path) -> None:
    log = tmp_path / "skipped.jsonl"
    whole = mixed(skip_log=log)
    walk(whole, 0, 120)
    complete = log.read_text()
    log.unlink()
    parts = [mixed(skip_log=log, part=part, parts=2) for part in range(2)]
    for stream in parts:
        walk(stream, 0, 60)
    state = parts[1].state_dict()
    walk(parts[1], 60, 40)
    with log.open("a") as file:
        file.write('{"source": "b", "na\n')  # killed while it wrote
    resumed = mixed(skip_log=log, part=1, parts=2)
    resumed.load_state_dict(state)
    before = log.read_text()
    walk(resumed, 60, 40)
    assert log.read_text() == before
    walk(resumed, 100, 60)
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
    places = [(line["source"], line["number"]) for line in lines]
    assert len(set(places)) == len(places)
    assert resumed.skipped["b"]["out of order"] == sum(number % 2 for _, number in places)
    assert complete


def test_the_first_broken_samples_are_warned_of_one_by_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stream = SampleStream([Numbers("a", 40, broken=range(1, 40))], {}, 0)
    names(stream, 3)
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 5
    assert warned[0].startswith("skipped a:")
    assert "of source a: out of order: number" in warned[0]
    assert warned[4].endswith("further ones of this source are only counted")
    assert "further" not in "".join(warned[:4])


@pytest.mark.parametrize("parts", [1, 4])
def test_a_source_without_a_good_sample_is_an_error_that_names_one(parts: int) -> None:
    stream = SampleStream([Numbers("a", 6, broken=range(6))], {}, 0, 0, parts)
    with pytest.raises(
        SettingsError, match=r"'a' has no good sample among 6 of its 6; .* a:\d: out"
    ):
        stream.next(0)


def test_one_good_sample_is_enough_however_many_parts_there_are() -> None:
    source = Numbers("a", 5, broken=range(4))
    for part in range(7):
        assert names(SampleStream([source], {}, 0, part, 7), 3) == ["a:4"] * 3


def test_a_large_source_is_given_up_after_many_broken_samples_in_a_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream_module, "MOST_BROKEN", 50)
    stream = SampleStream([Numbers("a", 10**8, broken=range(10**8))], {}, 0)
    with pytest.raises(SettingsError, match="among 50 of its 100000000"):
        stream.next(0)


def test_what_prepares_a_sample_may_find_it_broken(tmp_path: Path) -> None:
    log = tmp_path / "skipped.jsonl"

    def prepare(sample: Sample) -> str:
        if sample.name.endswith("3"):
            raise BrokenSample("too long", "4097 tokens")
        return sample.name.upper()

    stream = SampleStream([Numbers("a", 10)], {}, 0, prepare=prepare, skip_log=log)
    taken = {stream.next(0) for _ in range(9)}
    assert taken == {f"A:{n}" for n in range(10) if n != 3}
    assert stream.skipped in ({}, {"a": {"too long": 1}})
    for _ in range(9):
        stream.next(0)
    assert stream.skipped["a"]["too long"] >= 1
    assert {json.loads(line)["name"] for line in log.open()} == {"a:3"}


# --- reading ahead -----------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [1, 3, 16])
def test_reading_ahead_changes_neither_samples_nor_states(
    ahead: int, pool: ThreadPoolExecutor
) -> None:
    plain, ahead_of_it = mixed(), mixed(executor=pool, ahead=ahead)
    for k in range(200):
        assert plain.next(k // 2).name == ahead_of_it.next(k // 2).name
        assert plain.state_dict() == ahead_of_it.state_dict()
        assert plain.skipped == ahead_of_it.skipped


def test_reading_ahead_reads_in_the_threads_and_as_far_as_it_was_told() -> None:
    sources = [Numbers("g", 50, "generation"), Numbers("t", 50)]
    ratios = {0: {"generation": 1}, 10: {"text": 1}}
    with ThreadPoolExecutor(2) as executor:
        stream = SampleStream(sources, ratios, 0, executor=executor, ahead=6)
        names(stream, 20, step=0)
        names(stream, 20, step=10)
    here = threading.get_ident()
    assert all(source.threads and here not in source.threads for source in sources)
    # The sample that is asked for is one of the six.
    assert len(sources[1].reads) == len(set(sources[1].reads)) == 25
    assert 20 <= len(sources[0].reads) <= 25


def test_an_error_in_a_thread_reaches_the_caller(pool: ThreadPoolExecutor) -> None:
    def prepare(sample: Sample) -> Sample:
        raise RuntimeError("no disk")

    stream = SampleStream([Numbers("a", 9)], {}, 0, prepare=prepare, executor=pool)
    with pytest.raises(RuntimeError, match="no disk"):
        stream.next(0)


# --- everything together -----------------------------------------------------------------------


def settings(tmp_path: Path) -> DataSettings:
    folder = write_folder(tmp_path / "photos", 6)
    write_files(folder, {"0002.png": b"nonsense", "0004.txt": ""})
    rows = [
        {"conversations": [{"from": "human", "value": str(n)}, {"from": "gpt", "value": "!"}]}
        for n in range(4)
    ]
    values = {
        "sources": {
            "photos": {"format": "folder", "kind": "generation", "path": str(folder)},
            "shapes": {"format": "shapes", "kind": "understanding", "num_pictures": 20},
            "talk": {
                "format": "conversations",
                "kind": "text",
                "path": str(write_lines(tmp_path / "talk.jsonl", rows)),
            },
        },
        "mixture": {0: {"understanding": 1, "generation": 2, "text": 1}},
    }
    return fill(DataSettings, values, ["sources.shapes.num_pictures=9"])


def test_settings_become_sources_and_their_crops_are_the_same_after_a_resume(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    data = settings(tmp_path)
    sources = open_sources(data)
    assert [len(source) for source in sources] == [6, 9, 4]

    def crop(sample: Sample) -> tuple[str, bytes]:
        if sample.image is None:
            return sample.name, b""
        return sample.name, short_side_crop(sample.image, 8, sample.rng()).numpy().tobytes()

    def stream() -> SampleStream[tuple[str, bytes]]:
        return SampleStream(
            sources,
            data.mixture,
            0,
            prepare=crop,
            executor=pool,
            skip_log=tmp_path / "skipped.jsonl",
        )

    first = stream()
    for _ in range(17):
        first.next(0)
    state = first.state_dict()
    rest = [first.next(0) for _ in range(30)]
    resumed = stream()
    resumed.load_state_dict(state)
    assert [resumed.next(0) for _ in range(30)] == rest
    assert first.skipped.keys() == {"photos"}
    assert first.skipped["photos"].keys() == {"unreadable picture", "no caption"}
    named = {json.loads(line)["name"] for line in (tmp_path / "skipped.jsonl").open()}
    assert named == {"photos/0002.png", "photos/0004.png"}


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"sources": {"x": {"format": "folder", "kind": "generation", "pth": "."}}}, "'x'.*'path'"),
        ({"mixture": {0: {"generatoin": 1}}}, "did you mean 'generation'"),
        ({"threads": -1}, "data.threads is -1"),
        ({"ahead": -1}, "data.ahead is -1"),
    ],
)
def test_a_mistake_in_the_settings_is_found_when_they_are_read(values: dict, match: str) -> None:
    with pytest.raises(SettingsError, match=match):
        fill(DataSettings, values)


def test_settings_without_a_source_say_how_to_add_one() -> None:
    with pytest.raises(
        SettingsError, match=r"no source of samples; add one, such as data\.sources"
    ):
        open_sources(DataSettings())
