"""Flow against VQ: what each tokenizer can show, what each head draws, and what it costs.

The same prompts, the same seeds, the same number of pictures for both. Every piece is computed
once (`units`); tables are made of the pieces, so they do not depend on how often a run was stopped.
Axes: N pictures, d features.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from janusflow.data.shapes.language import Request
from janusflow.data.shapes.scene import draw, sample_scene
from janusflow.errors import SettingsError
from janusflow.evaluation.features import FeatureExtractor, feature_extractor
from janusflow.evaluation.metrics import bootstrap, frechet_distance, psnr, ssim
from janusflow.evaluation.shapes_scorer import fulfils
from janusflow.experiments.pictures import as_tensor, picture_files, read_square
from janusflow.experiments.prompts import SHAPES, PromptSettings, load_prompts
from janusflow.experiments.units import Arrays, Units
from janusflow.files import held_alone
from janusflow.flow.guidance import check_guidance_scale
from janusflow.flow.solvers import make_solver
from janusflow.flow.timesteps import time_grid
from janusflow.models.autoencoder import decode, encode
from janusflow.models.checkpoints import describe, training_record
from janusflow.models.token_sampling import token_choice
from janusflow.pipeline import JanusFlowPipeline
from janusflow.version import versions

Row = dict[str, Any]


@dataclass(frozen=True)
class PictureSettings:
    """Pictures that the autoencoders reconstruct and that drawn ones are compared with."""

    source: str = SHAPES
    """"shapes", or a folder of pictures, which are cropped to squares."""
    num: int = 480
    seed: int = 0


@dataclass(frozen=True)
class FlowSettings:
    """How the flow head draws: once for each number of steps."""

    num_inference_steps: list[int] = field(default_factory=lambda: [2, 4, 8, 30])
    guidance_scale: float = 2.0
    solver: str = "euler"


@dataclass(frozen=True)
class VQSettings:
    """How the VQ head draws: once for each temperature."""

    temperature: list[float] = field(default_factory=lambda: [1.0])
    guidance_scale: float = 5.0
    top_k: int | None = None
    top_p: float | None = None


@dataclass(frozen=True)
class CompareSettings:
    """A comparison."""

    flow_model: str = "tiny"
    vq_model: str = "tiny"
    """The same as `flow_model`, for a checkpoint with both heads."""
    vae: str = "default"
    """Autoencoder of the flow model; see `JanusFlowPipeline.from_pretrained`."""
    prompts: PromptSettings = field(default_factory=PromptSettings)
    pictures: PictureSettings = field(default_factory=PictureSettings)
    flow: FlowSettings = field(default_factory=FlowSettings)
    vq: VQSettings = field(default_factory=VQSettings)
    features: str = "pixels"
    """See `janusflow.evaluation.features.feature_extractor`."""
    batch_size: int = 20
    """Pictures at once; part of the settings, since rounding may depend on it."""
    resamples: int = 1000
    """Of the bootstrap behind every interval."""
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise SettingsError(f"dtype is {self.dtype!r}; expected float32, bfloat16 or float16")
        for name in ("batch_size", "resamples"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is at least 1, not {getattr(self, name)}")
        if self.prompts.num < 2 or self.pictures.num < 2:
            raise SettingsError("prompts.num and pictures.num are at least 2")
        if not self.flow.num_inference_steps or not self.vq.temperature:
            raise SettingsError(
                "flow.num_inference_steps and vq.temperature name at least one value"
            )


@dataclass(frozen=True)
class Variant:
    """One way of drawing.

    Attributes:
        name: Of the row, and of its units.
        head: "flow" or "vq".
        options: Of the pipeline's call.
    """

    name: str
    head: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """What came out.

    Attributes:
        tables: Rows by the table's name: "tokenizers", "generation", "cost", "timings". All but
            the last come out the same on every run.
        trained_alike: Whether both heads learned alike, and how that is known.
        sheets: The first pictures (N, H, W, 3) uint8 by variant, for the same prompts and seeds.
        prompts: Their prompts.
        originals: Pictures (N, H, W, 3) uint8 that the autoencoders reconstruct.
        reconstructions: Of either head's autoencoder.
    """

    tables: dict[str, list[Row]]
    trained_alike: str
    sheets: dict[str, np.ndarray]
    prompts: list[str]
    originals: np.ndarray
    reconstructions: dict[str, np.ndarray]


_SHOWN = 16


def variants(settings: CompareSettings) -> list[Variant]:
    """All ways of drawing that a comparison asks for."""
    flow, vq = settings.flow, settings.vq
    found = [
        Variant(
            f"flow-{steps}-steps",
            "flow",
            {
                "num_inference_steps": steps,
                "guidance_scale": flow.guidance_scale,
                "solver": flow.solver,
            },
        )
        for steps in flow.num_inference_steps
    ]
    return found + [
        Variant(
            f"vq-temperature-{temperature:g}",
            "vq",
            {
                "temperature": temperature,
                "guidance_scale": vq.guidance_scale,
                "top_k": vq.top_k,
                "top_p": vq.top_p,
            },
        )
        for temperature in vq.temperature
    ]


def compare(settings: CompareSettings, folder: Path, *, progress: bool = False) -> Comparison:
    """Compares the heads, going on where an earlier run in the folder stopped.

    Args:
        settings: What is compared.
        folder: Where pieces of the results are kept.
        progress: Show a progress bar.

    Raises:
        SettingsError: If a setting cannot be had, a model lacks its head, the folder holds results
            of other settings, or another comparison is at work in it.
        CheckpointError: If a model cannot be loaded.
    """
    extractor = feature_extractor(settings.features)
    _check_drawing(settings)
    prompts, requests = load_prompts(settings.prompts)
    if len(prompts) < 2:
        raise SettingsError(f"{settings.prompts.source} holds one prompt; at least 2 are needed")
    pipes = _pipelines(settings)
    sizes = {
        "flow": pipes["flow"].model.flow_config.image_size,
        "vq": pipes["vq"].model.vq_head.image_size,
    }
    if sizes["flow"] != sizes["vq"]:
        raise SettingsError(
            f"the flow head draws {sizes['flow']} px and the VQ head {sizes['vq']} px; pictures of "
            "one size only can be compared"
        )
    depends = {
        **asdict(settings),
        "weights": {
            head: describe(getattr(settings, f"{head}_model")).weights_hash for head in pipes
        },
        "feature_hash": extractor.hash,
        "versions": versions(),
    }
    with held_alone(folder, "comparison"):
        units = Units(folder, depends)
        work = _Work(settings, units, pipes, prompts, requests, extractor, sizes["flow"])
        total = len(work.chunks(settings.pictures.num)) + sum(
            len(work.chunks(len(prompts))) + 2 for _ in variants(settings)
        )
        with tqdm(total=total, disable=not progress, unit="piece") as bar:
            parts = work.reconstruct(bar)
            drawn = {variant.name: work.draw(variant, bar) for variant in variants(settings)}
            costs = {variant.name: work.cost(variant, bar) for variant in variants(settings)}
    tables = {
        "tokenizers": _tokenizer_rows(parts, settings),
        "generation": _generation_rows(drawn, parts, requests, settings),
        "cost": [{"variant": v.name, "head": v.head, **costs[v.name][0]} for v in work.variants],
        "timings": [{"variant": v.name, "head": v.head, **costs[v.name][1]} for v in work.variants],
    }
    return Comparison(
        tables=tables,
        trained_alike=trained_alike(settings.flow_model, settings.vq_model),
        sheets={name: _uint8(arrays["pictures"][:_SHOWN]) for name, arrays in drawn.items()},
        prompts=prompts[:_SHOWN],
        originals=_uint8(parts["originals"][:_SHOWN]),
        reconstructions={head: _uint8(parts[head][:_SHOWN]) for head in pipes},
    )


def trained_alike(flow_model: str, vq_model: str) -> str:
    """Whether two heads learned from the same data for as long, in words for a report."""
    first, second = training_record(flow_model), training_record(vq_model)
    if flow_model == vq_model and first is None:
        return "One language model carries both heads; how long each was trained is not recorded."
    if first is None or second is None:
        return (
            "Not known: the heads come from two checkpoints, and not both say how they were "
            "trained. Differences may come from data or training as well as from the head."
        )
    distillation = first.get("distillation")
    if flow_model == vq_model:
        joint = (
            "both heads were trained in the same steps of one run over one language model "
            f"({first['steps']} steps, the same captions and pictures)"
        )
        if distillation is None:
            return f"Yes: {joint}."
        return f"Not to the end: {joint}; then the flow head in {distillation['steps']} more."
    differing = {key for key in {*first, *second} if first.get(key) != second.get(key)}
    differing |= {"distillation"} & first.keys()  # which is of the flow head alone
    if not differing:
        return "Yes: two checkpoints with the same record of training."
    return f"No: two checkpoints whose training differs in {', '.join(sorted(differing))}."


def _check_drawing(settings: CompareSettings) -> None:
    """Refuses settings that a head would refuse in the middle of the work."""
    make_solver(settings.flow.solver)
    for steps in settings.flow.num_inference_steps:
        time_grid(steps)
    for temperature in settings.vq.temperature:
        token_choice(temperature, settings.vq.top_k, settings.vq.top_p, torch.Generator(), 1)
    for part in (settings.flow, settings.vq):
        check_guidance_scale(part.guidance_scale)


def _pipelines(settings: CompareSettings) -> dict[str, JanusFlowPipeline]:
    options: dict[str, Any] = {
        "torch_dtype": getattr(torch, settings.dtype),
        "device": settings.device,
    }
    flow = JanusFlowPipeline.from_pretrained(settings.flow_model, vae=settings.vae, **options)
    flow.model.require_head("flow")
    vq = flow
    if settings.vq_model != settings.flow_model:
        vq = JanusFlowPipeline.from_pretrained(settings.vq_model, vae=None, **options)
    vq.model.require_head("vq")
    for pipe in (flow, vq):
        pipe.set_progress_bar_config(disable=True)
    return {"flow": flow, "vq": vq}


def _pictures(settings: PictureSettings, size: int, start: int, stop: int) -> Tensor:
    """Pictures `start` to `stop`, float32 (N, 3, H, W) in [0, 1]."""
    if settings.source == SHAPES:
        pictures = [
            draw(sample_scene(np.random.default_rng([settings.seed, 0xC0DE, index])), size)
            for index in range(start, stop)
        ]
    else:
        files = picture_files(settings.source, "pictures.source")[start:stop]
        pictures = [read_square(file, size) for file in files]
    return as_tensor(pictures)


class _Work:
    """Computes the pieces of a comparison."""

    def __init__(
        self,
        settings: CompareSettings,
        units: Units,
        pipes: dict[str, JanusFlowPipeline],
        prompts: list[str],
        requests: Sequence[Request] | None,
        extractor: FeatureExtractor,
        size: int,
    ) -> None:
        self.settings = settings
        self.units = units
        self.pipes = pipes
        self.prompts = prompts
        self.requests = requests
        self.extractor = extractor
        self.size = size
        self.variants = variants(settings)

    def chunks(self, num: int) -> list[tuple[int, int]]:
        """First and last picture of every piece."""
        step = self.settings.batch_size
        return [(start, min(start + step, num)) for start in range(0, num, step)]

    def reconstruct(self, bar: tqdm) -> Arrays:
        """Pictures, what both autoencoders make of them, and measures of that."""
        num = self.settings.pictures.num
        if self.settings.pictures.source != SHAPES:
            num = min(num, len(picture_files(self.settings.pictures.source, "pictures.source")))
        parts = []
        for start, stop in self.chunks(num):
            parts.append(
                self.units.arrays(
                    f"reconstructions-{start:05d}", partial(self._reconstruct, start, stop)
                )
            )
            bar.update()
        return _joined(parts)

    @torch.no_grad()
    def _reconstruct(self, start: int, stop: int) -> Arrays:
        originals = _pictures(self.settings.pictures, self.size, start, stop)
        found = {
            "originals": _channels_last(originals),
            "originals.features": self.extractor.extract(originals),
        }
        for head, pipe in self.pipes.items():
            pixels = (2 * originals - 1).to(pipe.device, pipe.model.dtype)
            if head == "flow":
                assert pipe.vae is not None
                decoded = decode(pipe.vae, encode(pipe.vae, pixels))
            else:
                decoded = pipe.model.vq_head.decode(pipe.model.vq_head.encode(pixels))
            shown = _rounded(decoded / 2 + 0.5)
            found[head] = _channels_last(shown)
            found[f"{head}.features"] = self.extractor.extract(shown)
            found[f"{head}.psnr"] = psnr(found["originals"], found[head])
            found[f"{head}.ssim"] = ssim(found["originals"], found[head])
        return found

    def draw(self, variant: Variant, bar: tqdm) -> Arrays:
        """Pictures of all prompts, their features and scores."""
        parts = []
        for start, stop in self.chunks(len(self.prompts)):
            parts.append(
                self.units.arrays(
                    f"{variant.name}-{start:05d}", partial(self._draw, variant, start, stop)
                )
            )
            bar.update()
        return _joined(parts)

    def _draw(self, variant: Variant, start: int, stop: int) -> Arrays:
        out = self.pipes[variant.head](
            self.prompts[start:stop],
            head=variant.head,
            seed=self.settings.prompts.seed + start,
            output_type="pt",
            **variant.options,
        )
        shown = _rounded(out.images)
        found = {"pictures": _channels_last(shown), "features": self.extractor.extract(shown)}
        if self.requests is not None:
            pictures = [Image.fromarray(one) for one in _uint8(found["pictures"])]
            pairs = zip(pictures, self.requests[start:stop], strict=True)
            found["hits"] = np.array([fulfils(picture, asked) for picture, asked in pairs])
        return found

    def cost(self, variant: Variant, bar: tqdm) -> tuple[Row, Row]:
        """What one picture takes: counted, which is the same everywhere, and measured here."""
        counted = self.units.values(f"{variant.name}-counted", partial(self._count, variant))
        bar.update()
        measured = self.units.values(f"{variant.name}-measured", partial(self._measure, variant))
        bar.update()
        return counted, measured

    def _count(self, variant: Variant) -> Row:
        with FlopCounterMode(display=False) as counter:
            out = self._one(variant)
        parameters = sum(p.numel() for p in self._parts(variant))
        return {
            "nfe": out.nfe,
            "sequential_depth": out.nfe,
            "forward_passes": out.num_forward_passes,
            "gflops": round(counter.get_total_flops() / 1e9, 6),
            "parameters": parameters,
        }

    def _parts(self, variant: Variant) -> Iterator[Tensor]:
        """Weights that drawing uses."""
        pipe = self.pipes[variant.head]
        yield from pipe.model.language_model.parameters()
        if variant.head == "vq":
            yield from pipe.model.vq_head.parameters()
        else:
            assert pipe.vae is not None
            yield from pipe.model.flow_head.parameters()
            yield from pipe.vae.parameters()

    def _measure(self, variant: Variant) -> Row:
        self._one(variant)  # the first call sets things up
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            self._one(variant)
            seconds.append(time.perf_counter() - began)
        return {
            "seconds_a_picture": round(sorted(seconds)[1], 4),
            "peak_memory_mb": round(self._peak_bytes(variant) / 2**20, 1),
        }

    def _peak_bytes(self, variant: Variant) -> int:
        """The most bytes of tensors that drawing a picture holds besides the weights."""
        device = self.pipes[variant.head].device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            self._one(variant)
            return torch.cuda.max_memory_allocated(device) - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            self._one(variant)
        assert found.profiler is not None
        assert found.profiler.kineto_results is not None
        events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
        live = most = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            live += event.nbytes()
            most = max(most, live)
        return most

    def _one(self, variant: Variant) -> Any:
        return self.pipes[variant.head](
            self.prompts[0], head=variant.head, seed=0, output_type="pt", **variant.options
        )


def _rounded(pictures: Tensor) -> Tensor:
    """Pictures in [0, 1] as 8 bits a channel hold them."""
    return (255 * pictures.clamp(0, 1)).round() / 255


def _channels_last(pictures: Tensor) -> np.ndarray:
    return pictures.permute(0, 2, 3, 1).contiguous().numpy()


def _uint8(pictures: np.ndarray) -> np.ndarray:
    return (255 * pictures).round().astype(np.uint8)


def _joined(parts: Sequence[Arrays]) -> Arrays:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _measure(name: str, num: int, statistic: Any, settings: CompareSettings) -> Row:
    """A value with the ends of its interval, as three columns."""
    basic = name == "frechet"
    value, low, high = bootstrap(num, statistic, resamples=settings.resamples, basic=basic)
    return {
        name: round(value, 4),
        f"{name}_low": round(low, 4),
        f"{name}_high": round(high, 4),
    }


def _mean_of(values: np.ndarray) -> Any:
    return lambda indices: float(values[indices].mean())


def _distance_to(features: np.ndarray, reference: np.ndarray) -> Any:
    return lambda indices: frechet_distance(features[indices], reference)


def _tokenizer_rows(parts: Arrays, settings: CompareSettings) -> list[Row]:
    rows = []
    for head in ("flow", "vq"):
        num = len(parts[head])
        row: Row = {"autoencoder": "KL (flow)" if head == "flow" else "VQ", "pictures": num}
        for name in ("psnr", "ssim"):
            row |= _measure(name, num, _mean_of(parts[f"{head}.{name}"]), settings)
        distance = _distance_to(parts[f"{head}.features"], parts["originals.features"])
        row |= _measure("frechet", num, distance, settings)
        rows.append(row | _bias(num, parts["originals.features"]))
    return rows


def _generation_rows(
    drawn: dict[str, Arrays],
    parts: Arrays,
    requests: Sequence[Request] | None,
    settings: CompareSettings,
) -> list[Row]:
    rows = []
    kinds = None if requests is None else np.array([request.kind for request in requests])
    reference = parts["originals.features"]
    for name, arrays in drawn.items():
        num = len(arrays["pictures"])
        row: Row = {"variant": name, "pictures": num}
        if kinds is not None:
            hits = arrays["hits"].astype(float)
            row |= _measure("score", num, _mean_of(hits), settings)
            row |= {kind: round(float(hits[kinds == kind].mean()), 4) for kind in sorted({*kinds})}
        row |= _measure("frechet", num, _distance_to(arrays["features"], reference), settings)
        rows.append(row | _bias(num, reference))
    return rows


def _bias(num: int, features: np.ndarray) -> Row:
    """Whether there are too few pictures for a Fréchet distance without a bias."""
    return {"frechet_biased": "yes" if num < 10 * features.shape[1] else "no"}
