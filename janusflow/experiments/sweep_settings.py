"""The settings of a sweep, as a config gives them."""

from __future__ import annotations

from dataclasses import dataclass, field

from janusflow.errors import SettingsError
from janusflow.experiments.prompts import SHAPES, PromptSettings

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Axes:
    """Values of each setting; a grid has all their combinations."""

    model: list[str] = field(default_factory=lambda: ["tiny"])
    """Checkpoints: folders, hub ids or "tiny"."""
    dtype: list[str] = field(default_factory=lambda: ["float32"])
    head: list[str] = field(default_factory=lambda: ["flow"])
    num_inference_steps: list[int] = field(default_factory=lambda: [30])
    nfe: list[int] | None = None
    """Evaluations, instead of `num_inference_steps`: each solver takes the steps that need so many,
    and is left out where that is no whole number. Steps at rest count as any others."""
    guidance_scale: list[float | None] = field(default_factory=lambda: [None])
    """1.0 = off; null, here and in the three of the VQ head, for what the model draws with."""
    guidance_interval: list[list[float]] = field(default_factory=lambda: [[0.0, 1.0]])
    """First and last time with guidance, 0 = noise and 1 = image."""
    guidance_method: list[str] = field(default_factory=lambda: ["cfg"])
    guidance_rescale: list[float] = field(default_factory=lambda: [0.0])
    zero_init_steps: list[int] = field(default_factory=lambda: [0])
    """Steps at the start in which the state rests, as CFG-Zero* proposes."""
    solver: list[str] = field(default_factory=lambda: ["euler"])
    shift: list[float] = field(default_factory=lambda: [1.0])
    rtol: list[float | None] = field(default_factory=lambda: [None])
    """Of adaptive solvers, relative and absolute tolerance in one; null for the solver's own."""
    temperature: list[float | None] = field(default_factory=lambda: [None])
    """Of the VQ head, as are the next two; 0 takes the likeliest tokens."""
    top_k: list[int | None] = field(default_factory=lambda: [None])
    top_p: list[float | None] = field(default_factory=lambda: [None])
    seed: list[int] = field(default_factory=lambda: [0])
    """Picture i has the noise of seed + i in every cell of a seed; for noise that is nowhere the
    same, keep seeds as far apart as there are pictures."""


@dataclass(frozen=True)
class RandomSettings:
    """Of the design "random": an axis not named here is drawn from its values."""

    num_cells: int = 50
    seed: int = 0
    uniform: dict[str, list[float]] = field(default_factory=dict)
    """Least and greatest value by axis."""
    log_uniform: dict[str, list[float]] = field(default_factory=dict)
    """The same, for values whose ratios count."""


@dataclass(frozen=True)
class ReferenceSettings:
    """The fine solution that `error` and `psnr` compare with: same prompt, noise and guidance."""

    solver: str = "midpoint"
    num_inference_steps: int = 100
    dtype: str = "float32"


@dataclass(frozen=True)
class MetricSources:
    """What some metrics need besides the pictures of the sweep; nothing is downloaded."""

    clip: str | None = None
    """Of `clip_score`: a folder with a CLIP model of transformers."""
    features: str | None = None
    """Of `frechet`: an extractor, see `janusflow.evaluation.features.feature_extractor`."""
    pictures: str = SHAPES
    """Of `mmd` and `frechet`: "shapes" for one true picture of the shapes world for each that is
    drawn, of the same prompt, or a folder of pictures, which are cropped to squares."""


@dataclass(frozen=True)
class SweepSettings:
    """A sweep."""

    design: str = "grid"
    """"grid" or "random"."""
    axes: Axes = field(default_factory=Axes)
    random: RandomSettings = field(default_factory=RandomSettings)
    prompts: PromptSettings = field(default_factory=lambda: PromptSettings(num=20))
    images_per_prompt: int = 1
    reference: ReferenceSettings = field(default_factory=ReferenceSettings)
    metrics: list[str] = field(default_factory=lambda: ["shapes", "error", "psnr"])
    """See `janusflow.experiments.sweep_metrics` and `sweep_sets`."""
    metrics_from: MetricSources = field(default_factory=MetricSources)
    vae: str = "default"
    """Autoencoder of all models; see `JanusFlowPipeline.from_pretrained`."""
    batch_size: int = 20
    """Pictures at once; part of the settings, since rounding may depend on it."""
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.design not in ("grid", "random"):
            raise SettingsError(f"design is {self.design!r}; expected 'grid' or 'random'")
        for name in ("images_per_prompt", "batch_size"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is at least 1, not {getattr(self, name)}")
        if self.prompts.num < 1 or self.random.num_cells < 1:
            raise SettingsError("prompts.num and random.num_cells are at least 1")
        if self.reference.dtype not in DTYPES:
            raise SettingsError(f"reference.dtype is one of {', '.join(DTYPES)}")
