"""A stage of JanusFlow's training on one's own data: looking, drawing and talking in packed rows.

`L_AR` on answers, `L_RF + L_REPA` for pictures of the flow head, the cross-entropy of tokens for
those of the VQ head (arXiv 2411.07975, 2410.13848). A stage is what is trained, at which rate, on
which mixture of data; the published ones are in `configs/train/janusflow-1.3b/`. Axes: B rows, S
tokens of a row, G points of pictures' paths, N image tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from janusflow.data.mixture import DataSettings, open_sources
from janusflow.data.packing import Packer, Span
from janusflow.data.sources import Source
from janusflow.data.sources.pairs import PairsSource
from janusflow.data.stream import SampleStream
from janusflow.errors import SettingsError
from janusflow.evaluation.features import module_hash
from janusflow.flow.path import interpolate, velocity_target
from janusflow.models.autoencoder import encode
from janusflow.models.checkpoints import resolve_model_folder, weights_hash
from janusflow.models.flow_head import FlowTokens
from janusflow.models.modeling import JanusFlowForConditionalGeneration
from janusflow.pipeline import JanusFlowPipeline
from janusflow.processing.processor import IGNORED
from janusflow.training.alignment import AlignmentHead, AlignmentSettings, alignment_loss
from janusflow.training.cached import Cached, Encode
from janusflow.training.loop import LoopSettings
from janusflow.training.lora import LoraSettings, add_adapters, merged_weights
from janusflow.training.losses import image_token_loss, rectified_flow_loss
from janusflow.training.objective import StreamObjective
from janusflow.training.outcomes import PreviewSettings, export_pipeline, preview_pictures
from janusflow.training.packed import PackedStates, packed_states
from janusflow.training.spans import DrawingSettings, Encoders, SpanMaker

TRAINABLE = {
    "language_model": ("language_model",),
    "vision_model": ("vision_model",),
    "aligner": ("aligner", "begin_embedding"),
    "flow_head": ("flow_head",),
    "vq_head": ("vq_head.embeddings", "vq_head.aligner", "vq_head.head"),
}
"""What a stage may train, by modules of the model. The autoencoder and the VQ head's tokenizer of
pictures are frozen always."""


@dataclass(frozen=True)
class PackingSettings:
    """Rows of the language model."""

    length: int = 4096
    """Tokens of a row."""
    rows: int = 1
    """Rows of a part of a step; a step has `loop.microbatches` parts."""

    def __post_init__(self) -> None:
        if self.length < 2 or self.rows < 1:
            raise SettingsError("packing.length is at least 2 and packing.rows at least 1")


@dataclass(frozen=True)
class ValidationSettings:
    """Losses on data that is held out."""

    data: DataSettings = field(default_factory=DataSettings)
    parts: int = 4
    """Parts of packed rows, the same every time."""
    buckets: int = 5
    """Equal intervals of t that the flow head's loss is given for."""


@dataclass(frozen=True)
class StagePreviewSettings(PreviewSettings):
    """Pictures that show how training goes, drawn with guidance."""

    num_inference_steps: int = 30
    guidance_scale: float | None = None
    """The head's own when not given."""


@dataclass(frozen=True)
class StageSettings:
    """A stage."""

    task: str = "stage"
    output_dir: str = "runs/stage"
    model: str = "tiny"
    """What it starts from: a folder or hub id in any layout, such as an earlier stage's `final`."""
    vae: str = "default"
    """See `JanusFlowPipeline.from_pretrained`."""
    trained: list[str] = field(default_factory=lambda: ["aligner", "flow_head"])
    """Names of `TRAINABLE`; may be empty where there are adapters."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    data: DataSettings = field(default_factory=DataSettings)
    packing: PackingSettings = field(default_factory=PackingSettings)
    drawing: DrawingSettings = field(default_factory=DrawingSettings)
    alignment: AlignmentSettings = field(default_factory=AlignmentSettings)
    answer_weight: float = 1.0
    cache: str | None = None
    """Folder for what the frozen autoencoder and tokenizer make of pictures to draw."""
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    preview: StagePreviewSettings = field(default_factory=StagePreviewSettings)
    loop: LoopSettings = field(default_factory=LoopSettings)

    def __post_init__(self) -> None:
        unknown = set(self.trained) - set(TRAINABLE)
        if unknown or not (self.trained or self.lora.rank):
            raise SettingsError(
                f"trained is {self.trained}; it names one or more of {', '.join(TRAINABLE)}"
            )


class PackedStream:
    """Packed rows from a stream; a span that does not fit any more begins the next ones."""

    def __init__(self, stream: SampleStream[Span], settings: PackingSettings, pad: int) -> None:
        self.stream = stream
        self.settings = settings
        self.pad = pad
        self._state = stream.state_dict()
        self._left: Span | None = None

    def next(self, step: int) -> dict[str, Tensor]:
        """See `Packer.rows`."""
        packer = Packer(self.settings.rows, self.settings.length)
        span = self._draw(step) if self._left is None else self._left
        while packer.add(span):
            span = self._draw(step)
        self._left = span
        return packer.rows(self.pad)

    def _draw(self, step: int) -> Span:
        self._state = self.stream.state_dict()
        return self.stream.next(step)

    def state_dict(self) -> dict[str, Any]:
        """Of the stream before the span that was left over, which is drawn again."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state."""
        self._state, self._left = state, None
        self.stream.load_state_dict(state)


class StageObjective(StreamObjective):
    """The model with the losses of a stage."""

    free_settings = ("validation", "preview", "cache")

    def __init__(self, settings: StageSettings) -> None:
        super().__init__()
        self.settings = settings
        self._pipe = JanusFlowPipeline.from_pretrained(settings.model, vae=settings.vae)
        self._pipe.set_progress_bar_config(disable=True)
        self.model = self._pipe.model
        for head in settings.drawing.heads:
            self.model.require_head(head)
        if "flow" in settings.drawing.heads and self._pipe.vae is None:
            raise SettingsError(f"{settings.model} has no autoencoder; name one by vae")
        choose_trained(self.model, settings.trained, TRAINABLE, settings.model)
        torch.manual_seed(settings.loop.seed)
        if settings.lora.rank:
            add_adapters(self.model, settings.lora)
        self.alignment = _alignment_head(self.model, settings)
        self._sources = open_sources(settings.data)
        if self.alignment is not None and any(isinstance(s, PairsSource) for s in self._sources):
            raise SettingsError("pairs hold no picture to align with; set alignment.weight to 0")
        threads = settings.data.threads
        self._threads = ThreadPoolExecutor(threads) if threads else None
        self.train()

    # Data

    def batch(self, step: int, part: int = 0) -> dict[str, Tensor]:
        """Rows of a part, from its stream."""
        return self.stream(part).next(step)

    def open_stream(self, part: int) -> PackedStream:
        """Of packed rows."""
        return self._open_rows(self._sources, self.settings.data, part)

    def whole_modules(self) -> list[nn.Module]:
        """The VQ head's tokenizer, which makes the tokens of pictures to draw."""
        return [self.model.vq_head.tokenizer] if "vq" in self.settings.drawing.heads else []

    def _open_rows(
        self, sources: list[Source], data: DataSettings, part: int, **drawing: Any
    ) -> PackedStream:
        settings, vae = self.settings, self._pipe.vae
        if vae is not None:
            vae.to(self.model.device)  # it is no module of ours: nobody else takes it along
        stream = SampleStream(
            sources,
            data.mixture,
            settings.loop.seed,
            part,
            settings.loop.microbatches,
            prepare=self._span_maker(**drawing),
            executor=self._threads,
            ahead=data.ahead,
            skip_log=Path(settings.output_dir) / "skipped.jsonl",
        )
        return PackedStream(stream, settings.packing, self._pipe.processor.pad_token_id)

    def _span_maker(self, **drawing: Any) -> SpanMaker:
        settings, model = self.settings, self.model
        heads, vae = settings.drawing.heads, self._pipe.vae
        latents = tokens = None
        flow_tokens = image_size = 0
        if "vq" in heads:
            tokens = self._cached(_tokens_by(model), "image-tokens", model.vq_head.tokenizer)
            image_size = model.vq_head.image_size
        if "flow" in heads:
            assert vae is not None
            latents = self._cached(lambda pixels: encode(vae, pixels).half().cpu(), "latents", vae)
            flow_tokens = 1 + model.flow_config.num_image_tokens
            image_size = model.flow_config.image_size
        return SpanMaker(
            self._pipe.processor,
            replace(settings.drawing, **drawing),
            Encoders(latents, tokens, None if self.alignment is None else self._looked_at),
            image_size=image_size,
            flow_tokens=flow_tokens,
            longest=settings.packing.length,
        )

    def _cached(self, encode: Encode, name: str, network: nn.Module) -> Encode:
        if self.settings.cache is None:
            return encode
        return Cached(encode, Path(self.settings.cache) / name, module_hash(network))

    def _looked_at(self, pixels: Tensor) -> Tensor:
        """Pixels (1, 3, H, W) in [-1, 1] as the understanding encoder takes them."""
        shown = (255 * (pixels[0] / 2 + 0.5)).round().byte().permute(1, 2, 0).numpy()
        return self._pipe.processor.image_processor([Image.fromarray(shown)])

    # Losses

    def forward(self, **rows: Tensor) -> dict[str, Tensor]:
        """Losses of answers, of drawing by either head, and of alignment.

        A loss of what no sample of the rows has is 0; its weights take part all the same. The
        layers are called in one order whatever the rows hold, as processes with shards of them
        have to: the vision tower, the language model, the vision tower again for alignment.
        """
        settings, model = self.settings, self.model
        flow = None
        if "x_1" in rows:
            x_t = interpolate(rows["x_0"], rows["x_1"], rows["t"])
            flow = model.flow_head.tokens(x_t, rows["t"])
        states = packed_states(
            model,
            rows,
            flow=flow,
            image_tokens=rows.get("image_tokens"),
            idle=self._idle(rows),
            inner_layer=None if self.alignment is None else settings.alignment.layer,
        )
        answer = answer_loss(model.get_output_embeddings(), states.last, rows["labels"])
        losses = {"answer": settings.answer_weight * answer}
        if "flow" in settings.drawing.heads:
            losses |= self._flow_losses(rows, flow, states)
        if "vq" in settings.drawing.heads:
            losses["vq"] = settings.drawing.vq_weight * self._vq_loss(rows, states)
        return losses

    def _flow_losses(
        self, rows: dict[str, Tensor], flow: FlowTokens | None, states: PackedStates
    ) -> dict[str, Tensor]:
        settings, head = self.settings, self.model.flow_head
        if flow is None:
            idle = self._blank_tokens()
            loss = 0 * head.velocity(idle.embeddings, idle).sum()
            inner: Tensor | None = idle.embeddings[:, 1:]
        else:
            velocity = head.velocity(states.flow, flow)
            loss = rectified_flow_loss(velocity, rows["x_0"], rows["x_1"])
            inner = states.inner
        losses = {"flow": settings.drawing.flow_weight * loss}
        if self.alignment is not None:
            assert inner is not None
            predicted = self.alignment(inner)
            with torch.no_grad():
                clean = self._blank_picture() if flow is None else rows["clean_pixels"]
                features = self.model.vision_model(clean).last_hidden_state
            noises = len(predicted) // len(features)
            loss = alignment_loss(predicted, features.repeat_interleave(noises, dim=0))
            losses["alignment"] = settings.alignment.weight * (0 * loss if flow is None else loss)
        return losses

    def _vq_loss(self, rows: dict[str, Tensor], states: PackedStates) -> Tensor:
        head = self.model.vq_head
        if "image_tokens" in rows:
            return image_token_loss(head.logits(states.vq), rows["image_tokens"])
        return 0 * head.logits(states.last[:, :1]).sum()

    # What rows lack

    def _idle(self, rows: dict[str, Tensor]) -> Tensor:
        """0, by way of every encoder that the rows have no input for.

        The language model reads it, so that what needs a gradient, and in which order backward
        gets there, is the same for all rows.
        """
        model, heads = self.model, self.settings.drawing.heads
        outputs = []
        if "pixel_values" not in rows:
            outputs.append(model.get_image_features(self._blank_picture()))
            if model.config.learned_begin_embedding:
                outputs.append(model.begin_embedding)
        if "flow" in heads and "x_1" not in rows:
            outputs.append(self._blank_tokens().embeddings)
        if "vq" in heads and "image_tokens" not in rows:
            outputs.append(model.vq_head.embed(rows["ids"].new_zeros(1, 1)))
        idle = torch.zeros((), device=rows["ids"].device)
        return idle + sum(0 * output.sum() for output in outputs)

    def _blank_picture(self) -> Tensor:
        size = self.model.config.vision_config.image_size
        return torch.zeros(1, 3, size, size, device=self.model.device)

    def _blank_tokens(self) -> FlowTokens:
        head = self.model.flow_head
        side = head.config.latent_size
        blank = torch.zeros(1, head.config.latent_channels, side, side, device=self.model.device)
        return head.tokens(blank, blank.new_zeros(1))

    # Hooks of the loop

    def work(self, batch: dict[str, Tensor]) -> dict[str, int]:
        """Tokens that are no padding, and pictures looked at or drawn."""
        drawn = len(batch["t"]) if "t" in batch else len(batch.get("image_tokens", ()))
        return {
            "tokens": int((batch["samples"] > 0).sum()),
            "images": len(batch.get("pixel_values", ())) + drawn,
        }

    def sources(self) -> dict[str, str]:
        """The model that the stage starts from, and the data."""
        where = self.settings.model
        found = {"model": f"{where}, weights {weights_hash(resolve_model_folder(where))[:12]}"}
        for source in self._sources:
            found[f"data {source.name}"] = f"{len(source):,} samples for {source.kind}"
        return found

    def enable_gradient_checkpointing(self) -> None:
        """Of the language model's and the vision tower's layers."""
        self.model.gradient_checkpointing_enable({"use_reentrant": False})

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean losses on held-out data, that of the flow head by interval of t, too."""
        settings = self.settings.validation
        if not settings.data.sources:
            return {}
        rows = self._open_rows(
            open_sources(settings.data),
            settings.data,
            part=0,
            noises_per_picture=settings.buckets,
            condition_dropout_prob=0.0,
        )
        middles = (torch.arange(settings.buckets) + 0.5) / settings.buckets
        sums: defaultdict[str, float] = defaultdict(float)
        for _ in range(settings.parts):
            batch = rows.next(0)
            if "t" in batch:
                batch["t"] = middles.repeat(len(batch["t"]) // settings.buckets)
            batch = {name: held.to(self.model.device) for name, held in batch.items()}
            for name, loss in self(**batch).items():
                sums[f"valid_{name}"] += float(loss)
            for t, loss in zip(middles.tolist(), self._losses_by_time(batch), strict=False):
                sums[f"valid_flow_t{t:.2f}"] += loss
        return {name: round(total / settings.parts, 5) for name, total in sums.items()}

    def _losses_by_time(self, batch: dict[str, Tensor]) -> list[float]:
        """Mean loss of each of the times that all pictures are seen at."""
        if "t" not in batch:
            return []
        tokens = self.model.flow_head.tokens(
            interpolate(batch["x_0"], batch["x_1"], batch["t"]), batch["t"]
        )
        states = packed_states(
            self.model, batch, flow=tokens, image_tokens=batch.get("image_tokens")
        )
        velocity = self.model.flow_head.velocity(states.flow, tokens)
        errors = (velocity - velocity_target(batch["x_0"], batch["x_1"])).square().flatten(1)
        return errors.mean(1).view(-1, self.settings.validation.buckets).mean(0).tolist()

    def preview(self, step: int, folder: Path) -> dict[str, float]:
        """Sheets of pictures drawn with guidance, and scores on the shapes world."""
        settings = self.settings.preview
        figures: dict[str, float] = {}
        for head in self.settings.drawing.heads:
            figures |= preview_pictures(
                self._pipe,
                folder,
                settings,
                head,
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale,
            )
        return figures

    def export(self, folder: Path) -> None:
        """Saves the whole pipeline in bfloat16, adapters merged in."""
        pipe = self._pipe
        if self.settings.lora.rank:
            model = JanusFlowForConditionalGeneration(self.model.config)
            model.load_state_dict(merged_weights(self.model))
            pipe = JanusFlowPipeline(model=model, vae=pipe.vae, processor=pipe.processor)
        export_pipeline(pipe, folder)


def answer_loss(head: nn.Module, states: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the labels that follow each place; 0 where there is none.

    Logits are made where they are needed only: most places of a row are no part of an answer.

    Args:
        head: Over the vocabulary.
        states: (B, S, E).
        labels: (B, S), `IGNORED` where no loss is taken.
    """
    wanted = labels[:, 1:] != IGNORED
    logits = head(states[:, :-1][wanted]).float()
    total = nn.functional.cross_entropy(logits, labels[:, 1:][wanted], reduction="sum")
    return total / wanted.sum().clamp(min=1)


def choose_trained(
    model: JanusFlowForConditionalGeneration,
    trained: Sequence[str],
    parts: Mapping[str, Sequence[str]],
    source: str,
) -> None:
    """Freezes all weights but those of the modules that `trained` names in `parts`.

    Args:
        model: The model.
        trained: Names of `parts`.
        parts: Modules by name.
        source: Where the model comes from, for the error.

    Raises:
        SettingsError: If the model has nothing of that name.
    """
    model.requires_grad_(False)
    for name in trained:
        chosen = [
            weight
            for key, weight in model.named_parameters()
            if any(key == part or key.startswith(f"{part}.") for part in parts[name])
        ]
        if not chosen:
            raise SettingsError(f"trained names {name!r}, and {source} has no such part")
        for weight in chosen:
            weight.requires_grad_(True)


def _alignment_head(
    model: JanusFlowForConditionalGeneration, settings: StageSettings
) -> AlignmentHead | None:
    if not settings.alignment.weight or "flow" not in settings.drawing.heads:
        return None
    config: Any = model.config
    layers = config.text_config.num_hidden_layers
    if settings.alignment.layer > layers:
        raise SettingsError(
            f"alignment.layer is {settings.alignment.layer}, and the language model has {layers}"
        )
    return AlignmentHead(
        config.text_config.hidden_size, config.vision_config.hidden_size, settings.alignment.width
    )


def _tokens_by(model: JanusFlowForConditionalGeneration) -> Encode:
    """Makes tokens of the VQ head, int32 (1, N), of pixels."""

    def encode(pixels: Tensor) -> Tensor:
        return model.vq_head.encode(pixels.to(model.device)).int().cpu()

    return encode
