"""The names that scripts for the published Janus and JanusFlow code use, over this package's parts.

Change the import lines of such a script and it runs:

    from janusflow.compat import MultiModalityCausalLM, VLChatProcessor, load_pil_images

Importing it also lets `AutoModelForCausalLM.from_pretrained` load the published folders. A view, no
second implementation: what is computed is computed by `janusflow.models` and
`janusflow.processing`. Axes: B rows, L tokens, n pictures of a row, N tokens of a picture, E width
of the language model, D channels of an adapter, h w rows and columns of tokens.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.cache_utils import DynamicCache

from janusflow.errors import SettingsError
from janusflow.models.modeling import JanusFlowForConditionalGeneration
from janusflow.processing.conversations import read_conversation
from janusflow.processing.images import load_image
from janusflow.processing.processor import JanusFlowProcessor
from janusflow.processing.tokenizer import BOS_TOKEN

__all__ = [
    "BatchedVLChatProcessorOutput",
    "MultiModalityCausalLM",
    "VLChatProcessor",
    "VLChatProcessorOutput",
    "load_pil_images",
]


class MultiModalityCausalLM(JanusFlowForConditionalGeneration):
    """A published model under its published names.

    `language_model` takes what published loops give it: an empty tuple of past keys and values, or
    a tuple of them by layer.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.language_model.model.register_forward_pre_hook(_accept_tuples, with_kwargs=True)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *_: Any, **kwargs: Any
    ) -> MultiModalityCausalLM:
        """Loads as `JanusFlowForConditionalGeneration` does; no code of the folder is run."""
        for name in ("trust_remote_code", "config", "adapter_kwargs", "_commit_hash"):
            kwargs.pop(name, None)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def prepare_inputs_embeds(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        images_seq_mask: Tensor | None = None,
        images_emb_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Embeddings (B, L, E) of ids (B, L), features of pictures (B, n, 3, H, W) in their places.

        The masks say what the ids say, too, and are not needed.
        """
        token = self.config.image_token_id
        no_pictures = token is not None and not bool(torch.eq(input_ids, token).any())
        if pixel_values is None or no_pictures:
            return self.embed(input_ids)
        return self.embed(input_ids, pixel_values.to(self.dtype))

    # VQ head

    @property
    def gen_vision_model(self) -> _Tokenizer:
        """The VQ tokenizer."""
        self.require_head("vq")
        return _Tokenizer(self)

    @property
    def gen_embed(self) -> nn.Module:
        """Table of image tokens."""
        self.require_head("vq")
        return self.vq_head.embeddings

    @property
    def gen_aligner(self) -> nn.Module:
        """Rows of the table to the language model's inputs."""
        self.require_head("vq")
        return self.vq_head.aligner

    @property
    def gen_head(self) -> nn.Module:
        """Hidden states to logits of image tokens."""
        self.require_head("vq")
        return self.vq_head.head

    def prepare_gen_img_embeds(self, image_ids: Tensor) -> Tensor:
        """The language model's inputs (…, E) for image tokens (…)."""
        self.require_head("vq")
        return self.vq_head.embed(image_ids)

    # Flow head

    def vision_gen_enc_model(
        self, latents: Tensor, timesteps: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Features (B, D, h, w), time embedding (B, E) and the decoder's skips.

        Args:
            latents: (B, C, H/8, W/8).
            timesteps: 1000 t, (B,).
        """
        self.require_head("flow")
        tokens = self.flow_head.tokens(latents, timesteps.float() / 1000)
        skip = tokens.skip.contiguous()  # published loops take a view of it
        return skip, tokens.time_embedding, [skip]

    @property
    def vision_gen_enc_aligner(self) -> nn.Module:
        """Features of the encoder to the language model's inputs."""
        self.require_head("flow")
        return self.flow_head.encoder_aligner

    @property
    def vision_gen_dec_aligner_norm(self) -> nn.Module:
        """Norm of the language model's states."""
        self.require_head("flow")
        return self.flow_head.decoder_norm

    @property
    def vision_gen_dec_aligner(self) -> nn.Module:
        """The language model's states to features of the decoder."""
        self.require_head("flow")
        return self.flow_head.decoder_aligner

    def vision_gen_dec_model(
        self, features: Tensor, skips: Sequence[Tensor], time_embedding: Tensor
    ) -> Tensor:
        """Velocity (B, C, H/8, W/8) of features (B, D, h, w); `skips` are left as they are."""
        self.require_head("flow")
        sequence = rearrange(features, "b d h w -> b (h w) d")
        return self.flow_head.decoder(sequence, skips[-1], time_embedding)


def _accept_tuples(
    module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    past = options.get("past_key_values")
    if isinstance(past, tuple | list):
        options = {**options, "past_key_values": DynamicCache(past) if past else None}
    return arguments, options


class _Tokenizer:
    """The VQ tokenizer as published code calls it."""

    def __init__(self, model: MultiModalityCausalLM) -> None:
        self._head = model.vq_head

    def decode_code(
        self, code_b: Tensor, shape: Sequence[int] | None = None, channel_first: bool = True
    ) -> Tensor:
        """Pixels (B, 3, H, W) of tokens.

        Args:
            code_b: (B, N), or any shape of as many when `shape` is given.
            shape: (B, width of a code, h, w), or with the width last.
            channel_first: Which of both.

        Raises:
            SettingsError: If the shape is not that of the codes.
        """
        tokenizer = self._head.tokenizer
        side, width = self._head.config.num_patches, self._head.config.embed_dim
        if shape is None:
            batch, rows, columns = code_b.shape[0], side, side
        elif channel_first:
            batch, given, rows, columns = shape
        else:
            batch, rows, columns, given = shape
        if shape is not None and (given != width or batch * rows * columns != code_b.numel()):
            raise SettingsError(
                f"shape {list(shape)} does not fit {tuple(code_b.shape)} codes of width {width}"
            )
        vectors = nn.functional.normalize(tokenizer.quantize.embedding(code_b.long()), dim=-1)
        grid = vectors.reshape(batch, rows, columns, width).permute(0, 3, 1, 2)
        return tokenizer.decoder(tokenizer.post_quant_conv(grid))

    def encode(self, x: Tensor) -> tuple[Tensor, None, tuple[None, None, Tensor]]:
        """Codes' vectors (B, width, h, w) of pictures (B, 3, H, W), and tokens (B · N,) last."""
        tokens = self._head.encode(x)
        table = self._head.tokenizer.quantize.embedding
        vectors = nn.functional.normalize(table(tokens), dim=-1)
        rows = x.shape[-2] * self._head.config.num_patches // self._head.image_size
        grid = rearrange(vectors, "b (h w) d -> b d h w", h=rows)
        return grid, None, (None, None, tokens.flatten())


@dataclass
class _Output:
    """Inputs of the model; a mapping for `**`, with the text that they were made of beside them."""

    def keys(self) -> Iterator[str]:
        """Names of the fields."""
        return iter(field.name for field in fields(self))

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def to(self, device: Any, dtype: torch.dtype | None = None) -> Any:
        """Moves the tensors, and brings pixels to `dtype`; the model brings them to its own."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed = dtype if dtype is not None and value.is_floating_point() else value.dtype
                setattr(self, field.name, value.to(device, changed))
        return self


@dataclass
class VLChatProcessorOutput(_Output):
    """One conversation: text, ids (L,), pixels (n, 3, H, W) and each picture's tokens (n,)."""

    sft_format: str
    input_ids: Tensor
    pixel_values: Tensor
    num_image_tokens: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass
class BatchedVLChatProcessorOutput(_Output):
    """Conversations: texts, ids and masks (B, L), pixels (B, n, 3, H, W), pictures' tokens."""

    sft_format: list[str]
    input_ids: Tensor
    pixel_values: Tensor
    attention_mask: Tensor
    images_seq_mask: Tensor
    images_emb_mask: Tensor


class VLChatProcessor:
    """A published processor under its published names.

    Args:
        processor: The processor that does the work.
    """

    def __init__(self, processor: JanusFlowProcessor) -> None:
        self.processor = processor
        self.image_processor = processor.image_processor
        self.tokenizer = _with_begin_token(processor)
        self.image_tag = processor.prompt_format.image_tag
        self.image_start_tag = processor.image_start_tag
        self.image_end_tag = processor.image_end_tag
        self.image_gen_tag = processor.image_gen_tag
        self.num_image_tokens = processor.num_image_tokens
        self.system_prompt = processor.prompt_format.system_prompt
        self.sft_format = "deepseek"
        self.image_id = processor.image_token_id
        self.image_start_id = processor.begin_of_image_id
        self.image_end_id = processor.end_of_image_id
        self.pad_id = processor.pad_token_id
        self.ignore_id = -100

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> VLChatProcessor:
        """Loads the processor of a model folder or hub id; no code of the folder is run."""
        kwargs.pop("trust_remote_code", None)
        return cls(JanusFlowProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs))

    def apply_sft_template_for_multi_turn_prompts(
        self,
        conversations: Sequence[Mapping[str, Any]],
        sft_format: str = "deepseek",
        system_prompt: str = "",
    ) -> str:
        """The text of a conversation, pictures still placeholders.

        Raises:
            SettingsError: If the format is not the published models'.
        """
        if sft_format != "deepseek":
            raise SettingsError(f"sft_format is {sft_format!r}; the models know 'deepseek' only")
        conversation = read_conversation(
            _without_images(conversations), images_apart=True, image_tag=self.image_tag
        )
        segments = self.processor.prompt_format.segments(
            conversation, system_prompt, add_generation_prompt=False
        )
        return "".join(segment.text for segment in segments)

    def __call__(
        self,
        *,
        prompt: str | None = None,
        conversations: Sequence[Mapping[str, Any]] | None = None,
        images: Sequence[Any] | None = None,
        force_batchify: bool = True,
        **_: Any,
    ) -> VLChatProcessorOutput | BatchedVLChatProcessorOutput:
        """Inputs of one conversation, or of a text that is its whole prompt.

        Args:
            prompt: A text, instead of a conversation.
            conversations: Messages of the published form, the last one empty for an answer.
            images: Its pictures, in order.
            force_batchify: Give a batch of one.

        Raises:
            SettingsError: If both or neither are given.
        """
        if (prompt is None) == (conversations is None):
            raise SettingsError("give either prompt or conversations")
        pictures = list(images or [])
        if conversations is not None:
            text = self.apply_sft_template_for_multi_turn_prompts(
                conversations, self.sft_format, self.system_prompt
            )
            inputs = self.processor(
                [_without_images(conversations)],
                [pictures],
                system_prompt=self.system_prompt,
                add_generation_prompt=False,
            )
            ids = inputs["input_ids"][0]
        else:
            text = str(prompt)
            ids = torch.tensor(
                self.processor._expand_images(self.tokenizer.encode(text, add_special_tokens=False))
            )
        size = self.image_processor.image_size
        pixels = self.image_processor(pictures) if pictures else torch.zeros(0, 3, size, size)
        output = VLChatProcessorOutput(
            text, ids, pixels, torch.full((len(pictures),), self.num_image_tokens)
        )
        return self.batchify([output]) if force_batchify else output

    def batchify(
        self, prepare_list: Sequence[VLChatProcessorOutput]
    ) -> BatchedVLChatProcessorOutput:
        """One batch of several conversations, padded on the left."""
        length = max(map(len, prepare_list))
        most = max(1, *(len(one.pixel_values) for one in prepare_list))
        rows = len(prepare_list)
        size = self.image_processor.image_size
        ids = torch.full((rows, length), self.pad_id)
        mask = torch.zeros(rows, length, dtype=torch.long)
        pixels = torch.zeros(rows, most, 3, size, size)
        used = torch.zeros(rows, most, self.num_image_tokens, dtype=torch.bool)
        for row, one in enumerate(prepare_list):
            ids[row, -len(one) :] = one.input_ids
            mask[row, -len(one) :] = 1
            pixels[row, : len(one.pixel_values)] = one.pixel_values
            used[row, : len(one.pixel_values)] = True
        texts = [one.sft_format for one in prepare_list]
        return BatchedVLChatProcessorOutput(texts, ids, pixels, mask, ids == self.image_id, used)


def _without_images(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in message.items() if key != "images"} for message in messages
    ]


def _with_begin_token(processor: JanusFlowProcessor) -> Any:
    """The tokenizer, beginning each text with the begin-of-sentence token as the published one."""
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS_TOKEN} $A", special_tokens=[(BOS_TOKEN, processor.bos_token_id)]
    )
    return tokenizer


def load_pil_images(conversations: Sequence[Mapping[str, Any]]) -> list[Image.Image]:
    """The pictures that published-style messages name: paths, or `data:image/…;base64,…` texts."""
    return [load_image(image) for message in conversations for image in message.get("images", [])]


class _PublishedConfig(PreTrainedConfig):
    """Stands for the published config.json until the model reads it."""

    model_type = "multi_modality"


class _FromFolder:
    """What `AutoModelForCausalLM` calls for a published folder."""

    from_pretrained = MultiModalityCausalLM.from_pretrained


AutoConfig.register(_PublishedConfig.model_type, _PublishedConfig, exist_ok=True)
AutoModelForCausalLM.register(_PublishedConfig, _FromFolder, exist_ok=True)
