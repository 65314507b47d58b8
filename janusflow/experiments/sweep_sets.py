"""Measures of sets of pictures in a sweep: how far they are from a set of true ones.

"mmd": maximum mean discrepancy by features of the model's own vision tower, the unbiased estimate;
within a head only. "frechet": Fréchet distance by the features of `metrics_from.features`. Axes:
N pictures, d features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from janusflow.data.shapes.language import Request
from janusflow.errors import SettingsError
from janusflow.evaluation.features import FeatureExtractor, feature_extractor, tower_extractor
from janusflow.evaluation.metrics import frechet_distance, mmd
from janusflow.experiments.pictures import as_tensor, draw_request, picture_files, read_square
from janusflow.experiments.prompts import SHAPES
from janusflow.experiments.sweep_metrics import OF_SETS, Measure, as_images
from janusflow.experiments.sweep_plan import Piece
from janusflow.experiments.sweep_settings import SweepSettings
from janusflow.experiments.units import Arrays, Units
from janusflow.pipeline import JanusFlowPipeline

_AT_ONCE = 32
_NOTES = {
    "mmd": (
        "mmd is the squared maximum mean discrepancy, times 1000, by features of the model's own "
        "vision tower (SigLIP), the unbiased estimate, which may fall below 0; its biased twin "
        "stands in the tables. Each head has a column of its own, and heads are never to be set "
        "side by side by it: the flow head is trained to resemble the features of that very tower "
        "(REPA)."
    ),
    "frechet": (
        "frechet is biased upwards, and more so with fewer pictures, where the column "
        "frechet_biased says yes: fewer than ten pictures a feature."
    ),
}


@dataclass(frozen=True)
class SetMetric:
    """A distance of drawn pictures from true ones; less is better.

    Attributes:
        name: As it was asked for.
        extractor: Features for a model's pictures.
        distance: Of the features (N, d) of drawn and true pictures: columns by what is added to
            the name, the measure itself by "".
        within_head: Whether each head has columns of its own, so that none meets another.
        source: Hash of the weights, where they are no part of the model's.
    """

    name: str
    extractor: Callable[[JanusFlowPipeline], FeatureExtractor]
    distance: Callable[[np.ndarray, np.ndarray], dict[str, Any]]
    within_head: bool = False
    source: str | None = None

    def column(self, head: str) -> str:
        """Of its values, for pictures of a head."""
        return f"{self.name}_{head}" if self.within_head else self.name

    def measures(self, heads: Sequence[str]) -> list[Measure]:
        """What figures show of it."""
        columns = dict.fromkeys(self.column(head) for head in heads)
        return [
            Measure(name=name, lower_is_better=True, note=_NOTES[self.name]) for name in columns
        ]

    def values(self, head: str, drawn: np.ndarray, true: np.ndarray) -> dict[str, Any]:
        """All its columns of a set of pictures, by their features (N, d)."""
        found = self.distance(drawn, true)
        return {f"{self.column(head)}{end}": value for end, value in found.items()}


@dataclass(frozen=True)
class TruePictures:
    """What drawn pictures are compared with.

    Attributes:
        requests: A picture of the shapes world is drawn for each.
        files: Pictures, where there are no requests.
    """

    requests: Sequence[Request] = ()
    files: Sequence[Path] = ()

    def sha256(self) -> str | None:
        """Of the files' content; None for drawings, which the prompts determine."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest() if self.files else None

    def batches(self, size: int) -> Iterator[Tensor]:
        """Some at a time, float32 (N, 3, size, size) in [0, 1]."""
        num = len(self.requests) or len(self.files)
        for start in range(0, num, _AT_ONCE):
            indices = range(start, min(start + _AT_ONCE, num))
            yield as_tensor([self._picture(index, size) for index in indices])

    def _picture(self, index: int, size: int) -> Image.Image:
        if self.files:
            return read_square(self.files[index], size)
        return draw_request(self.requests[index], size, np.random.default_rng([index, 0x7A1E]))


class Features:
    """Features of drawn and true pictures, kept as units, and distances between them.

    Args:
        units: Of the sweep.
        metrics: That need them.
        true: What drawn pictures are compared with; None where nothing needs it.
    """

    def __init__(
        self, units: Units, metrics: Sequence[SetMetric], true: TruePictures | None
    ) -> None:
        self._units = units
        self._metrics = metrics
        self._true = true
        self._extractors: dict[str, FeatureExtractor] = {}

    def use(self, pipe: JanusFlowPipeline) -> None:
        """Takes the model that the next pictures are drawn with."""
        self._extractors = {metric.name: metric.extractor(pipe) for metric in self._metrics}

    def keep(self, piece: Piece, pixels: np.ndarray) -> dict[str, str]:
        """Keeps those of a piece's pictures, uint8 (N, H, W, 3), and of the true ones.

        Returns:
            The unit of the true ones by metric.
        """
        if not self._metrics:
            return {}
        true = {name: self._keep_true(name, pixels.shape[1]) for name in self._extractors}
        self._units.arrays(_features_of(piece), partial(self._extract, as_images(pixels)))
        return true

    def _keep_true(self, name: str, size: int) -> str:
        extractor, true = self._extractors[name], self._true
        assert true is not None
        unit = f"true-{name}-{extractor.hash[:16]}-{size}"
        if unit not in self._units:
            parts = [extractor.extract(batch) for batch in true.batches(size)]
            self._units.arrays(unit, lambda: {name: np.concatenate(parts)})
        return unit

    def _extract(self, pictures: Tensor) -> Arrays:
        return {name: found.extract(pictures) for name, found in self._extractors.items()}

    def values(self, pieces: Mapping[str, Sequence[Piece]], cells: Sequence[str]) -> dict[str, Any]:
        """Columns of all pictures of some cells.

        Args:
            pieces: By a cell's id.
            cells: Ids of cells of one model and head.
        """
        if not self._metrics:
            return {}
        digest = hashlib.sha256("\n".join(cells).encode()).hexdigest()
        of_cells = [piece for cell in cells for piece in pieces[cell]]
        return self._units.values(f"sets-{digest[:16]}", partial(self._compare, of_cells))

    def _compare(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        true = self._units.read_values(pieces[0].name)["true"]
        parts = [self._units.read_arrays(_features_of(piece)) for piece in pieces]
        found: dict[str, Any] = {}
        for metric in self._metrics:
            drawn = np.concatenate([part[metric.name] for part in parts])
            others = self._units.read_arrays(true[metric.name])[metric.name]
            found |= metric.values(pieces[0].cell.head, drawn, others)
        return found


def _features_of(piece: Piece) -> str:
    return f"features-{piece.name}"


def find_set_metrics(settings: SweepSettings, num_pictures: int) -> list[SetMetric]:
    """Measures of sets among those that a sweep asks for.

    Args:
        settings: Of the sweep.
        num_pictures: Of a cell.

    Raises:
        SettingsError: If one lacks what it needs.
    """
    names = [name for name in settings.metrics if name in OF_SETS]
    if names and num_pictures < 2:
        raise SettingsError(
            f"{' and '.join(names)} compare sets of pictures, and a cell has one; ask for more "
            "prompts or images_per_prompt"
        )
    return [_mmd(settings) if name == "mmd" else _frechet(settings) for name in names]


def true_pictures(settings: SweepSettings, requests: Sequence[Request] | None) -> TruePictures:
    """What measures of sets compare with.

    Args:
        settings: Of the sweep.
        requests: What the prompts mean, where they are of the shapes world.

    Raises:
        SettingsError: If there are no true pictures of the prompts, or none in the folder.
    """
    source = settings.metrics_from.pictures
    if source != SHAPES:
        return TruePictures(files=picture_files(source, "metrics_from.pictures"))
    if requests is None:
        raise SettingsError(
            "mmd and frechet need true pictures, and prompts of a file have none: give a folder as "
            "metrics_from.pictures, or take prompts.source 'shapes'"
        )
    repeats = settings.images_per_prompt
    return TruePictures([request for request in requests for _ in range(repeats)])


def _mmd(settings: SweepSettings) -> SetMetric:
    models = [*dict.fromkeys(settings.axes.model)]
    if len(models) > 1:
        raise SettingsError(
            f"the metric 'mmd' is by the model's own vision tower and compares no two models, got "
            f"{', '.join(models)}; sweep one at a time, or take 'frechet'"
        )

    def distance(drawn: np.ndarray, true: np.ndarray) -> dict[str, Any]:
        unbiased, biased = mmd(drawn, true)
        return {"": unbiased, "_biased": biased}

    return SetMetric("mmd", tower_extractor, distance, within_head=True)


def _frechet(settings: SweepSettings) -> SetMetric:
    name = settings.metrics_from.features
    if name is None:
        raise SettingsError(
            "the metric 'frechet' needs features: give metrics_from.features, such as 'pixels', "
            "'inception:FILE' or 'clip:FOLDER'"
        )
    extractor = feature_extractor(name)

    def distance(drawn: np.ndarray, true: np.ndarray) -> dict[str, Any]:
        few = min(len(drawn), len(true)) < 10 * true.shape[1]
        return {"": frechet_distance(drawn, true), "_biased": "yes" if few else "no"}

    return SetMetric("frechet", lambda pipe: extractor, distance, source=extractor.hash)
