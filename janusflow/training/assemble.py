"""A new model with the flow head, from a language model and a SigLIP encoder that others trained.

It is what stage 1 starts from: aligner, flow head and begin embedding are random. Writes a pipeline
folder and trains nothing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from janusflow.errors import CheckpointError, SettingsError
from janusflow.files import atomic_folder, write_json
from janusflow.models.autoencoder import SDXL_VAE, load_autoencoder, scale_factor
from janusflow.models.checkpoints import resolve_model_folder
from janusflow.models.configuration import JanusFlowConfig
from janusflow.models.modeling import JanusFlowForConditionalGeneration
from janusflow.pipeline import JanusFlowPipeline
from janusflow.processing.images import JanusFlowImageProcessor
from janusflow.processing.processor import JanusFlowProcessor
from janusflow.processing.tokenizer import load_tokenizer
from janusflow.training.outcomes import export_pipeline
from janusflow.version import __version__


@dataclass(frozen=True)
class AssembleSettings:
    """The parts."""

    task: str = "assemble"
    output_dir: str = "runs/start"
    language_model: str = ""
    """Folder or hub id of a model of the Llama architecture, with a byte-level tokenizer.json."""
    vision_model: str = "google/siglip-large-patch16-384"
    """Folder or hub id of a SigLIP model for transformers, or of its vision part."""
    vae: str = SDXL_VAE
    """Folder or hub id of the autoencoder."""
    flow: dict[str, Any] = field(default_factory=dict)
    """Sizes of the flow head, see `FlowHeadConfig`; the published ones when not given."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.language_model:
            raise SettingsError(
                "language_model is not given: name the folder or hub id of a model of the Llama "
                "architecture, by --language-model"
            )


def assemble(settings: AssembleSettings) -> Path:
    """Puts the parts together.

    Returns:
        The folder `final` of the output folder, as a run leaves one; when it is there already,
        nothing is done.

    Raises:
        CheckpointError: If a part is missing, or of another architecture.
    """
    target = Path(settings.output_dir) / "final"
    if target.is_dir():
        return target
    where = resolve_model_folder(settings.language_model)
    language_config = _config(LlamaConfig, where)
    language_model = LlamaForCausalLM.from_pretrained(where, dtype=torch.float32)
    vision = _vision_tower(settings.vision_model)
    vae = load_autoencoder(settings.vae, dtype=torch.float32)
    tokenizer = load_tokenizer(where)
    if len(tokenizer) > language_config.vocab_size:
        language_model.resize_token_embeddings(len(tokenizer))
        language_config = language_model.config
    seen = vision.config
    processor = JanusFlowProcessor(
        JanusFlowImageProcessor(
            image_size=seen.image_size, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        tokenizer,
        num_image_tokens=(seen.image_size // seen.patch_size) ** 2,
    )
    config = JanusFlowConfig(
        text_config=language_config,
        vision_config={
            "image_size": seen.image_size,
            "patch_size": seen.patch_size,
            "hidden_size": seen.hidden_size,
            "num_hidden_layers": seen.num_hidden_layers,
            "num_attention_heads": seen.num_attention_heads,
            "mlp_ratio": seen.intermediate_size / seen.hidden_size,
            "layer_norm_eps": seen.layer_norm_eps,
            "hidden_act": seen.hidden_act,
            "num_image_tokens": processor.num_image_tokens,
        },
        flow_config={
            "image_size": seen.image_size,
            "vae_scale_factor": scale_factor(vae),
            "latent_channels": vae.config.latent_channels,
            **settings.flow,
        },
        image_token_id=processor.image_token_id,
        pad_token_id=processor.pad_token_id,
    )
    torch.manual_seed(settings.seed)
    model = JanusFlowForConditionalGeneration(config)
    model.language_model.load_state_dict(language_model.state_dict())
    model.vision_model.load_state_dict(_janus_names(vision.state_dict()))
    with atomic_folder(target) as scratch:
        export_pipeline(JanusFlowPipeline(model=model, vae=vae, processor=processor), scratch)
        write_json(scratch / "parts.json", {**asdict(settings), "janusflow": __version__})
    return target


def _config(kind: type[Any], where: Path) -> Any:
    """The config of a part, which has to be of a kind."""
    found = kind.get_config_dict(where)[0]
    if found.get("model_type") != kind.model_type:
        raise CheckpointError(
            f"{where} is a model of type {found.get('model_type')!r}; expected {kind.model_type!r}"
        )
    return kind.from_pretrained(where)


def _vision_tower(where: str) -> Any:
    folder = resolve_model_folder(where)
    found = SiglipVisionConfig.get_config_dict(folder)[0]
    if found.get("model_type") not in ("siglip", "siglip_vision_model"):
        raise CheckpointError(
            f"{where} is a model of type {found.get('model_type')!r}; expected 'siglip' or "
            "'siglip_vision_model'"
        )
    return SiglipVisionModel.from_pretrained(folder, dtype=torch.float32)


def _janus_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """SigLIP's weights by the names of the Janus tower, which leaves the pooling head out."""
    renamed = {}
    for name, weight in weights.items():
        name = name.removeprefix("vision_model.")
        if not name.startswith("head."):
            renamed[name.replace("self_attn.out_proj", "self_attn.projection_layer")] = weight
    return renamed
