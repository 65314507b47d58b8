"""From a sample of the data to a span of a row: ids, pixels, what is to be drawn.

Axes: n points of a picture's path, C latent channels, h w latent cells, N image tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from janusflow.data.packing import Span, conversation_span, drawing_span
from janusflow.data.samples import BrokenSample, Sample
from janusflow.data.transforms import short_side_crop
from janusflow.errors import PromptError, SettingsError
from janusflow.flow.timesteps import logit_normal, uniform
from janusflow.processing.processor import JanusFlowProcessor
from janusflow.training.cached import Encode


@dataclass(frozen=True)
class DrawingSettings:
    """How the heads learn to draw."""

    heads: list[str] = field(default_factory=lambda: ["flow"])
    """"flow", "vq" or both; the model must hold them."""
    noises_per_picture: int = 1
    """Points of the path that a picture is trained at; they share the prompt's tokens."""
    condition_dropout_prob: float = 0.1
    timesteps: str = "logit-normal"
    """Density of t: "logit-normal" or "uniform"."""
    mean: float = 0.0
    """Of the logit-normal density."""
    std: float = 1.0
    """Of the logit-normal density."""
    flow_weight: float = 1.0
    vq_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.timesteps not in ("logit-normal", "uniform"):
            raise SettingsError(
                f"drawing.timesteps is 'logit-normal' or 'uniform', not {self.timesteps!r}"
            )
        if not self.heads or set(self.heads) - {"flow", "vq"}:
            raise SettingsError(f"drawing.heads names 'flow', 'vq' or both, not {self.heads}")
        if self.noises_per_picture < 1:
            raise SettingsError("drawing.noises_per_picture is at least 1")
        if not 0 <= self.condition_dropout_prob < 1:
            raise SettingsError("drawing.condition_dropout_prob is in [0, 1)")


@dataclass(frozen=True)
class Encoders:
    """The frozen networks that pictures to draw go through; None where nothing needs one.

    Attributes:
        latents: Pixels (1, 3, H, W) in [-1, 1] to scaled latents (1, C, h, w).
        tokens: Pixels to tokens of the VQ head, (1, N).
        looked_at: Pixels to what the understanding encoder takes, (1, 3, S, S).
    """

    latents: Encode | None = None
    tokens: Encode | None = None
    looked_at: Encode | None = None


class SpanMaker:
    """Makes spans with a model's processor.

    Args:
        processor: Of the model.
        settings: Of drawing.
        encoders: Of pictures to draw.
        image_size: Side of pictures to draw, in pixels.
        flow_tokens: Of a picture of the flow head, the time token among them.
        longest: The most tokens of a span.
    """

    def __init__(
        self,
        processor: JanusFlowProcessor,
        settings: DrawingSettings,
        encoders: Encoders,
        *,
        image_size: int,
        flow_tokens: int,
        longest: int,
    ) -> None:
        self.processor = processor
        self.settings = settings
        self.encoders = encoders
        self.image_size = image_size
        self.flow_tokens = flow_tokens
        self.longest = longest

    def __call__(self, sample: Sample) -> Span:
        """The span of a sample; what is random in it comes from `sample.rng()`.

        Raises:
            BrokenSample: If nothing can be learned from its text, or it is too long for a row.
        """
        try:
            make = self._drawing if sample.kind == "generation" else self._conversation
            span = make(sample)
        except PromptError as error:
            raise BrokenSample("unfit text", str(error)) from None
        if len(span) > self.longest:
            raise BrokenSample("too long", f"{len(span)} tokens; {self.longest} fit into a row")
        return span

    def _conversation(self, sample: Sample) -> Span:
        ids, labels, images = self.processor.training_row(sample.messages)
        pixels = self.processor.image_processor(list(images)) if images else None
        return conversation_span(ids, labels, pixels)

    @torch.no_grad()
    def _drawing(self, sample: Sample) -> Span:
        rng, processor = sample.rng(), self.processor
        drawn = self._drawn(sample, rng)
        ids, _ = processor.generation_prompts([sample.prompt])
        return drawing_span(
            ids[0].tolist(),
            drawn,
            pad_token_id=processor.pad_token_id,
            vq_tag_id=processor.begin_of_image_id,
            flow_tokens=self.flow_tokens if "t" in drawn else 0,
            noises=self.settings.noises_per_picture,
            vq_tokens=drawn["image_tokens"].shape[1] if "image_tokens" in drawn else 0,
            dropped=rng.random() < self.settings.condition_dropout_prob,
        )

    def _drawn(self, sample: Sample, rng: np.random.Generator) -> dict[str, Tensor]:
        """What the heads learn to draw, by name."""
        encoders = self.encoders
        if sample.ends is not None:
            x_0, x_1 = sample.ends
            drawn = self._path(x_1, rng)
            return {**drawn, "x_0": x_0.expand_as(drawn["x_0"])}
        assert sample.image is not None
        pixels = short_side_crop(sample.image, self.image_size, rng)[None]
        drawn = {}
        if encoders.latents is not None:
            drawn |= self._path(encoders.latents(pixels), rng)
        if encoders.looked_at is not None:
            drawn["clean_pixels"] = encoders.looked_at(pixels)
        if encoders.tokens is not None:
            drawn["image_tokens"] = encoders.tokens(pixels).long()
        return drawn

    def _path(self, x_1: Tensor, rng: np.random.Generator) -> dict[str, Tensor]:
        """Noise and times, (n, …), and the latents that many times."""
        settings = self.settings
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        num = settings.noises_per_picture
        if settings.timesteps == "uniform":
            t = uniform(num, generator=generator)
        else:
            t = logit_normal(num, mean=settings.mean, std=settings.std, generator=generator)
        x_0 = torch.randn((num, *x_1.shape[1:]), generator=generator)
        return {"x_0": x_0, "x_1": x_1.float().expand_as(x_0), "t": t}
