"""Ablations: a base run and others that change it in one respect, and what that does to figures.

A design names the runs by their changes, and hypotheses as one run's figure that should exceed
another's. Runs are `janusflow train`'s own: they go on where they stopped, and refuse a folder that
was made with other settings. Figures are shares of prompts or questions, from the last preview.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from janusflow.errors import JanusFlowError, SettingsError
from janusflow.files import atomic_path, held_alone, write_json
from janusflow.settings import fill, read_yaml
from janusflow.version import versions


@dataclass(frozen=True)
class Hypothesis:
    """A claim: the figure `better` exceeds the figure `than`, both given as "RUN / FIGURE"."""

    claim: str
    better: str
    than: str
    source: str = "ours"


@dataclass(frozen=True)
class AblationSettings:
    """A design."""

    base: str
    """Config of the base run, for `janusflow train`; its previews give the figures."""
    runs: dict[str, dict[str, Any]]
    """By name, the settings that a run has other than the base, with dotted names."""
    hypotheses: list[Hypothesis] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    """Every run is made with each of them."""

    def __post_init__(self) -> None:
        if not self.runs or not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise SettingsError("runs names one run or more, and seeds one or more, all different")
        folders = {_folder_name(name) for name in self.runs}
        if len(folders) < len(self.runs) or any("/" in folder for folder in folders):
            raise SettingsError(
                f"runs are {', '.join(self.runs)}; their names have no '/', and differ by more "
                "than blanks and dashes"
            )
        for hypothesis in self.hypotheses:
            for side in (hypothesis.better, hypothesis.than):
                if _side(side)[0] not in self.runs:
                    raise SettingsError(
                        f"hypothesis {hypothesis.claim!r} has {side!r}; expected RUN / FIGURE with "
                        f"a run among {', '.join(self.runs)}"
                    )


@dataclass(frozen=True)
class Figure:
    """A share with its standard error: of the draw of prompts, and of seeds where there are two.

    That of prompts is Agresti and Coull's (1998), which is not 0 where none or all of them count.
    """

    mean: float
    error: float

    @classmethod
    def of(cls, shares: Sequence[float], num: int) -> Figure:
        """From one share a seed, each of `num` prompts."""
        mean, total = fmean(shares), num * len(shares)
        likely = (mean * total + 2) / (total + 4)
        error = math.sqrt(likely * (1 - likely) / (total + 4))
        if len(shares) > 1:
            error = max(error, stdev(shares) / math.sqrt(len(shares)))
        return cls(mean, error)


def run_ablation(
    config: str | Path, output_dir: str | Path, overrides: Sequence[str] = (), *, jobs: int = 1
) -> str:
    """Trains all runs of a design and draws its tables.

    Args:
        config: YAML of `AblationSettings`.
        output_dir: Where runs live, one folder a run and seed, and `ablation.md`, `figures.csv` and
            `ablation.json` afterwards.
        overrides: Of the base run's settings, such as `loop.steps=200`, for all runs.
        jobs: Runs at a time, which share the processor's cores.

    Returns:
        The tables, in Markdown.

    Raises:
        SettingsError: If the design does not hold together, `jobs` is below 1, or another command
            is at work in the folder.
        JanusFlowError: If a run fails; its log is named.
    """
    if jobs < 1:
        raise SettingsError(f"jobs is at least 1, not {jobs}")
    values = read_yaml(config)
    settings = fill(AblationSettings, values)
    folder = Path(output_dir)
    places = {
        (name, seed): folder / f"{_folder_name(name)}-seed{seed}"
        for name in settings.runs
        for seed in settings.seeds
    }
    with (
        held_alone(folder, "ablation"),
        ThreadPoolExecutor(jobs) as pool,
        tqdm(total=len(places), unit="run") as bar,
    ):
        waiting = {
            key: pool.submit(_train, settings, key, place, folder, overrides, jobs)
            for key, place in places.items()
        }
        try:
            for future in waiting.values():
                future.result()
                bar.update()
        except BaseException:
            for future in waiting.values():
                future.cancel()
            raise
    records = pd.DataFrame(
        [{"run": name, "seed": seed, **_figures(place)} for (name, seed), place in places.items()]
    )
    with atomic_path(folder / "figures.csv") as scratch:
        records.to_csv(scratch, index=False)
    write_json(
        folder / "ablation.json",
        {"design": values, "overrides": list(overrides), "versions": versions()},
    )
    page = "\n\n".join([runs_table(records), hypotheses_table(records, settings.hypotheses)])
    with atomic_path(folder / "ablation.md") as scratch:
        scratch.write_text(page + "\n", encoding="utf-8")
    return page


def runs_table(records: pd.DataFrame) -> str:
    """Mean figures of each run with their standard errors, in Markdown.

    Args:
        records: A row a run and seed: "run", "seed", "num" (prompts of a figure), figures (NaN
            where a run has none).
    """
    names = [name for name in records if name not in ("run", "seed", "num")]
    lines = [f"| run | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for run in pd.unique(records["run"]):
        cells = [_shown(_figure(records, run, name)) for name in names]
        lines.append(f"| {run} | {' | '.join(cells)} |")
    return "\n".join(lines)


def hypotheses_table(records: pd.DataFrame, hypotheses: Sequence[Hypothesis]) -> str:
    """Differences with their standard errors, and what follows at two of them, in Markdown."""
    lines = [
        "| hypothesis | source | better | than | difference | outcome |",
        "|---|---|---|---|---|---|",
    ]
    for hypothesis in hypotheses:
        sides = []
        for side in (hypothesis.better, hypothesis.than):
            run, name = _side(side)
            figure = _figure(records, run, name)
            if figure is None:
                raise SettingsError(f"hypothesis {hypothesis.claim!r}: {run} has no {name}")
            sides.append(figure)
        better, than = sides
        difference = Figure(better.mean - than.mean, math.hypot(better.error, than.error))
        lines.append(
            f"| {hypothesis.claim} | {hypothesis.source} | {better.mean:.3f} | {than.mean:.3f} | "
            f"{difference.mean:+.3f} ± {difference.error:.3f} | {outcome(difference)} |"
        )
    return "\n".join(lines)


def outcome(difference: Figure) -> str:
    """What a difference says about a hypothesis that has it above 0."""
    if abs(difference.mean) <= 2 * difference.error:
        return "undecided"
    return "holds" if difference.mean > 0 else "the contrary"


def _folder_name(run: str) -> str:
    return run.replace(" ", "-")


def _side(text: str) -> tuple[str, str]:
    run, _, figure = text.partition("/")
    return run.strip(), figure.strip()


def _figure(records: pd.DataFrame, run: str, name: str) -> Figure | None:
    rows = records[records["run"] == run]
    if name not in rows or rows[name].isna().any():
        return None
    return Figure.of(rows[name].tolist(), int(rows["num"].iloc[0]))


def _shown(figure: Figure | None) -> str:
    return "" if figure is None else f"{figure.mean:.3f} ± {figure.error:.3f}"


def _train(
    settings: AblationSettings,
    key: tuple[str, int],
    place: Path,
    folder: Path,
    overrides: Sequence[str],
    jobs: int,
) -> None:
    """A run by itself, in a process of its own, with its output in a file."""
    name, seed = key
    changes = [f"{key}={json.dumps(value)}" for key, value in settings.runs[name].items()]
    places = [f"output_dir={place}", f"cache={folder / 'encoded'}", f"loop.seed={seed}"]
    options = [f"--{option}" for option in (*overrides, *changes, *places)]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if jobs > 1 else {})}
    log = folder / f"{place.name}.log"
    with log.open("a", encoding="utf-8") as output:
        done = subprocess.run(
            [sys.executable, "-m", "janusflow.training", settings.base, *options],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            check=False,
        )
    if done.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise JanusFlowError(f"the run {name!r} failed ({' '.join(last)}); see {log}")


def _figures(place: Path) -> dict[str, float]:
    """What the last preview of a finished run found."""
    settings = read_yaml(place / "settings.json")
    lines = (place / "log.jsonl").read_text(encoding="utf-8").splitlines()
    for record in reversed([json.loads(line) for line in lines]):
        found = {name: value for name, value in record.items() if name.startswith("shapes_")}
        if found and record["step"] == settings["loop"]["steps"]:
            return {"num": settings["preview"]["num"], **found}
    raise SettingsError(f"{place} has no preview of its last step; set loop.preview_every")
