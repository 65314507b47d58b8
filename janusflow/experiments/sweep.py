"""A sweep: pictures of the same prompts and noise by many ways of drawing, measured.

Work is done in pieces: a cell (or a reference) and a chunk of the prompts. A piece's pictures are
written first, under the hash of their content, then its file of results, each as a whole; a run
that was killed does the pieces that have no such file. Several processes started by accelerate
share the pieces. Axes: B pictures of a piece.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cache, partial
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from PIL import Image
from tqdm.auto import tqdm

from janusflow.data.shapes.language import Request
from janusflow.errors import SettingsError
from janusflow.evaluation.features import module_hash
from janusflow.experiments.prompts import SHAPES, load_prompts
from janusflow.experiments.sweep_design import Cell, cells, drawing_defaults
from janusflow.experiments.sweep_metrics import Drawn, Metric, find_metrics
from janusflow.experiments.sweep_plan import Piece, pieces_of_cells, plan
from janusflow.experiments.sweep_sets import (
    Features,
    SetMetric,
    TruePictures,
    find_set_metrics,
    true_pictures,
)
from janusflow.experiments.sweep_settings import SweepSettings
from janusflow.experiments.units import Arrays, Units
from janusflow.files import atomic_path, held_alone
from janusflow.models.autoencoder import SDXL_VAE, load_autoencoder
from janusflow.models.conversion import weights_hash
from janusflow.models.folders import resolve_model_folder
from janusflow.pipeline import JanusFlowOutput, JanusFlowPipeline
from janusflow.version import versions

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, Any]


@dataclass
class Seconds:
    """Where the time of this run went, in the main process.

    Attributes:
        loading: Models.
        model: Encoding prompts and drawing.
        wall: All, from the first piece to the report.
    """

    loading: float = 0.0
    model: float = 0.0
    wall: float = 0.0


@dataclass(frozen=True)
class SweepResult:
    """What came out.

    Attributes:
        table: One row a picture and cell.
        cells: One row a cell.
        summary: One row a way of drawing, the seeds taken together.
        report: The page.
        seconds: Of this run.
    """

    table: pd.DataFrame
    cells: pd.DataFrame
    summary: pd.DataFrame
    report: Path
    seconds: Seconds


def sweep(settings: SweepSettings, folder: Path, *, progress: bool = False) -> SweepResult | None:
    """Draws, measures, and writes tables, figures and a report, going on where a run stopped.

    Args:
        settings: What is swept.
        folder: Of the results: `tables/`, `figures/`, `images/`, `report.html`, `config.yaml`,
            `settings.json` (with versions and the weights' hashes), `units/` (the pieces).
        progress: Show how much is done and the time left.

    Returns:
        The results in the main process, None in the others that accelerate started.

    Raises:
        SettingsError: If a setting cannot be had, a library of the extra `eval` is not installed,
            the folder holds results of other settings, or another run is at work in it.
        CheckpointError: If a model cannot be loaded.
    """
    _check_libraries()
    found = cells(settings)
    prompts, requests = load_prompts(settings.prompts)
    metrics = find_metrics(
        settings.metrics,
        of_shapes=settings.prompts.source == SHAPES,
        sources=settings.metrics_from,
    )
    sets = find_set_metrics(settings, len(prompts) * settings.images_per_prompt)
    true = true_pictures(settings, requests) if sets else None
    depends = _resolved(settings, prompts, [*metrics, *sets], true)
    # A process that has little left to do may wait for long.
    state = PartialState(cpu=settings.device == "cpu", timeout=timedelta(days=30))
    with _one_run(folder, settings, depends, state) as units:
        features = Features(units, sets, true)
        run = _Run(settings, folder, units, prompts, requests, metrics, features, state)
        began = time.perf_counter()
        pieces = plan(
            found,
            settings,
            len(prompts),
            with_references=any(metric.needs_reference for metric in metrics),
            shared=state.num_processes > 1,
        )
        run.draw(pieces, progress=progress)
        if not state.is_main_process:
            return None
        from janusflow.experiments.sweep_report import write_report
        from janusflow.experiments.sweep_table import (
            CELL,
            WAY,
            picture_table,
            summarize,
            write_tables,
        )

        table = picture_table(found, pieces, units, prompts, requests, settings.images_per_prompt)
        names = [metric.name for metric in metrics]
        of_sets = partial(features.values, pieces_of_cells(pieces))
        by_cell, summary = (summarize(table, names, keys, of_sets) for keys in (CELL, WAY))
        write_tables(folder / "tables", {"pictures": table, "cells": by_cell, "settings": summary})
        heads = [cell.head for cell in found]
        measures = [*metrics, *(m for metric in sets for m in metric.measures(heads))]
        report = write_report(folder, settings, table, summary, measures)
        run.seconds.wall = time.perf_counter() - began
        return SweepResult(table, by_cell, summary, report, run.seconds)


class _Run:
    """Draws pieces, with the model, the prompts and the reference at hand that came last."""

    def __init__(
        self,
        settings: SweepSettings,
        folder: Path,
        units: Units,
        prompts: list[str],
        requests: Sequence[Request] | None,
        metrics: Sequence[Metric],
        features: Features,
        state: PartialState,
    ) -> None:
        self.settings = settings
        self.images = folder / "images"
        self.units = units
        self.prompts = prompts
        self.requests = requests
        self.metrics = metrics
        self.features = features
        self.state = state
        self.seconds = Seconds()
        self._pipe: JanusFlowPipeline | None = None
        self._pipe_key: Any = None
        self._prepared: Any = None
        self._prepared_key: Any = None
        self._reference: Arrays | None = None
        self._reference_name: str | None = None

    def draw(self, pieces: Sequence[Piece], *, progress: bool) -> None:
        """Draws what is missing; this process's share of it."""
        missing = [piece for piece in pieces if piece.name not in self.units]
        self.state.wait_for_everyone()  # all must have seen the same before one adds to it
        rank, num = self.state.process_index, self.state.num_processes
        shared = num > 1
        phases = [
            list(phase)[rank::num]
            for _, phase in groupby(missing, lambda p: (p.cell.model, shared and p.is_reference))
        ]
        terminal = sys.stderr.isatty()
        with tqdm(
            total=sum(piece.work for phase in phases for piece in phase),
            disable=not (progress and self.state.is_main_process),
            bar_format="{percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}",
            mininterval=0.5 if terminal else 60,
            delay=0 if terminal else 60,
        ) as bar:
            done, total = 0, sum(map(len, phases))
            for phase in phases:
                for piece in phase:
                    if piece.is_reference:
                        self.units.arrays(piece.name, partial(self._fine, piece))
                    else:
                        self.units.values(piece.name, partial(self._measured, piece))
                    done += 1
                    bar.set_postfix_str(f"{done} of {total} pieces", refresh=False)
                    bar.update(piece.work)
                self.state.wait_for_everyone()

    def _fine(self, piece: Piece) -> Arrays:
        out, _ = self._call(piece)
        assert out.latents is not None
        return {"latents": out.latents.float().cpu().numpy(), "pixels": _pixels(out)}

    def _measured(self, piece: Piece) -> Row:
        out, seconds = self._call(piece)
        pixels = _pixels(out)
        repeats = self.settings.images_per_prompt
        prompts = [text for text in self.prompts[piece.start : piece.stop] for _ in range(repeats)]
        requests = None
        if self.requests is not None:
            asked = self.requests[piece.start : piece.stop]
            requests = [request for request in asked for _ in range(repeats)]
        drawn = Drawn(
            prompts,
            requests,
            pixels,
            None if out.latents is None else out.latents.float().cpu().numpy(),
            self._reference_of(piece),
        )
        return {
            "nfe": out.nfe,
            "num_forward_passes": out.num_forward_passes,
            "seconds": seconds / len(pixels),
            "metrics": {metric.name: list(metric.measure(drawn)) for metric in self.metrics},
            "true": self.features.keep(piece, pixels),
            "images": [_keep(self.images, picture) for picture in pixels],
        }

    def _reference_of(self, piece: Piece) -> Arrays | None:
        cell = piece.cell.reference(self.settings.reference)
        if cell is None or not any(metric.needs_reference for metric in self.metrics):
            return None
        fine = Piece(cell, piece.start, piece.stop, is_reference=True)
        if self._reference_name != fine.name:
            self._reference = self.units.arrays(fine.name, partial(self._fine, fine))
            self._reference_name = fine.name
        return self._reference

    def _call(self, piece: Piece) -> tuple[JanusFlowOutput, float]:
        """Pictures, and the seconds that drawing took, encoding the prompts left out."""
        pipe, prepared = self._ready(piece)
        began = time.perf_counter()
        out = pipe(
            prepared,
            **piece.cell.options(),
            num_images_per_prompt=self.settings.images_per_prompt,
            seed=piece.cell.seed + piece.start * self.settings.images_per_prompt,
            batch_size=self.settings.batch_size,
            output_type="pt",
        )
        seconds = time.perf_counter() - began
        self.seconds.model += seconds
        return out, seconds

    def _ready(self, piece: Piece) -> tuple[JanusFlowPipeline, Any]:
        """The pipeline, and the piece's prompts as the language model sees them."""
        cell = piece.cell
        if self._pipe_key != (cell.model, cell.dtype):
            self._pipe = self._prepared = self._prepared_key = None  # one model at a time
            began = time.perf_counter()
            self._pipe = self._load(cell)
            self.features.use(self._pipe)
            self._pipe_key = (cell.model, cell.dtype)
            self.seconds.loading += time.perf_counter() - began
        assert self._pipe is not None
        if self._prepared_key != (cell.head, piece.start):
            began = time.perf_counter()
            self._prepared = self._pipe.encode_prompts(
                self.prompts[piece.start : piece.stop], head=cell.head
            )
            if cell.head == "flow" and self._prepared_key is None:
                # A first call is slower than all that follow; it should be no cell's.
                self._pipe(self._prepared, num_inference_steps=1, seed=0, output_type="pt")
            self._prepared_key = (cell.head, piece.start)
            self.seconds.model += time.perf_counter() - began
        return self._pipe, self._prepared

    def _load(self, cell: Cell) -> JanusFlowPipeline:
        several = self.state.num_processes > 1
        pipe = JanusFlowPipeline.from_pretrained(
            cell.model,
            vae=self.settings.vae,
            torch_dtype=getattr(torch, cell.dtype),
            device=self.state.device if several else self.settings.device,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe


def _check_libraries() -> None:
    missing = [n for n in ("jinja2", "matplotlib", "pandas", "pyarrow") if find_spec(n) is None]
    if missing:
        raise SettingsError(f"a sweep needs {', '.join(missing)}: pip install 'janusflow[eval]'")


@contextmanager
def _one_run(
    folder: Path, settings: SweepSettings, resolved: Row, state: PartialState
) -> Iterator[Units]:
    """The folder's pieces, for this run alone."""
    problem: list[str | None] = [None]
    with ExitStack() as stack:
        if state.is_main_process:
            try:
                stack.enter_context(held_alone(folder, "sweep"))
                units = Units(folder, resolved)
                _prepare(folder, settings)
            except SettingsError as error:
                problem = [str(error)]
        broadcast_object_list(problem)
        if problem[0] is not None:
            raise SettingsError(problem[0])
        yield units if state.is_main_process else Units(folder, resolved)


def _resolved(
    settings: SweepSettings,
    prompts: Sequence[str],
    metrics: Sequence[Metric | SetMetric],
    true: TruePictures | None,
) -> Row:
    """All that the results depend on; every head is found to be there."""
    models, heads = settings.axes.model, settings.axes.head
    return {
        **asdict(settings),
        "drawing_defaults": {m: {h: drawing_defaults(m, h) for h in heads} for m in models},
        "prompts_hash": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "weights": {model: weights_hash(resolve_model_folder(model)) for model in models},
        "autoencoders": _autoencoders(settings) if "flow" in heads else {},
        "metric_sources": {metric.name: metric.source for metric in metrics if metric.source},
        "true_pictures": None if true is None else true.sha256(),
        "versions": versions(),
    }


def _autoencoders(settings: SweepSettings) -> dict[str, str]:
    """Hashes of the autoencoders' weights, by model."""
    hash_of = cache(lambda where: module_hash(load_autoencoder(where)))
    found = {}
    for model in settings.axes.model:
        own = resolve_model_folder(model) / "vae"
        default = own if own.is_dir() else SDXL_VAE
        found[model] = hash_of(default if settings.vae == "default" else settings.vae)
    return found


def _prepare(folder: Path, settings: SweepSettings) -> None:
    """Makes the folders, and removes what killed runs had not finished writing."""
    for name in ("images", "tables", "figures"):
        (folder / name).mkdir(exist_ok=True)
    for pattern in ("units/.*", "images/*/.*", "tables/.*", "figures/.*"):
        for scratch in folder.glob(pattern):
            scratch.unlink()
    with atomic_path(folder / "config.yaml") as scratch:
        scratch.write_text(yaml.safe_dump(asdict(settings), sort_keys=False), encoding="utf-8")


def _pixels(out: JanusFlowOutput) -> np.ndarray:
    """Pictures as uint8 (B, H, W, 3)."""
    return (255 * out.images.clamp(0, 1)).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def _keep(folder: Path, pixels: np.ndarray) -> str:
    """Writes a picture (H, W, 3) under the hash of its shape and pixels; gives its path."""
    digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
    name = f"{digest[:2]}/{digest}.png"
    file = folder / name
    if not file.is_file():
        file.parent.mkdir(exist_ok=True)
        with atomic_path(file) as scratch:
            Image.fromarray(pixels).save(scratch)
    return name
