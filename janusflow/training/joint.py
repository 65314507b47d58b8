"""Joint training of drawing, by one head or both, and looking on the shapes world.

Each step takes captions with latents and tokens of pictures, and pictures with questions, in one
sum of losses: `L_RF + L_AR` (arXiv 2411.07975), and the cross-entropy of tokens for the VQ head.
Latents and tokens are made once by the frozen autoencoder and tokenizer, and kept on disk.
Axes: B batch, C latent channels.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from einops import rearrange
from torch import Tensor, nn

from janusflow.data.shapes.batches import ShapesBatches
from janusflow.data.shapes.scene import COLORS, SHAPES
from janusflow.errors import SettingsError
from janusflow.files import write_json
from janusflow.flow.path import interpolate
from janusflow.flow.timesteps import logit_normal, uniform
from janusflow.models.autoencoder import scale_factor
from janusflow.models.checkpoints import training_record
from janusflow.models.modeling import JanusFlowForConditionalGeneration
from janusflow.models.prefix import shared_prefix_mask
from janusflow.training.alignment import AlignmentHead, AlignmentSettings, alignment_loss
from janusflow.training.found_parts import find_autoencoder, find_vq_tokenizer
from janusflow.training.joint_parts import (
    at_once,
    encoded_pictures,
    latents_of,
    model_config,
    new_processor,
    take_vision_tower,
    take_weights,
    vq_config,
)
from janusflow.training.loop import LoopSettings, Objective
from janusflow.training.losses import (
    image_token_loss,
    next_token_loss,
    patch_loss,
    rectified_flow_loss,
)
from janusflow.training.outcomes import export_pipeline
from janusflow.training.processes import begin
from janusflow.training.shared_encoder import SharedEncoderModel

if TYPE_CHECKING:
    from janusflow.pipeline import JanusFlowPipeline


_HELD_OUT = 2**40
"""Number of a sample that no run reaches."""
PATCH_CLASSES = 2 + len(SHAPES) + len(COLORS)
"""Shapes and colours that a patch may show; "nothing" is one of either."""


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of the model that is trained from nothing."""

    image_size: int = 64
    vocab_size: int = 512
    language_width: int = 256
    language_layers: int = 6
    language_heads: int = 4
    language_mlp: int = 704
    max_positions: int = 2048
    vision_width: int = 128
    vision_layers: int = 4
    vision_heads: int = 4
    vision_patch: int = 8
    adapter_width: int = 128
    adapter_kernel: int = 3
    """The published 7 cells are more than the bundled model's 4 x 4 grid of tokens."""


@dataclass(frozen=True)
class DrawingSettings:
    """What the generation heads learn from."""

    flow: bool = True
    """Whether the model has the flow head. The VQ head it has where there is a tokenizer."""
    num_pictures: int = 60_000
    batch_size: int = 64
    """Captions of a part of a step, see `loop.microbatches`."""
    noises_per_picture: int = 3
    """Points of the path a picture is trained at in a part; they share the caption's tokens."""
    prompt_length: int = 28
    """Tokens a prompt is padded to."""
    condition_dropout_prob: float = 0.1
    vq_weight: float = 0.5
    """Weight of the VQ head's loss, where there is one."""
    timesteps: str = "logit-normal"
    """Density of t: "logit-normal" or "uniform"."""
    loss_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.timesteps not in ("logit-normal", "uniform"):
            raise SettingsError(
                f"drawing.timesteps is 'logit-normal' or 'uniform', not {self.timesteps!r}"
            )


@dataclass(frozen=True)
class LookingSettings:
    """What the understanding path learns from."""

    encoder: str = "vision"
    """What pictures are looked at through: "vision", the tower, or "drawing", the autoencoder and
    the flow head's encoder, shared by both tasks."""
    batch_size: int = 16
    conversation_length: int = 160
    """Tokens a conversation is padded to; it holds as many questions as fit."""
    separate_questions: float = 0.75
    """Share of conversations whose questions are blind to each other."""
    where_weight: float = 1.0
    """How much likelier a question of "where" is to be among those that fit: it is learned last,
    as its answer about two objects tells one side from the other and nothing else."""
    loss_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.encoder not in ("vision", "drawing"):
            raise SettingsError(f"looking.encoder is 'vision' or 'drawing', not {self.encoder!r}")


@dataclass(frozen=True)
class PatchSettings:
    """What features learn from directly: a linear layer names the shape and colour of a patch.

    On the vision tower's features it stands in for SigLIP's pre-training. On the language model's
    states at the image tokens of a noisy picture it aligns drawing with what the picture shows, as
    the representation alignment of arXiv 2410.06940 does with features of an encoder.
    """

    batch_size: int = 32
    """Pictures of a part for the vision tower, besides those of the conversations."""
    vision_weight: float = 0.5
    drawing_weight: float = 0.25

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise SettingsError(f"patches.batch_size is at least 1, not {self.batch_size}")


@dataclass(frozen=True)
class PreviewSettings:
    """How progress is measured on held-out prompts and questions."""

    num: int = 48
    num_inference_steps: int = 20
    guidance_scale: float = 2.0


@dataclass(frozen=True)
class ValidationSettings:
    """Losses on what training never sees, every `loop.validate_every` steps."""

    num: int = 64
    """Pictures to draw; the conversations are as many as in a part."""
    buckets: int = 5
    """Intervals of t, in whose middles the losses are taken."""

    def __post_init__(self) -> None:
        if self.num < 1 or self.buckets < 1:
            raise SettingsError("validation.num and validation.buckets are at least 1")


@dataclass(frozen=True)
class JointSettings:
    """A joint run."""

    task: str = "joint"
    output_dir: str = "runs/joint"
    autoencoder: str = "runs/autoencoder/final"
    """Folder of the frozen autoencoder, or a model that has it."""
    vq_tokenizer: str | None = None
    """Folder of the frozen tokenizer of pictures, or a model that has it; none = a model without
    the VQ head."""
    initial_model: str | None = None
    """Model that a joint run made, whose weights and text tokenizer to begin with; none = random
    weights."""
    vision_model: str | None = None
    """Model whose vision tower to begin with, in place of SigLIP's pre-training; none = a random
    tower."""
    model: ModelSizes = field(default_factory=ModelSizes)
    drawing: DrawingSettings = field(default_factory=DrawingSettings)
    looking: LookingSettings = field(default_factory=LookingSettings)
    patches: PatchSettings = field(default_factory=PatchSettings)
    alignment: AlignmentSettings = field(
        default_factory=lambda: AlignmentSettings(weight=0.0, layer=3, width=256)
    )
    preview: PreviewSettings = field(default_factory=PreviewSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    cache: str | None = None
    """Folder for what the frozen autoencoder and tokenizer make of the pictures, which several runs
    may share; the run's own when not given."""
    drawing_defaults: dict[str, dict[str, float]] = field(default_factory=dict)
    """Kept in the model's config; see `JanusFlowConfig`."""
    loop: LoopSettings = field(default_factory=LoopSettings)

    def __post_init__(self) -> None:
        if not (self.drawing.flow or self.vq_tokenizer):
            raise SettingsError("no head draws: set drawing.flow or name a vq_tokenizer")
        if self.looking.encoder == "drawing" and not self.drawing.flow:
            raise SettingsError("looking.encoder 'drawing' needs the flow head; set drawing.flow")
        if self.looking.encoder == "drawing" and self.patches.vision_weight:
            raise SettingsError(
                "looking.encoder 'drawing' leaves the vision tower as it is; "
                "set patches.vision_weight to 0"
            )
        if self.alignment.weight and self.alignment.layer > self.model.language_layers:
            raise SettingsError(
                f"alignment.layer is {self.alignment.layer}, and the language model has "
                f"{self.model.language_layers}"
            )


class JointObjective(Objective):
    """The model with the losses of drawing and looking."""

    free_settings = ("validation", "cache")

    def __init__(self, settings: JointSettings) -> None:
        super().__init__()
        self.settings = settings
        folder = Path(settings.output_dir)
        device = begin().device  # pictures are encoded before the rest is brought there
        vae = find_autoencoder(settings.autoencoder).requires_grad_(False).to(device)
        self._frozen = {"vae": vae}  # in a dict: no part of what is trained and saved
        self._shared = settings.looking.encoder == "drawing"
        sizes = settings.model
        self.patches_per_side = sizes.image_size // sizes.vision_patch
        looked_at = 2 * scale_factor(vae) if self._shared else sizes.vision_patch
        self.processor = new_processor(
            folder / "tokenizer", sizes, looked_at, settings.initial_model
        )
        config = model_config(settings, vae, self.processor)
        if settings.vq_tokenizer is not None:
            tokenizer = find_vq_tokenizer(settings.vq_tokenizer)
            config.vq_config = vq_config(tokenizer, sizes)
        torch.manual_seed(settings.loop.seed)
        if self._shared:
            self.model: JanusFlowForConditionalGeneration = SharedEncoderModel(
                config, latents_of(vae)
            )
        else:
            self.model = JanusFlowForConditionalGeneration(config)
        if settings.initial_model is not None:
            take_weights(self.model, settings.initial_model)
        if settings.vq_tokenizer is not None:
            self.model.vq_head.tokenizer.load_state_dict(tokenizer.state_dict())
            self.model.vq_head.tokenizer.requires_grad_(False).to(device)
        if settings.vision_model is not None:
            take_vision_tower(self.model, settings.vision_model)
        # On a CPU the backward pass of the fused attention takes longer than matrices this small.
        self.model.set_attn_implementation("eager")
        self.patch_heads = nn.ModuleDict()
        if settings.patches.vision_weight:
            self.patch_heads["vision"] = nn.Linear(sizes.vision_width, PATCH_CLASSES)
        if settings.patches.drawing_weight and settings.drawing.flow:
            per_token = self.patches_per_side**2 // self.model.flow_config.num_image_tokens
            self.patch_heads["drawing"] = nn.Linear(sizes.language_width, per_token * PATCH_CLASSES)
        self.alignment: AlignmentHead | None = None
        if settings.alignment.weight and settings.drawing.flow:
            self.alignment = AlignmentHead(
                sizes.language_width, sizes.vision_width, settings.alignment.width
            )
        self.batches = ShapesBatches(self.processor, settings.loop.seed)
        self.latents = self.image_tokens = None
        if settings.drawing.flow:
            self.latents = encoded_pictures("latents", settings, latents_of(vae), vae)
        if settings.vq_tokenizer is not None:
            self.image_tokens = encoded_pictures(
                "image_tokens",
                settings,
                lambda pixels: self.model.vq_head.encode(pixels, at_once(device)).int(),
                self.model.vq_head.tokenizer,
            )

    @property
    def vae(self) -> AutoencoderKL:
        """The frozen autoencoder."""
        return self._frozen["vae"]

    def batch(self, step: int, part: int = 0) -> dict[str, Tensor]:
        """Captions, latents, noise and times; conversations and pixels."""
        drawing, loop = self.settings.drawing, self.settings.loop
        sample = loop.sample(step, part)
        indices = np.random.default_rng([loop.seed, 4, sample]).integers(
            drawing.num_pictures, size=drawing.batch_size
        )
        rows = torch.from_numpy(indices)
        return self._batch(
            sample,
            indices,
            latents=None if self.latents is None else self.latents[rows],
            image_tokens=None if self.image_tokens is None else self.image_tokens[rows],
            dropout=drawing.condition_dropout_prob,
        )

    def _batch(
        self,
        sample: int,
        indices: np.ndarray,
        latents: Tensor | None,
        image_tokens: Tensor | None,
        dropout: float,
    ) -> dict[str, Tensor]:
        """The batch of a sample's number, of these pictures to draw and what was made of them."""
        drawing, looking = self.settings.drawing, self.settings.looking
        seed = self.settings.loop.seed
        ids, mask = self.batches.captions(
            indices,
            sample,
            drawing.prompt_length,
            dropout,
            tag="flow" if image_tokens is None else "vq",
        )
        conversations = self.batches.conversations(
            looking.batch_size,
            sample,
            looking.conversation_length,
            looking.separate_questions,
            looking.where_weight,
        )
        batch = {
            "prompt_ids": ids,
            "prompt_mask": mask,
            "conversation_ids": conversations.input_ids,
            "labels": conversations.labels,
            "blocks": conversations.blocks,
            "position_ids": conversations.position_ids,
            "pixel_values": conversations.pixel_values,
        }
        if latents is not None:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + sample)
            x_1 = latents.float().repeat_interleave(drawing.noises_per_picture, dim=0)
            density = logit_normal if drawing.timesteps == "logit-normal" else uniform
            batch["x_0"] = torch.randn(x_1.shape, generator=generator)
            batch["x_1"] = x_1
            batch["t"] = density(len(x_1), generator=generator)
        if "vision" in self.patch_heads:
            batch["patch_pixels"], batch["patch_labels"] = self.batches.labelled_patches(
                self.settings.patches.batch_size, sample, self.patches_per_side
            )
        if "drawing" in self.patch_heads:
            labels = self.batches.picture_labels(indices, self.patches_per_side)
            batch["drawn_labels"] = labels.repeat_interleave(drawing.noises_per_picture, dim=0)
        if self.alignment is not None:
            batch["clean_pixels"] = self.batches.pictures(indices)
        if image_tokens is not None:
            batch["image_tokens"] = image_tokens.long()
        return batch

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """Losses of drawing by either head, of looking, of both kinds of patches, of alignment."""
        model, settings = self.model, self.settings
        flow = None
        if "x_1" in batch:
            x_t = interpolate(batch["x_0"], batch["x_1"], batch["t"])
            flow = model.flow_head.tokens(x_t, batch["t"])
        states = model.picture_states(
            batch["prompt_ids"],
            batch["prompt_mask"],
            flow=flow,
            image_tokens=batch.get("image_tokens"),
            inner_layer=None if self.alignment is None else settings.alignment.layer,
        )
        blocks = batch["blocks"]
        logits = model(
            input_ids=batch["conversation_ids"],
            pixel_values=batch["pixel_values"],
            attention_mask=shared_prefix_mask(blocks, torch.ones_like(blocks), states.flow.dtype),
            position_ids=batch["position_ids"],
        ).logits
        losses = {}
        if flow is not None:
            velocity = model.flow_head.velocity(states.flow, flow)
            loss = rectified_flow_loss(velocity, batch["x_0"], batch["x_1"])
            losses["flow"] = settings.drawing.loss_weight * loss
        loss = next_token_loss(logits, batch["labels"])
        losses["answer"] = settings.looking.loss_weight * loss
        if "patch_pixels" in batch:
            seen = model.vision_model(batch["patch_pixels"]).last_hidden_state
            loss = patches_loss(self.patch_heads["vision"](seen), batch["patch_labels"])
            losses["vision_patches"] = settings.patches.vision_weight * loss
        if "drawn_labels" in batch:
            drawn = self.patch_heads["drawing"](states.flow[:, 1:])
            loss = patches_loss(drawn, batch["drawn_labels"])
            losses["drawn_patches"] = settings.patches.drawing_weight * loss
        if self.alignment is not None:
            assert states.inner is not None
            with torch.no_grad():
                features = model.vision_model(batch["clean_pixels"]).last_hidden_state
            features = features.repeat_interleave(settings.drawing.noises_per_picture, dim=0)
            loss = alignment_loss(self.alignment(states.inner[:, 1:]), features)
            losses["alignment"] = settings.alignment.weight * loss
        if "image_tokens" in batch:
            loss = image_token_loss(model.vq_head.logits(states.vq), batch["image_tokens"])
            losses["vq"] = settings.drawing.vq_weight * loss
        return losses

    def work(self, batch: dict[str, Tensor]) -> dict[str, int]:
        """Places of the language model's rows, and pictures drawn or looked at."""
        places = images = 0
        for name in ("prompt_ids", "conversation_ids", "image_tokens"):
            places += batch[name].numel() if name in batch else 0
        for name in ("x_1", "pixel_values", "patch_pixels"):
            images += len(batch.get(name, ()))
        if "x_1" in batch:
            places += len(batch["x_1"]) * (1 + self.model.flow_config.num_image_tokens)
        else:
            images += len(batch["image_tokens"])
        return {"tokens": places, "images": images}

    def sources(self) -> dict[str, str]:
        """The frozen parts."""
        found = {"autoencoder": self.settings.autoencoder}
        if self.settings.vq_tokenizer is not None:
            found["VQ tokenizer"] = self.settings.vq_tokenizer
        if self.settings.initial_model is not None:
            found["initial model"] = self.settings.initial_model
        if self.settings.vision_model is not None:
            found["vision tower"] = self.settings.vision_model
        return found

    def _record(self) -> dict[str, Any]:
        """What both heads learned from, for comparisons; steps count those of the initial model."""
        drawing, loop = self.settings.drawing, self.settings.loop
        initial = self.settings.initial_model
        before = None if initial is None else training_record(initial)
        return {
            "data": "shapes",
            "heads": list(self.model.generation_heads),
            "encoders": "shared" if self._shared else "decoupled",
            "steps": loop.steps + (before["steps"] if before else 0),
            "seed": loop.seed,
            "precision": loop.precision,
            "num_pictures": drawing.num_pictures,
            "captions_a_step": drawing.batch_size * loop.microbatches,
            "noises_per_picture": drawing.noises_per_picture,
            "condition_dropout_prob": drawing.condition_dropout_prob,
            **({"initial_model": before} if before else {}),
        }

    def _pipeline(self) -> JanusFlowPipeline:
        from janusflow.pipeline import JanusFlowPipeline

        vae = self.vae if self.settings.drawing.flow else None
        return JanusFlowPipeline(model=self.model, vae=vae, processor=self.processor)

    def validate(self) -> dict[str, float]:
        """Mean losses on pictures that training never draws, at times in the middles of intervals.

        That of the flow head stands by itself for each of the times, too.
        """
        settings = self.settings.validation
        first = self.settings.drawing.num_pictures
        indices = np.arange(first, first + settings.num)
        pixels = self.batches.pictures(indices)
        latents = image_tokens = None
        if self.latents is not None:
            latents = latents_of(self.vae)(pixels.to(self.vae.device)).cpu()
        if self.image_tokens is not None:
            image_tokens = self.model.vq_head.encode(pixels.to(self.model.device)).cpu()
        batch = self._batch(_HELD_OUT, indices, latents, image_tokens, dropout=0.0)
        batch = {name: held.to(self.model.device) for name, held in batch.items()}
        figures: defaultdict[str, float] = defaultdict(float)
        for t in ((torch.arange(settings.buckets) + 0.5) / settings.buckets).tolist():
            if "t" in batch:
                batch["t"] = torch.full_like(batch["t"], t)
            for name, loss in self(**batch).items():
                figures[f"valid_{name}"] += float(loss) / settings.buckets
                if name == "flow":
                    figures[f"valid_flow_t{t:.2f}"] = float(loss)
        return {name: round(figure, 5) for name, figure in figures.items()}

    def preview(self, step: int, folder: Path) -> dict[str, float]:
        """Scores on held-out prompts and questions, and a sheet of pictures."""
        from janusflow.evaluation.shapes import score_answers, score_pictures

        settings = self.settings.preview
        pipe = self._pipeline()
        options: dict[str, dict[str, Any]] = {
            "flow": {
                "num_inference_steps": settings.num_inference_steps,
                "guidance_scale": settings.guidance_scale,
            },
            "vq": {},
        }
        scores = {}
        for head in self.model.generation_heads:
            sheet = folder / f"preview-{head}.png"
            pictures = score_pictures(
                pipe, num=settings.num, head=head, sheet=sheet, **options[head]
            )
            scores[f"shapes_{head}"] = pictures["overall"]
        return {**scores, "shapes_vqa": score_answers(pipe, num=settings.num)["overall"]}

    def export(self, folder: Path) -> None:
        """Saves the whole pipeline in bfloat16; of a model with a shared encoder, its record."""
        if self._shared:
            write_json(folder / "training.json", self._record())
            return
        export_pipeline(self._pipeline(), folder)
        write_json(folder / "model" / "training.json", self._record())


def patches_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss of tokens' logits (B, N, p · classes), p patches a token, for labels (B, 2, n, n)."""
    patches_per_token = logits.shape[-1] // PATCH_CLASSES
    p = math.isqrt(patches_per_token)
    labels = rearrange(labels, "b two (h p) (w q) -> b two (h w p q)", p=p, q=p)
    logits = rearrange(logits, "b n (p c) -> b (n p) c", p=patches_per_token)
    shape, color = logits.split([1 + len(SHAPES), 1 + len(COLORS)], dim=-1)
    return patch_loss(shape, labels[:, 0]) + patch_loss(color, labels[:, 1])
