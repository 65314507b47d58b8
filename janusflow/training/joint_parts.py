"""What a joint run is put together from: frozen parts, configuration, pictures encoded once.

Axes: B batch, C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderKL
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from janusflow.data.shapes.batches import picture_scene
from janusflow.data.shapes.scene import draw
from janusflow.data.shapes.tokenizer import write_tokenizer
from janusflow.errors import SettingsError
from janusflow.evaluation.features import module_hash
from janusflow.files import atomic_path
from janusflow.models.autoencoder import encode, scale_factor
from janusflow.models.checkpoints import resolve_model_folder
from janusflow.models.configuration import JanusFlowConfig
from janusflow.models.modeling import JanusFlowForConditionalGeneration
from janusflow.processing.images import JanusFlowImageProcessor
from janusflow.processing.processor import JanusFlowProcessor
from janusflow.processing.prompts import PromptFormat
from janusflow.processing.tokenizer import load_tokenizer
from janusflow.training.autoencoder import to_pixels
from janusflow.training.making import made
from janusflow.training.shared_encoder import SharedEncoderConfig

if TYPE_CHECKING:
    from janusflow.training.joint import JointSettings, ModelSizes


def take_vision_tower(model: JanusFlowForConditionalGeneration, source: str) -> None:
    """Gives a model the vision tower of another.

    Raises:
        SettingsError: If the sizes differ.
    """
    found = JanusFlowForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    try:
        model.vision_model.load_state_dict(found.vision_model.state_dict())
    except RuntimeError as error:
        raise SettingsError(
            f"the vision tower of {source} has other sizes than model.vision_width, vision_layers, "
            f"vision_patch or image_size say: {error}"
        ) from error


def take_weights(model: JanusFlowForConditionalGeneration, source: str) -> None:
    """Gives a model all weights of another.

    Raises:
        SettingsError: If the models differ in heads or sizes.
    """
    found = JanusFlowForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    shapes = [
        {name: list(tensor.shape) for name, tensor in each.state_dict().items()}
        for each in (found, model)
    ]
    for name in sorted({*shapes[0], *shapes[1]}):
        theirs, ours = (shape.get(name, "absent") for shape in shapes)
        if theirs != ours:
            raise SettingsError(
                f"initial_model: {name} of {source} is {theirs}, and of this run's model {ours}; "
                "set model, drawing.flow and vq_tokenizer to what the initial model has"
            )
    model.load_state_dict(found.state_dict())


def new_processor(
    folder: Path, sizes: ModelSizes, patch: int, initial_model: str | None = None
) -> JanusFlowProcessor:
    """The processor of a model that looks at pictures in patches of so many pixels a side."""
    if initial_model is not None:
        folder = resolve_model_folder(initial_model) / "processor"
    elif not (folder / "tokenizer.json").is_file():
        write_tokenizer(folder, sizes.vocab_size)
    images = JanusFlowImageProcessor(
        image_size=sizes.image_size, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return JanusFlowProcessor(
        images,
        load_tokenizer(folder),
        num_image_tokens=(sizes.image_size // patch) ** 2,
        prompt_format=PromptFormat(system_prompt=""),
    )


def model_config(
    settings: JointSettings, vae: AutoencoderKL, processor: JanusFlowProcessor
) -> JanusFlowConfig:
    """Sizes of the model that is trained, without a VQ head."""
    sizes = settings.model
    flow = {
        "image_size": sizes.image_size,
        "vae_scale_factor": scale_factor(vae),
        "latent_channels": vae.config.latent_channels,
        "hidden_size": sizes.adapter_width,
        "time_frequencies": sizes.adapter_width,
        "kernel_size": sizes.adapter_kernel,
    }
    kind = SharedEncoderConfig if settings.looking.encoder == "drawing" else JanusFlowConfig
    return kind(
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
            "num_image_tokens": (sizes.image_size // sizes.vision_patch) ** 2,
        },
        flow_config=flow if settings.drawing.flow else None,
        image_token_id=processor.image_token_id,
        pad_token_id=processor.pad_token_id,
        drawing_defaults=settings.drawing_defaults or None,
    )


def vq_config(tokenizer: JanusVQVAE, sizes: ModelSizes) -> JanusVQVAEConfig:
    """Sizes of the VQ head around a tokenizer."""
    width = sizes.language_width
    values = {**tokenizer.config.to_dict(), "projection_dim": width, "image_token_embed_dim": width}
    values.pop("model_type")
    values["_name_or_path"] = ""  # the folder it was loaded from
    return JanusVQVAEConfig(**values)


def latents_of(vae: AutoencoderKL) -> Callable[[Tensor], Tensor]:
    """Makes scaled latents, float16 (B, C, H/8, W/8), of pixels."""
    vae = vae.to(memory_format=torch.channels_last)
    return lambda pixels: encode(vae, pixels, at_once(vae.device)).half()


def at_once(device: torch.device) -> int:
    """Pictures of the shapes world that a network encodes in a call."""
    return 8 if device.type == "cpu" else 256


@torch.no_grad()
def encoded_pictures(
    name: str, settings: JointSettings, encode: Callable[[Tensor], Tensor], network: nn.Module
) -> Tensor:
    """What `encode` makes of all pictures, (pictures, …), made once and kept in a file."""
    num, size, seed = settings.drawing.num_pictures, settings.model.image_size, settings.loop.seed
    mixed = settings.loop.precision == "bf16"
    if settings.cache is None:
        path = Path(settings.output_dir) / f"{name}.safetensors"
    else:
        kept_for = f"{name}-{size}px-{num}-seed{seed}-{module_hash(network)[:12]}"
        kept_for += "" if mixed else "-float32"
        path = Path(settings.cache) / f"{kept_for}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # another run may be making them
        if path.is_file():
            kept = load_file(path)[name]
            if len(kept) == num:
                return kept
        device = next(network.parameters()).device

        def drawn(start: int) -> Tensor:
            scenes = [picture_scene(seed, i) for i in range(start, min(start + 64, num))]
            return to_pixels([draw(scene, size) for scene in scenes])

        starts = tqdm(range(0, num, 64), desc=name, mininterval=10)
        pixels = made(drawn, starts, settings.loop.workers, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            parts = [encode(part.to(device)).cpu() for part in pixels]
        encoded = torch.cat(parts).contiguous()
        with atomic_path(path) as scratch:
            save_file({name: encoded}, scratch)
    return encoded
