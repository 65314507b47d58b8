"""Measures of single pictures in a sweep: built in, or a function of the user's own.

"shapes": 1.0 for a picture that fulfils its prompt of the shapes world, else 0.0. "error": relative
L2 distance of the latents to those of the fine reference. "psnr": of the pixels to the reference's,
in decibels. "clip_score": `max(100 cos, 0)` of picture and prompt by the CLIP model in
`metrics_from.clip`. "my_module:function": `function(images, prompts)` with float32 images
(B, 3, H, W) in [0, 1] and B texts gives B numbers, more being better unless the function has an
attribute `lower_is_better = True`; its column is called like the function. Axes: B pictures.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from janusflow.data.shapes.language import Request
from janusflow.errors import SettingsError
from janusflow.evaluation.features import clip_scorer
from janusflow.evaluation.metrics import psnr
from janusflow.evaluation.shapes_scorer import fulfils
from janusflow.experiments.sweep_settings import MetricSources
from janusflow.experiments.units import Arrays
from janusflow.flow.diagnostics import endpoint_error

OF_SETS = ("mmd", "frechet")
"""Metrics of sets of pictures; see `janusflow.experiments.sweep_sets`."""
Values = Sequence[float | None]
"""None where a measure says nothing, such as of a head without a reference."""


@dataclass(frozen=True)
class Drawn:
    """Pictures that were drawn together.

    Attributes:
        prompts: A text for each.
        requests: Their meaning, for prompts of the shapes world.
        pixels: uint8 (B, H, W, 3).
        latents: Of the flow head, float32 (B, C, h, w).
        reference: "pixels" and "latents" of the fine solution, where there is one.
    """

    prompts: list[str]
    requests: Sequence[Request] | None
    pixels: np.ndarray
    latents: np.ndarray | None
    reference: Arrays | None = None


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A column that figures and tables of the report show.

    Attributes:
        name: Of the column.
        lower_is_better: Whether less is better.
        note: What a reader of the report must know of it.
    """

    name: str
    lower_is_better: bool = False
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Metric(Measure):
    """A measure of single pictures.

    Attributes:
        measure: Values of pictures.
        needs_reference: Whether references are to be drawn for it.
        source: Hash of the weights or of the user's own module that it depends on.
    """

    measure: Callable[[Drawn], Values]
    needs_reference: bool = False
    source: str | None = None


def find_metrics(
    names: Sequence[str], *, of_shapes: bool, sources: MetricSources | None = None
) -> list[Metric]:
    """Measures of single pictures by their names; those of sets are passed over.

    Args:
        names: See this module.
        of_shapes: Whether prompts are those of the shapes world.
        sources: Where networks come from.

    Raises:
        SettingsError: If one is unknown, lacks what it needs or does not go with the prompts.
    """
    clip = None if sources is None else sources.clip
    found = [_find(name, clip) for name in names if name not in OF_SETS]
    if not of_shapes and "shapes" in names:
        raise SettingsError(
            "the metric 'shapes' judges prompts of the shapes world only; leave it out of metrics, "
            "or take prompts.source 'shapes'"
        )
    columns = [*(metric.name for metric in found), *(name for name in names if name in OF_SETS)]
    if len({*columns}) < len(columns):
        raise SettingsError(f"metrics need different names, got {', '.join(columns)}")
    return found


def _find(name: str, clip: str | None) -> Metric:
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    return _clip_score(clip) if name == "clip_score" else _custom(name)


def _clip_score(folder: str | None) -> Metric:
    if folder is None:
        raise SettingsError(
            "the metric 'clip_score' needs a CLIP model: give its folder as metrics_from.clip"
        )
    scorer = clip_scorer(folder)

    def measure(drawn: Drawn) -> Values:
        return scorer.score(as_images(drawn.pixels), drawn.prompts).tolist()

    return Metric(name="clip_score", measure=measure, source=scorer.hash)


def _shapes(drawn: Drawn) -> Values:
    assert drawn.requests is not None
    pairs = zip(drawn.pixels, drawn.requests, strict=True)
    return [float(fulfils(Image.fromarray(pixels), request)) for pixels, request in pairs]


def _error(drawn: Drawn) -> Values:
    if drawn.reference is None:
        return [None] * len(drawn.prompts)
    assert drawn.latents is not None
    found, fine = map(torch.from_numpy, (drawn.latents, drawn.reference["latents"]))
    return endpoint_error(found, fine).tolist()


def _psnr(drawn: Drawn) -> Values:
    if drawn.reference is None:
        return [None] * len(drawn.prompts)
    return psnr(drawn.pixels / 255, drawn.reference["pixels"] / 255).tolist()


_BUILT_IN = {
    "shapes": Metric(name="shapes", measure=_shapes),
    "error": Metric(name="error", measure=_error, lower_is_better=True, needs_reference=True),
    "psnr": Metric(name="psnr", measure=_psnr, needs_reference=True),
}


def _custom(name: str) -> Metric:
    module_name, colon, function_name = name.partition(":")
    if not colon:
        known = ", ".join((*_BUILT_IN, "clip_score", *OF_SETS))
        raise SettingsError(f"unknown metric {name!r}; expected {known} or 'my_module:function'")
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, function_name)
    except (ImportError, AttributeError) as error:
        raise SettingsError(f"the metric {name!r} cannot be had: {error}") from error

    def measure(drawn: Drawn) -> Values:
        values = function(as_images(drawn.pixels), list(drawn.prompts))
        try:
            numbers = [float(value) for value in values]
        except (TypeError, ValueError):
            numbers = []
        if len(numbers) != len(drawn.prompts):
            raise SettingsError(
                f"the metric {name!r} gave {values!r} for {len(drawn.prompts)} pictures; expected "
                "a number for each"
            )
        return numbers

    file = getattr(module, "__file__", None)
    return Metric(
        name=function_name,
        measure=measure,
        lower_is_better=getattr(function, "lower_is_better", False),
        source=None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest(),
    )


def as_images(pixels: np.ndarray) -> Tensor:
    """Pixels uint8 (B, H, W, 3) as float32 (B, 3, H, W) in [0, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
