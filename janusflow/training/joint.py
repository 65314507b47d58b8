"""Joint training of drawing, by one head or both, and looking on the shapes world.

Each step takes captions with latents and tokens of pictures, and pictures with questions, in one
sum of losses: `L_RF + L_AR` (arXiv 2411.07975), and the cross-entropy of tokens for the VQ head.
Latents and tokens are made once by the frozen autoencoder and tokenizer, and kept on disk.
Axes: B batch, C latent channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from janusflow.data.shapes.batches import ShapesBatches, picture_scene
from janusflow.data.shapes.scene import COLORS, SHAPES, draw
from janusflow.data.shapes.tokenizer import write_tokenizer
from janusflow.errors import SettingsError
from janusflow.files import atomic_path, write_json
from janusflow.flow.path import interpolate
from janusflow.flow.timesteps import logit_normal, uniform
from janusflow.models.configuration import JanusFlowConfig
from janusflow.models.modeling import JanusFlowForConditionalGeneration
from janusflow.models.prefix import shared_prefix_mask
from janusflow.processing.images import JanusFlowImageProcessor
from janusflow.processing.processor import JanusFlowProcessor
from janusflow.processing.prompts import PromptFormat
from janusflow.processing.tokenizer import load_tokenizer
from janusflow.training.autoencoder import to_pixels
from janusflow.training.loop import LoopSettings, Objective
from janusflow.training.losses import (
    image_token_loss,
    next_token_loss,
    patch_loss,
    rectified_flow_loss,
)

if TYPE_CHECKING:
    from janusflow.pipeline import JanusFlowPipeline


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
    """What the flow head learns from."""

    num_pictures: int = 60_000
    batch_size: int = 64
    """Captions a step."""
    noises_per_picture: int = 3
    """Points of the path a picture is trained at in a step; they share the caption's tokens."""
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

    batch_size: int = 16
    conversation_length: int = 160
    """Tokens a conversation is padded to; it holds as many questions as fit."""
    separate_questions: float = 0.75
    """Share of conversations whose questions are blind to each other."""
    where_weight: float = 1.0
    """How much likelier a question of "where" is to be among those that fit: it is learned last,
    as its answer about two objects tells one side from the other and nothing else."""
    loss_weight: float = 1.0


@dataclass(frozen=True)
class PatchSettings:
    """What features learn from directly: a linear layer names the shape and colour of a patch.

    On the vision tower's features it stands in for SigLIP's pre-training. On the language model's
    states at the image tokens of a noisy picture it aligns drawing with what the picture shows, as
    the representation alignment of arXiv 2410.06940 does with features of an encoder.
    """

    batch_size: int = 32
    """Pictures a step for the vision tower, besides those of the conversations."""
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
class JointSettings:
    """A joint run."""

    task: str = "joint"
    output_dir: str = "runs/joint"
    autoencoder: str = "runs/autoencoder/final"
    """Folder of the frozen autoencoder."""
    vq_tokenizer: str | None = None
    """Folder of the frozen tokenizer of pictures; none = a model without the VQ head."""
    model: ModelSizes = field(default_factory=ModelSizes)
    drawing: DrawingSettings = field(default_factory=DrawingSettings)
    looking: LookingSettings = field(default_factory=LookingSettings)
    patches: PatchSettings = field(default_factory=PatchSettings)
    preview: PreviewSettings = field(default_factory=PreviewSettings)
    drawing_defaults: dict[str, dict[str, float]] = field(default_factory=dict)
    """Kept in the model's config; see `JanusFlowConfig`."""
    loop: LoopSettings = field(default_factory=LoopSettings)


class JointObjective(Objective):
    """The model with the losses of drawing and looking."""

    def __init__(self, settings: JointSettings) -> None:
        super().__init__()
        self.settings = settings
        if not (Path(settings.autoencoder) / "config.json").is_file():
            raise SettingsError(
                f"no autoencoder in {settings.autoencoder}; train it first with "
                "`janusflow train configs/train/tiny/autoencoder.yaml`, or set --autoencoder"
            )
        tokens = settings.vq_tokenizer
        if tokens is not None and not (Path(tokens) / "config.json").is_file():
            raise SettingsError(
                f"no tokenizer of pictures in {tokens}; train it first with "
                "`janusflow train configs/train/tiny/vq_tokenizer.yaml`, or set --vq-tokenizer"
            )
        folder = Path(settings.output_dir)
        vae = AutoencoderKL.from_pretrained(settings.autoencoder).eval().requires_grad_(False)
        self._frozen = {"vae": vae}  # in a dict: no part of what is trained and saved
        self.processor = _processor(folder / "tokenizer", settings.model)
        config = _model_config(settings, vae, self.processor)
        if settings.vq_tokenizer is not None:
            tokenizer = JanusVQVAE.from_pretrained(settings.vq_tokenizer)
            config.vq_config = _vq_config(tokenizer, settings.model)
        torch.manual_seed(settings.loop.seed)
        self.model = JanusFlowForConditionalGeneration(config)
        if settings.vq_tokenizer is not None:
            self.model.vq_head.tokenizer.load_state_dict(tokenizer.state_dict())
            self.model.vq_head.tokenizer.requires_grad_(False)
        # On a CPU the backward pass of the fused attention takes longer than matrices this small.
        self.model.set_attn_implementation("eager")
        sizes = settings.model
        self.patches_per_side = sizes.image_size // sizes.vision_patch
        per_token = self.patches_per_side**2 // self.model.flow_config.num_image_tokens
        self.patch_heads = nn.ModuleDict(
            {
                "vision": nn.Linear(sizes.vision_width, PATCH_CLASSES),
                "drawing": nn.Linear(sizes.language_width, per_token * PATCH_CLASSES),
            }
        )
        self.batches = ShapesBatches(self.processor, settings.loop.seed)
        self.latents = _encoded(folder / "latents.safetensors", settings, _latents_of(vae))
        self.image_tokens: Tensor | None = None
        if settings.vq_tokenizer is not None:
            self.image_tokens = _encoded(
                folder / "image_tokens.safetensors",
                settings,
                lambda pixels: self.model.vq_head.encode(pixels).to(torch.int32),
            )

    @property
    def vae(self) -> AutoencoderKL:
        """The frozen autoencoder."""
        return self._frozen["vae"]

    def batch(self, step: int, part: int = 0) -> dict[str, Tensor]:
        """Captions, latents, noise and times; conversations and pixels."""
        drawing, looking = self.settings.drawing, self.settings.looking
        seed = self.settings.loop.seed
        sample = self.settings.loop.sample(step, part)
        indices = np.random.default_rng([seed, 4, sample]).integers(
            drawing.num_pictures, size=drawing.batch_size
        )
        ids, mask = self.batches.captions(
            indices,
            sample,
            drawing.prompt_length,
            drawing.condition_dropout_prob,
            tag="flow" if self.image_tokens is None else "vq",
        )
        generator = torch.Generator().manual_seed(seed * 1_000_003 + sample)
        x_1 = self.latents[torch.from_numpy(indices)].float()
        x_1 = x_1.repeat_interleave(drawing.noises_per_picture, dim=0)
        density = logit_normal if drawing.timesteps == "logit-normal" else uniform
        conversations = self.batches.conversations(
            looking.batch_size,
            sample,
            looking.conversation_length,
            looking.separate_questions,
            looking.where_weight,
        )
        patch_pixels, patch_labels = self.batches.labelled_patches(
            self.settings.patches.batch_size, sample, self.patches_per_side
        )
        drawn_labels = self.batches.picture_labels(indices, self.patches_per_side)
        batch = {
            "prompt_ids": ids,
            "prompt_mask": mask,
            "x_0": torch.randn(x_1.shape, generator=generator),
            "x_1": x_1,
            "t": density(len(x_1), generator=generator),
            "conversation_ids": conversations.input_ids,
            "labels": conversations.labels,
            "blocks": conversations.blocks,
            "position_ids": conversations.position_ids,
            "pixel_values": conversations.pixel_values,
            "patch_pixels": patch_pixels,
            "patch_labels": patch_labels,
            "drawn_labels": drawn_labels.repeat_interleave(drawing.noises_per_picture, dim=0),
        }
        if self.image_tokens is not None:
            batch["image_tokens"] = self.image_tokens[torch.from_numpy(indices)].long()
        return batch

    def forward(  # type: ignore[override]
        self,
        *,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        x_0: Tensor,
        x_1: Tensor,
        t: Tensor,
        conversation_ids: Tensor,
        labels: Tensor,
        blocks: Tensor,
        position_ids: Tensor,
        pixel_values: Tensor,
        patch_pixels: Tensor,
        patch_labels: Tensor,
        drawn_labels: Tensor,
        image_tokens: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses of drawing by either head, of looking, and of both kinds of patches."""
        model, settings = self.model, self.settings
        tokens = model.flow_head.tokens(interpolate(x_0, x_1, t), t)
        hidden, before_tokens = model.picture_states(
            prompt_ids, prompt_mask, flow=tokens, image_tokens=image_tokens
        )
        velocity = model.flow_head.velocity(hidden, tokens)
        everything = torch.ones_like(blocks)
        logits = model(
            input_ids=conversation_ids,
            pixel_values=pixel_values,
            attention_mask=shared_prefix_mask(blocks, everything, hidden.dtype),
            position_ids=position_ids,
        ).logits
        seen = self.patch_heads["vision"](model.vision_model(patch_pixels).last_hidden_state)
        drawn = self.patch_heads["drawing"](hidden[:, 1:])
        losses = {
            "flow": settings.drawing.loss_weight * rectified_flow_loss(velocity, x_0, x_1),
            "answer": settings.looking.loss_weight * next_token_loss(logits, labels),
            "vision_patches": settings.patches.vision_weight * patches_loss(seen, patch_labels),
            "drawn_patches": settings.patches.drawing_weight * patches_loss(drawn, drawn_labels),
        }
        if image_tokens is not None:
            loss = image_token_loss(model.vq_head.logits(before_tokens), image_tokens)
            losses["vq"] = settings.drawing.vq_weight * loss
        return losses

    def work(self, batch: dict[str, Tensor]) -> dict[str, int]:
        """Places of the language model's rows, and pictures drawn or looked at."""
        drawn = len(batch["x_1"]) * (1 + self.model.flow_config.num_image_tokens)
        rows = (
            batch[name]
            for name in ("prompt_ids", "conversation_ids", "image_tokens")
            if name in batch
        )
        looked = len(batch["pixel_values"]) + len(batch["patch_pixels"])
        return {
            "tokens": drawn + sum(ids.numel() for ids in rows),
            "images": len(batch["x_1"]) + looked,
        }

    def sources(self) -> dict[str, str]:
        """The frozen parts."""
        found = {"autoencoder": self.settings.autoencoder}
        if self.settings.vq_tokenizer is not None:
            found["VQ tokenizer"] = self.settings.vq_tokenizer
        return found

    def _record(self) -> dict[str, Any]:
        """What both heads learned from, for comparisons."""
        drawing, loop = self.settings.drawing, self.settings.loop
        return {
            "data": "shapes",
            "heads": list(self.model.generation_heads),
            "steps": loop.steps,
            "seed": loop.seed,
            "precision": loop.precision,
            "num_pictures": drawing.num_pictures,
            "captions_a_step": drawing.batch_size,
            "condition_dropout_prob": drawing.condition_dropout_prob,
        }

    def _pipeline(self) -> JanusFlowPipeline:
        from janusflow.pipeline import JanusFlowPipeline

        return JanusFlowPipeline(model=self.model, vae=self.vae, processor=self.processor)

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
        """Saves the whole pipeline in bfloat16."""
        self.vae.register_to_config(_name_or_path="")  # else the folder it was loaded from
        self._pipeline().to(torch.bfloat16).save_pretrained(folder)
        write_json(folder / "model" / "training.json", self._record())
        self.model.float()


def patches_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss of tokens' logits (B, N, p · classes), p patches a token, for labels (B, 2, n, n)."""
    patches_per_token = logits.shape[-1] // PATCH_CLASSES
    p = math.isqrt(patches_per_token)
    labels = rearrange(labels, "b two (h p) (w q) -> b two (h w p q)", p=p, q=p)
    logits = rearrange(logits, "b n (p c) -> b (n p) c", p=patches_per_token)
    shape, color = logits.split([1 + len(SHAPES), 1 + len(COLORS)], dim=-1)
    return patch_loss(shape, labels[:, 0]) + patch_loss(color, labels[:, 1])


def _processor(folder: Path, sizes: ModelSizes) -> JanusFlowProcessor:
    if not (folder / "tokenizer.json").is_file():
        write_tokenizer(folder, sizes.vocab_size)
    images = JanusFlowImageProcessor(
        image_size=sizes.image_size, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return JanusFlowProcessor(
        images,
        load_tokenizer(folder),
        num_image_tokens=(sizes.image_size // sizes.vision_patch) ** 2,
        prompt_format=PromptFormat(system_prompt=""),
    )


def _model_config(
    settings: JointSettings, vae: AutoencoderKL, processor: JanusFlowProcessor
) -> JanusFlowConfig:
    sizes = settings.model
    return JanusFlowConfig(
        text_config={
            "vocab_size": sizes.vocab_size,
            "hidden_size": sizes.language_width,
            "intermediate_size": sizes.language_mlp,
            "num_hidden_layers": sizes.language_layers,
            "num_attention_heads": sizes.language_heads,
            "num_key_value_heads": sizes.language_heads,
            "max_position_embeddings": sizes.max_positions,
            "bos_token_id": processor.bos_token_id,
            "eos_token_id": processor.eos_token_id,
            "pad_token_id": processor.pad_token_id,
        },
        vision_config={
            "image_size": sizes.image_size,
            "patch_size": sizes.vision_patch,
            "hidden_size": sizes.vision_width,
            "num_hidden_layers": sizes.vision_layers,
            "num_attention_heads": sizes.vision_heads,
            "num_image_tokens": processor.num_image_tokens,
        },
        flow_config={
            "image_size": sizes.image_size,
            "vae_scale_factor": 2 ** (len(vae.config.block_out_channels) - 1),
            "latent_channels": vae.config.latent_channels,
            "hidden_size": sizes.adapter_width,
            "time_frequencies": sizes.adapter_width,
            "kernel_size": sizes.adapter_kernel,
        },
        image_token_id=processor.image_token_id,
        pad_token_id=processor.pad_token_id,
        drawing_defaults=settings.drawing_defaults or None,
    )


def _vq_config(tokenizer: JanusVQVAE, sizes: ModelSizes) -> JanusVQVAEConfig:
    width = sizes.language_width
    values = {**tokenizer.config.to_dict(), "projection_dim": width, "image_token_embed_dim": width}
    values.pop("model_type")
    values["_name_or_path"] = ""  # the folder it was loaded from
    return JanusVQVAEConfig(**values)


def _latents_of(vae: AutoencoderKL) -> Callable[[Tensor], Tensor]:
    """Makes scaled latents, float16 (B, C, H/8, W/8), of pixels."""
    vae = vae.to(memory_format=torch.channels_last)

    def encode(pixels: Tensor) -> Tensor:
        mean = vae.encode(pixels.to(vae.device)).latent_dist.mean
        return (mean.float() * vae.config.scaling_factor).half()

    return encode


@torch.no_grad()
def _encoded(path: Path, settings: JointSettings, encode: Callable[[Tensor], Tensor]) -> Tensor:
    """What `encode` makes of all pictures, (pictures, …), made once and kept in a file."""
    num, size = settings.drawing.num_pictures, settings.model.image_size
    if path.is_file():
        kept = load_file(path)[path.stem]
        if len(kept) == num:
            return kept
    parts = []
    for start in tqdm(range(0, num, 32), desc=path.stem, mininterval=10):
        rows = range(start, min(start + 32, num))
        scenes = [picture_scene(settings.loop.seed, index) for index in rows]
        with torch.autocast("cpu", torch.bfloat16):
            parts.append(encode(to_pixels([draw(scene, size) for scene in scenes])).cpu())
    encoded = torch.cat(parts).contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as scratch:
        save_file({path.stem: encoded}, scratch)
    return encoded
