"""What a run leaves behind: pictures that show how training goes, and the finished pipeline."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from janusflow.pipeline import JanusFlowPipeline


@dataclass(frozen=True)
class PreviewSettings:
    """What is drawn to show how training goes."""

    prompts: list[str] = field(default_factory=list)
    shapes: int = 0
    """Held-out prompts of the shapes world to score; 0 for models of other worlds."""


def preview_pictures(
    pipe: JanusFlowPipeline, folder: Path, settings: PreviewSettings, head: str, **options: Any
) -> dict[str, float]:
    """Draws by a head: `preview-HEAD.png` in the folder, and a figure where shapes are scored.

    Args:
        pipe: The pipeline that draws.
        folder: Exists.
        settings: What is drawn.
        head: "flow" or "vq".
        **options: Passed to the pipeline, such as `num_inference_steps`.
    """
    from janusflow.evaluation.shapes import score_pictures, write_sheet

    if settings.prompts:
        drawn = pipe(settings.prompts, head=head, seed=0, **options).images
        write_sheet(folder / f"preview-{head}.png", drawn)
    if not settings.shapes:
        return {}
    scores = score_pictures(pipe, num=settings.shapes, head=head, **options)
    return {f"shapes_{head}": scores["overall"]}


def export_pipeline(pipe: JanusFlowPipeline, folder: Path) -> None:
    """Saves a whole pipeline in bfloat16; it is in float32 afterwards."""
    if pipe.vae is not None:
        pipe.vae.register_to_config(_name_or_path="")  # else the folder it was loaded from
    pipe.to(torch.bfloat16).save_pretrained(folder)
    pipe.to(torch.float32)
