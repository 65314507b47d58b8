"""Pairs for reflow and distillation: noise, and where the model's own guided path takes it.

Trained on such pairs, a model draws in fewer steps; by reflow (arXiv 2209.03003) without guidance,
too, which its weights have taken in. Files are made one after another; a run that was stopped goes
on with the next. Axes: n pairs, C latent channels, h w latent cells.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from janusflow.data.mixture import DataSettings, open_sources
from janusflow.data.samples import Sample
from janusflow.data.sources import Source
from janusflow.data.sources.pairs import write_pairs
from janusflow.data.sources.shapes import ShapesSource
from janusflow.data.stream import SampleStream
from janusflow.errors import SettingsError
from janusflow.evaluation.shapes_scorer import fulfils
from janusflow.files import held_alone, write_json
from janusflow.models.checkpoints import describe
from janusflow.pipeline import JanusFlowPipeline
from janusflow.training.changes import changed
from janusflow.version import versions

_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class MissedSettings:
    """A way of drawing, whose wrong pictures pairs are to mend."""

    num_inference_steps: int = 0
    """0: there is none, and pairs are of any noise."""
    solver: str = "unipc"
    shift: float = 1.0
    guidance_scale: float | None = None
    """The model's own when not given."""


@dataclass(frozen=True)
class PairsRunSettings:
    """Which pairs, and how many."""

    task: str = "pairs"
    output_dir: str = "runs/pairs"
    model: str = "tiny"
    data: DataSettings = field(default_factory=DataSettings)
    """Sources of prompts."""
    num_pairs: int = 10_000
    pairs_per_file: int = 500
    batch_size: int = 50
    num_inference_steps: int = 30
    solver: str = "euler"
    guidance_scale: float | None = None
    """The model's own when not given."""
    right_only: bool = False
    """Keep the pairs alone whose picture shows what its prompt says; of the shapes world."""
    missed_by: MissedSettings = field(default_factory=MissedSettings)
    """Keep the pairs alone whose noise becomes a wrong picture so; with `right_only`."""
    more_guidance_scales: list[float] = field(default_factory=list)
    """With `missed_by`: of the right pictures by any of these or `guidance_scale`, a pair gets the
    nearest to the wrong one."""
    seed: int = 0
    """Of the first noise; the next pair has the next."""
    device: str = "cpu"
    dtype: str = "float32"
    """Of weights and network; latents are float32 in any. bfloat16 is faster on processors with
    units for it."""

    def __post_init__(self) -> None:
        for name in ("num_pairs", "pairs_per_file", "batch_size"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is at least 1, not {getattr(self, name)}")
        if self.dtype not in _DTYPES:
            raise SettingsError(f"dtype is {self.dtype!r}; expected one of {', '.join(_DTYPES)}")
        missed_steps = self.missed_by.num_inference_steps
        if missed_steps < 0:
            raise SettingsError(f"missed_by.num_inference_steps is at least 0, not {missed_steps}")
        if missed_steps and not self.right_only:
            raise SettingsError("missed_by needs pictures to be judged; set right_only to true")
        if self.more_guidance_scales and not missed_steps:
            raise SettingsError(
                "more_guidance_scales are for noises that are missed; set "
                "missed_by.num_inference_steps, or leave them out"
            )


def make_pairs(settings: PairsRunSettings) -> Path:
    """Makes the files that are missing.

    Returns:
        The folder `final` of the output folder.

    Raises:
        SettingsError: If there are no prompts, a setting does not fit, or the output folder holds
            pairs of other settings or another run at work.
    """
    sources = [s for s in open_sources(settings.data) if s.kind == "generation"]
    if not sources:
        raise SettingsError("prompts come from sources of kind generation, and data has none")
    if settings.right_only and not all(isinstance(source, ShapesSource) for source in sources):
        raise SettingsError(
            "right_only is true, and only pictures of the shapes world can be judged; take sources "
            "of format shapes, or set it to false"
        )
    with held_alone(settings.output_dir, "run"):
        _keep_settings(settings)
        return _make_missing(settings, sources)


def _keep_settings(settings: PairsRunSettings) -> None:
    """Notes what pairs are made with beside them; refuses to go on with something else."""
    file = Path(settings.output_dir) / "settings.json"
    now = {**asdict(settings), "weights_hash": describe(settings.model).weights_hash}
    now = json.loads(json.dumps(now))  # as it is read again
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        names = changed(before, now, free=["batch_size", "device"])
        if names:
            raise SettingsError(
                f"{settings.output_dir} holds pairs that were made with other settings "
                f"({'; '.join(names)}); set them back, or take another --output-dir"
            )
    elif any(Path(settings.output_dir, "final").glob("*.safetensors")):
        raise SettingsError(
            f"{settings.output_dir} holds pairs, but not the settings.json that tells how they "
            "were made; take another --output-dir"
        )
    write_json(file, {**now, "versions": versions()})


def _make_missing(settings: PairsRunSettings, sources: list[Source]) -> Path:
    """Makes the files that are not there yet; returns their folder."""
    folder = Path(settings.output_dir) / "final"
    folder.mkdir(exist_ok=True)
    vae = "default" if settings.right_only else None
    pipe = JanusFlowPipeline.from_pretrained(
        settings.model, vae=vae, device=settings.device, torch_dtype=getattr(torch, settings.dtype)
    )
    pipe.set_progress_bar_config(disable=True)
    num_files = -(-settings.num_pairs // settings.pairs_per_file)
    for number in tqdm(range(num_files), desc="pairs", unit="file"):
        file = folder / f"part-{number:05d}.safetensors"
        if file.is_file():
            continue
        start = number * settings.pairs_per_file
        stop = min(start + settings.pairs_per_file, settings.num_pairs)
        stream: SampleStream[Sample] = SampleStream(sources, {}, settings.seed, number, num_files)
        samples = [stream.next(0) for _ in range(start, stop)]
        seeds = list(range(settings.seed + start, settings.seed + stop))
        places, x_1 = _ends(pipe, settings, samples, seeds)
        write_pairs(file, x_1, [seeds[i] for i in places], [samples[i].prompt for i in places])
    return folder


def _ends(
    pipe: JanusFlowPipeline, settings: PairsRunSettings, samples: list[Sample], seeds: list[int]
) -> tuple[list[int], Tensor]:
    """The places of the samples that are kept, and where their noises end, (n, C, h, w)."""
    many = {"num_inference_steps": settings.num_inference_steps, "solver": settings.solver}
    if not settings.missed_by.num_inference_steps:
        way = {**many, "guidance_scale": settings.guidance_scale}
        x_1, right = _drawn(pipe, settings, samples, seeds, way)
        return right.nonzero().flatten().tolist(), x_1[right]
    wrong, right = _drawn(pipe, settings, samples, seeds, asdict(settings.missed_by))
    missed = (~right).nonzero().flatten().tolist()
    samples, seeds = [samples[i] for i in missed], [seeds[i] for i in missed]
    wrong = wrong[missed]
    nearest, x_1 = torch.full((len(missed),), torch.inf), wrong.clone()
    for scale in (settings.guidance_scale, *settings.more_guidance_scales) if missed else ():
        way = {**many, "guidance_scale": scale}
        ends, right = _drawn(pipe, settings, samples, seeds, way)
        distances = (ends - wrong).square().flatten(1).mean(1).where(right, torch.inf)
        nearer = distances < nearest
        nearest[nearer], x_1[nearer] = distances[nearer], ends[nearer]
    mended = nearest.isfinite()
    return [i for i, found in zip(missed, mended, strict=True) if found], x_1[mended]


def _drawn(
    pipe: JanusFlowPipeline,
    settings: PairsRunSettings,
    samples: list[Sample],
    seeds: list[int],
    way: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Latents (n, C, h, w), and which pictures are right (n,); all, where none is judged."""
    out = pipe(
        [sample.prompt for sample in samples],
        head="flow",
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        batch_size=settings.batch_size,
        output_type="pil" if settings.right_only else "latent",
        **way,
    )
    assert out.latents is not None
    right = [True] * len(samples)
    if settings.right_only:
        requests = [sample.request for sample in samples if sample.request is not None]
        right = [fulfils(image, r) for image, r in zip(out.images, requests, strict=True)]
    return out.latents.cpu(), torch.tensor(right)
