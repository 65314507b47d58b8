"""Distillation of many steps into few: a solver's path in a handful of steps, trained end to end.

Gradients go through all steps of a guided run, so that it ends where the many steps of `task:
pairs` did. Elsewhere the velocities are held where they were, so that more steps, and other ways of
drawing, stay as good. Axes: B pairs, L prompt tokens, C latent channels, h w latent cells.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from janusflow.data.mixture import DataSettings, open_sources
from janusflow.data.samples import Sample
from janusflow.data.sources.pairs import PairsSource
from janusflow.data.stream import SampleStream
from janusflow.errors import SettingsError
from janusflow.files import write_json
from janusflow.flow.guidance import Guidance
from janusflow.flow.path import interpolate
from janusflow.flow.solvers import make_solver, solve
from janusflow.flow.timesteps import time_grid
from janusflow.models.checkpoints import describe, training_record
from janusflow.models.guided_field import GuidedField
from janusflow.models.modeling import JanusFlowForConditionalGeneration
from janusflow.pipeline import JanusFlowPipeline
from janusflow.training.loop import LoopSettings
from janusflow.training.objective import StreamObjective
from janusflow.training.outcomes import PreviewSettings, export_pipeline, preview_pictures
from janusflow.training.stage import choose_trained

TRAINABLE = {
    "language_model": ("language_model.model.layers", "language_model.model.norm"),
    "flow_head": ("flow_head",),
}
"""What is trained, by modules of the model: those between the noise and its velocity."""


@dataclass(frozen=True)
class DistillationSettings:
    """A way of drawing in few steps, and the pairs that it is to reach."""

    task: str = "distillation"
    output_dir: str = "runs/distillation"
    model: str = "tiny"
    vae: str = "default"
    """See `JanusFlowPipeline.from_pretrained`."""
    trained: list[str] = field(default_factory=lambda: ["language_model", "flow_head"])
    """Names of `TRAINABLE`. The flow head alone leaves the VQ head and answers as they are."""
    data: DataSettings = field(default_factory=DataSettings)
    """Pairs that the same model made by many steps."""
    num_inference_steps: int = 6
    solver: str = "unipc"
    shift: float = 1.0
    guidance_scale: float | None = None
    """The model's own when not given."""
    batch_size: int = 24
    saturation: float = 0.05
    """A pair's mean squared error e counts as e / (e + saturation): a picture that comes out as
    another one altogether, which no small change mends, is one miss and no more."""
    held_weight: float = 6.0
    """Of the mean squared change of velocities on the straight path between the ends of a pair."""
    preview: PreviewSettings = field(default_factory=PreviewSettings)
    loop: LoopSettings = field(default_factory=LoopSettings)

    def __post_init__(self) -> None:
        unknown = set(self.trained) - set(TRAINABLE)
        if unknown or not self.trained:
            raise SettingsError(
                f"trained is {self.trained}; it names one or more of {', '.join(TRAINABLE)}"
            )
        if self.batch_size < 1:
            raise SettingsError(f"batch_size is at least 1, not {self.batch_size}")
        if not self.saturation > 0:
            raise SettingsError(f"saturation is above 0, not {self.saturation}")
        if not self.held_weight >= 0:
            raise SettingsError(f"held_weight is at least 0, not {self.held_weight}")


class _GradientLimit:
    """Keeps what comes back through each state of a pair as short as its gradient at the end.

    Near the border between two pictures the end depends on the state without measure; the gradient
    of such a pair would drown those of all others. Holds no graph, and nothing that does.
    """

    def at_end(self, ends: Tensor) -> None:
        """Notes the norms when the gradient arrives, ends (B, C, h, w)."""
        if ends.requires_grad:
            ends.register_hook(self._note)

    def at_step(self, x: Tensor) -> Tensor:
        """The state, with its gradient limited, (B, C, h, w)."""
        if not x.requires_grad:
            return x
        x = x.view_as(x)
        x.register_hook(self._limit)
        return x

    def _note(self, gradient: Tensor) -> None:
        self._norms = gradient.flatten(1).norm(dim=1)

    def _limit(self, gradient: Tensor) -> Tensor:
        norms = gradient.flatten(1).norm(dim=1)
        share = (self._norms / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp(max=1)
        return gradient * share.view(-1, 1, 1, 1)


class DistillationObjective(StreamObjective):
    """The model, how far from the pairs' pictures it ends, and how far its velocities moved."""

    can_be_sharded = False

    def __init__(self, settings: DistillationSettings) -> None:
        super().__init__()
        self.settings = settings
        solver = make_solver(settings.solver)
        if solver.adaptive or solver.draws_noise:
            raise SettingsError(
                f"solver is {settings.solver!r}, whose path is not the same in every run; take one "
                "of fixed steps and no noise, such as unipc, ab2 or euler"
            )
        self._times = time_grid(settings.num_inference_steps, shift=settings.shift)
        self._pairs = open_sources(settings.data)
        if not all(isinstance(source, PairsSource) for source in self._pairs):
            raise SettingsError(
                "distillation learns from pairs: make them with task pairs, and name their folder "
                "as a source of format pairs"
            )
        self._pipe = JanusFlowPipeline.from_pretrained(settings.model, vae=settings.vae)
        self._pipe.set_progress_bar_config(disable=True)
        self.model = self._pipe.model
        self.model.require_head("flow")
        choose_trained(self.model, settings.trained, TRAINABLE, settings.model)
        # As it was; no module of ours, so that checkpoints do without it.
        self._before = JanusFlowPipeline.from_pretrained(settings.model, vae=None)
        scale = settings.guidance_scale
        if scale is None:
            scale = self.model.config.drawing_defaults_of("flow")["guidance_scale"]
        self._guidance = Guidance(scale)

    # Data

    def batch(self, step: int, part: int = 0) -> dict[str, Tensor]:
        """Pairs of a part, and a time; prompts as token ids (B, L) with their mask."""
        stream, settings = self.stream(part), self.settings
        samples = [stream.next(step) for _ in range(settings.batch_size)]
        prompts = [sample.prompt for sample in samples]
        ids, mask = self._pipe.processor.generation_prompts(prompts, tag="flow")
        x_0, x_1 = zip(*(sample.ends for sample in samples), strict=True)
        rng = np.random.default_rng([settings.loop.seed, settings.loop.sample(step, part)])
        t = torch.tensor(rng.random(), dtype=torch.float32)
        return {"x_0": torch.cat(x_0), "x_1": torch.cat(x_1), "t": t, "ids": ids, "mask": mask}

    def open_stream(self, part: int) -> SampleStream[Sample]:
        """Of pairs."""
        data, loop = self.settings.data, self.settings.loop
        return SampleStream(self._pairs, data.mixture, loop.seed, part, loop.microbatches)

    # Losses

    def forward(  # type: ignore[override]
        self, *, x_0: Tensor, x_1: Tensor, t: Tensor, ids: Tensor, mask: Tensor
    ) -> dict[str, Tensor]:
        """How many pairs are missed, a near miss counting in part, and the change of velocities."""
        settings = self.settings
        field = self._field(self.model, ids, mask)
        limit = _GradientLimit()
        ends = solve(
            lambda x, t: field(limit.at_step(x), t), x_0, self._times, solver=settings.solver
        ).latents
        limit.at_end(ends)
        errors = (ends - x_1).square().flatten(1).mean(1)
        x_t = interpolate(x_0, x_1, t)
        with torch.no_grad():
            before = self._field(self._before.model.to(x_0.device), ids, mask)
            wanted = torch.cat(before.velocities(x_t, t))
        change = nn.functional.mse_loss(torch.cat(field.velocities(x_t, t)), wanted)
        return {
            "missed": (errors / (errors + settings.saturation)).mean(),
            "held": settings.held_weight * change,
        }

    def _field(
        self, model: JanusFlowForConditionalGeneration, ids: Tensor, mask: Tensor
    ) -> GuidedField:
        return GuidedField(model.velocity, model.encode_prompts("flow", ids, mask), self._guidance)

    # Hooks of the loop

    def work(self, batch: dict[str, Tensor]) -> dict[str, int]:
        """Pictures drawn."""
        return {"images": len(batch["x_0"])}

    def sources(self) -> dict[str, str]:
        """The model, how it is to draw, and the data."""
        settings = self.settings
        return {
            "model": f"{settings.model}, weights {describe(settings.model).weights_hash[:12]}",
            "drawing": f"{settings.num_inference_steps} steps of {settings.solver}, "
            f"shift {settings.shift:g}, guidance {self._guidance.scale:g}",
            **{f"data {pairs.name}": f"{len(pairs):,} pairs" for pairs in self._pairs},
        }

    def preview(self, step: int, folder: Path) -> dict[str, float]:
        """A sheet of pictures in few steps, and scores on the shapes world."""
        settings = self.settings
        return preview_pictures(
            self._pipe,
            folder,
            settings.preview,
            "flow",
            num_inference_steps=settings.num_inference_steps,
            solver=settings.solver,
            shift=settings.shift,
            guidance_scale=settings.guidance_scale,
        )

    def export(self, folder: Path) -> None:
        """Saves the whole pipeline in bfloat16, and adds itself to the model's record."""
        export_pipeline(self._pipe, folder)
        settings = self.settings
        record = training_record(settings.model)
        if record is not None:
            before = record.get("distillation", {"steps": 0})
            distillation = {
                "steps": before["steps"] + settings.loop.steps,
                "pairs_a_step": settings.batch_size * settings.loop.microbatches,
                "num_inference_steps": settings.num_inference_steps,
                "solver": settings.solver,
                "shift": settings.shift,
                "guidance_scale": self._guidance.scale,
            }
            write_json(folder / "model" / "training.json", {**record, "distillation": distillation})
