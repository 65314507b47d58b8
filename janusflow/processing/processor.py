"""The processor: conversations and pictures in, what the model takes out.

Axis letters: B rows, L tokens of the longest row, N images of all rows together, S image side.
Rows are padded on the left. All sizes come from the model folder; nothing here knows of weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerFast
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from janusflow.errors import CheckpointError, PromptError
from janusflow.processing.conversations import (
    IMAGE_TAG,
    Conversation,
    Segment,
    count_message,
    read_conversation,
)
from janusflow.processing.images import JanusFlowImageProcessor
from janusflow.processing.prompts import JANUS_PRO_ROLES, PromptFormat
from janusflow.processing.tokenizer import (
    BEGIN_OF_IMAGE,
    BOS_TOKEN,
    END_OF_IMAGE,
    EOS_TOKEN,
    GENERATION_TAG,
    PAD_TOKEN,
    SegmentEncoder,
    load_tokenizer,
    read_json,
)

PROCESSOR_FILE = "processor_config.json"
IMAGE_PROCESSOR_FILE = "preprocessor_config.json"

_KNOWN_SFT_FORMATS = ("deepseek", "deepseek_old")
_FORMAT_KEYS = ("user_role", "assistant_role", "system_prompt")

Messages = Sequence[Mapping[str, Any]]

IGNORED = -100
"""A label that no loss is taken of; torch's own."""


class JanusFlowProcessor(ProcessorMixin):
    """Turns conversations, prompts and pictures into model inputs, and ids into text."""

    def __init__(
        self,
        image_processor: JanusFlowImageProcessor,
        tokenizer: PreTrainedTokenizerFast,
        *,
        num_image_tokens: int,
        prompt_format: PromptFormat | None = None,
        image_start_tag: str = BEGIN_OF_IMAGE,
        image_end_tag: str = END_OF_IMAGE,
        image_gen_tag: str = GENERATION_TAG,
    ) -> None:
        """Put the parts together.

        Args:
            image_processor: makes pixel values.
            tokenizer: as `load_tokenizer` returns it: knows every tag as a single token.
            num_image_tokens: tokens that one image becomes, its begin and end tags not counted.
            prompt_format: words around messages; the published JanusFlow ones by default.
            image_start_tag: stands before the tokens of an image, and where the VQ head starts.
            image_end_tag: stands after the tokens of an image.
            image_gen_tag: stands where the flow head starts.

        Raises:
            CheckpointError: the number of image tokens is not positive, or a tag is no token.
        """
        # ProcessorMixin's own set-up looks for files of Auto classes; only its type is wanted, by
        # which diffusers knows how a pipeline saves and loads us.
        if num_image_tokens < 1:
            raise CheckpointError(f"num_image_tokens is {num_image_tokens}; expected at least 1")
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.prompt_format = prompt_format or PromptFormat()
        self.num_image_tokens = num_image_tokens
        self.image_start_tag = image_start_tag
        self.image_end_tag = image_end_tag
        self.image_gen_tag = image_gen_tag
        self.chat_template = None
        self._encode = SegmentEncoder(tokenizer)
        self.bos_token_id = self._id_of(BOS_TOKEN)
        self.eos_token_id = self._id_of(self.prompt_format.eos_token)
        self.pad_token_id = self._id_of(PAD_TOKEN)
        self.image_token_id = self._id_of(self.prompt_format.image_tag)
        self.begin_of_image_id = self._id_of(image_start_tag)
        self.end_of_image_id = self._id_of(image_end_tag)
        self.image_gen_id = self._id_of(image_gen_tag)

    def _id_of(self, tag: str) -> int:
        ids = self._encode([Segment(tag, template=True)])
        if len(ids) != 1:
            raise CheckpointError(
                f"the tokenizer makes {len(ids)} tokens of {tag}; load it with load_tokenizer, "
                "which makes it one"
            )
        return ids[0]

    def __call__(
        self,
        conversations: Messages | Sequence[Messages],
        images: Any = None,
        system_prompt: str | None = None,
        *,
        max_length: int | None = None,
        add_generation_prompt: bool = True,
    ) -> BatchFeature:
        """Return the inputs of one or many conversations about any number of images.

        Args:
            conversations: one conversation or a list of them, in either form of
                `processing.conversations`.
            images: pictures that stand beside the conversations instead of in them, in the order
                in which they are spoken of: for one conversation a picture or a list, for many a
                flat list or one list each. Anything that `load_image` reads.
            system_prompt: for conversations that bring none of their own; None takes the prompt
                format's, "" takes none.
            max_length: the most tokens that a row may have.
            add_generation_prompt: end rows in `Assistant:`, ready for the answer.

        Returns:
            `input_ids` and `attention_mask`, int64 (B, L), padded on the left; with images also
            `pixel_values`, float32 (N, 3, S, S), in the order of their placeholders.

        Raises:
            PromptError: a conversation is empty, not understood or too long, or text and images
                disagree about how many there are.
            ImageError: a picture cannot be read.
        """
        batch = _as_batch(conversations)
        read, rows = [], []
        for index, messages in enumerate(batch):
            try:
                conversation = read_conversation(
                    messages,
                    images_apart=images is not None,
                    image_tag=self.prompt_format.image_tag,
                )
                segments = self.prompt_format.segments(
                    conversation, system_prompt, add_generation_prompt=add_generation_prompt
                )
            except PromptError as error:
                raise _numbered(error, index, len(batch)) from error
            read.append(conversation)
            rows.append(self._expand_images(self._encode(segments)))
        if images is None:
            sources = [image for conversation in read for image in conversation.images]
        else:
            sources = _share(images, read)
        self._check_length(rows, max_length)
        input_ids, attention_mask = self._pad(rows)
        data = {"input_ids": input_ids, "attention_mask": attention_mask}
        if sources:
            data["pixel_values"] = self.image_processor(sources)
        return BatchFeature(data)

    def training_row(
        self, messages: Messages, system_prompt: str | None = None
    ) -> tuple[list[int], list[int], tuple[Any, ...]]:
        """Return a conversation to learn answers from.

        Args:
            messages: the conversation with its images, in either form; it ends in an answer.
            system_prompt: as for `__call__`.

        Returns:
            The ids, the begin-of-sentence token first, images as placeholders; for each the same
            id where it is part of an answer and -100 elsewhere; the images, unread.

        Raises:
            PromptError: the conversation is not understood or does not end in an answer.
        """
        conversation = read_conversation(messages, image_tag=self.prompt_format.image_tag)
        ids, labels = [self.bos_token_id], [IGNORED]
        for asked, answered in self.prompt_format.exchanges(conversation, system_prompt):
            question = self._expand_images(self._encode(asked))[1:]
            answer = self._encode(answered)
            if self.image_token_id in answer:
                raise PromptError("an answer to learn from is text; it holds an image")
            ids += question + answer
            labels += [IGNORED] * len(question) + answer
        return ids, labels, conversation.images

    def generation_prompts(
        self,
        prompts: Sequence[str],
        *,
        tag: Literal["flow", "vq"] = "flow",
        max_length: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the inputs of prompts for pictures, each ending in the head's tag.

        Args:
            prompts: what to draw, one text for each row. An empty text is an unconditional
                prompt; tags that somebody typed are plain text.
            tag: the head that is going to draw.
            max_length: the most tokens that a row may have, the tag included.

        Returns:
            `input_ids` and `attention_mask`, int64 (B, L), padded on the left.

        Raises:
            PromptError: there are no prompts, one is no text, or one is too long.
        """
        tags = {"flow": self.image_gen_tag, "vq": self.image_start_tag}
        if tag not in tags:
            raise PromptError(f"tag is {tag!r}; expected one of {', '.join(tags)}")
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise PromptError(f"prompts must be a list of texts, got {type(prompts).__name__}")
        if not prompts:
            raise PromptError("the list of prompts is empty; give at least one prompt")
        for index, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise PromptError(f"prompt {index} must be text, got {type(prompt).__name__}")
        rows = [
            [self.bos_token_id, *self._encode(self.prompt_format.generation(prompt, tags[tag]))]
            for prompt in prompts
        ]
        last = self._id_of(tags[tag])
        assert all(row[-1] == last for row in rows), "a row must end in its head's tag"
        self._check_length(rows, max_length)
        return self._pad(rows)

    def render(
        self,
        messages: Messages,
        system_prompt: str | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """Return the text of a conversation, each image still one placeholder."""
        return self.prompt_format.render(
            messages, system_prompt, add_generation_prompt=add_generation_prompt
        )

    def decode(
        self, ids: torch.Tensor | Sequence[int], skip_special_tokens: bool = True, **kwargs: Any
    ) -> str:
        """Return the text of one row of ids."""
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, **kwargs)

    def batch_decode(
        self,
        ids: torch.Tensor | Sequence[Sequence[int]],
        skip_special_tokens: bool = True,
        **kwargs: Any,
    ) -> list[str]:
        """Return the text of every row of ids."""
        return [self.decode(row, skip_special_tokens, **kwargs) for row in ids]

    def _expand_images(self, ids: list[int]) -> list[int]:
        """Put the begin-of-sentence token first and the tokens of each image in its place."""
        image = [
            self.begin_of_image_id,
            *[self.image_token_id] * self.num_image_tokens,
            self.end_of_image_id,
        ]
        row = [self.bos_token_id]
        for token in ids:
            row += image if token == self.image_token_id else [token]
        return row

    def _check_length(self, rows: list[list[int]], max_length: int | None) -> None:
        longest = max(map(len, rows))
        if max_length is not None and longest > max_length:
            raise PromptError(
                f"the prompt has {longest} tokens and at most {max_length} fit; shorten it"
            )

    def _pad(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and mask, (B, L)."""
        length = max(map(len, rows))
        gaps = [length - len(row) for row in rows]
        input_ids = [[self.pad_token_id] * gap + row for gap, row in zip(gaps, rows, strict=True)]
        mask = [[0] * gap + [1] * (length - gap) for gap in gaps]
        return torch.tensor(input_ids), torch.tensor(mask)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        prompt_format: PromptFormat | None = None,
        **hub: Any,
    ) -> JanusFlowProcessor:
        """Load the processor of a model folder, published or our own.

        Args:
            pretrained_model_name_or_path: the folder, or what `resolve_model_folder` finds.
            prompt_format: instead of the folder's. A published folder does not say how its model
                names the roles: Janus and Janus-Pro are told apart by whether the tokenizer knows
                `<|User|>`, and JanusFlow always has `User`.
            **hub: handed on to `resolve_model_folder` when there is no such folder.

        Raises:
            CheckpointError: a file is missing or broken, or asks for what is not known here.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            from janusflow.models.checkpoints import resolve_model_folder

            folder = resolve_model_folder(str(pretrained_model_name_or_path), **hub)
        config = _read_processor_config(folder / PROCESSOR_FILE)
        # One file for all in folders that transformers 5 saved.
        pictures = read_json(folder / IMAGE_PROCESSOR_FILE) or config.get("image_processor")
        if not pictures:
            raise CheckpointError(f"{folder} has no {IMAGE_PROCESSOR_FILE} with an image_size")
        tags = {
            "image_start_tag": config.get("image_start_tag", BEGIN_OF_IMAGE),
            "image_end_tag": config.get("image_end_tag", END_OF_IMAGE),
            "image_gen_tag": config.get("image_gen_tag", GENERATION_TAG),
        }
        image_tag = config.get("image_tag", IMAGE_TAG)
        tokenizer = load_tokenizer(folder, tags=[EOS_TOKEN, image_tag, *tags.values()])
        if prompt_format is None:
            saved = {key: config[key] for key in _FORMAT_KEYS if key in config}
            roles = _published_roles(folder, tokenizer)
            prompt_format = PromptFormat(**{**roles, **saved})
        return cls(
            JanusFlowImageProcessor.from_dict(pictures),
            tokenizer,
            num_image_tokens=config["num_image_tokens"],
            prompt_format=replace(prompt_format, image_tag=image_tag),
            **tags,
        )

    def save_pretrained(self, save_directory: str | os.PathLike[str], **_: Any) -> list[str]:
        """Write the files that `from_pretrained` reads, in the published layout with more keys.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        folder = Path(save_directory)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
            (folder / PROCESSOR_FILE).write_text(text, encoding="utf-8")
            self.image_processor.save_pretrained(folder)
            files = self.tokenizer.save_pretrained(folder)
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be written: {error.strerror}") from error
        return [str(folder / PROCESSOR_FILE), str(folder / IMAGE_PROCESSOR_FILE), *files]

    def to_dict(self) -> dict[str, Any]:
        """Return what processor_config.json holds."""
        return {
            "processor_class": type(self).__name__,
            "sft_format": "deepseek",
            "image_tag": self.prompt_format.image_tag,
            "image_start_tag": self.image_start_tag,
            "image_end_tag": self.image_end_tag,
            "image_gen_tag": self.image_gen_tag,
            "num_image_tokens": self.num_image_tokens,
            "add_special_token": False,
            **{key: getattr(self.prompt_format, key) for key in _FORMAT_KEYS},
        }


def _as_batch(conversations: Any) -> Sequence[Messages]:
    """Return one conversation or several as a list of them."""
    if isinstance(conversations, (str, bytes, Mapping)) or not isinstance(conversations, Sequence):
        raise PromptError(
            f"expected a conversation or a list of them, got {type(conversations).__name__}; "
            'write [{"role": "user", "content": "…"}]'
        )
    if not conversations:
        raise PromptError("there is no conversation: the list is empty")
    return [conversations] if isinstance(conversations[0], Mapping) else conversations


def _numbered(error: PromptError, index: int, total: int) -> PromptError:
    """The same error, with the conversation's place where there are several."""
    return error if total == 1 else PromptError(f"conversation {index}: {error}")


def _share(images: Any, read: list[Conversation]) -> list[Any]:
    """Return pictures given beside the conversations as one list, after counting them."""
    if isinstance(images, (str, bytes)) or not isinstance(images, Sequence):
        images = [images]
    nested = bool(images) and all(isinstance(one, (list, tuple)) for one in images)
    if nested and len(images) != len(read):
        raise PromptError(
            f"there are {len(images)} lists of images for {len(read)} conversations; give one "
            "list for each conversation"
        )
    if not nested:
        wanted = sum(one.num_placeholders for one in read)
        if len(images) != wanted:
            raise PromptError(count_message(wanted, len(images)))
        return list(images)
    for index, (own, one) in enumerate(zip(images, read, strict=True)):
        if len(own) != one.num_placeholders:
            error = PromptError(count_message(one.num_placeholders, len(own)))
            raise _numbered(error, index, len(read))
    return [image for own in images for image in own]


def _read_processor_config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    model = read_json(path.parent / "config.json")
    if model.get("model_type") == "janus":  # converted for transformers, which counts for itself
        sizes = {"image_size": 384, "patch_size": 16, **model.get("vision_config", {})}
        config.setdefault("num_image_tokens", (sizes["image_size"] // sizes["patch_size"]) ** 2)
    if not isinstance(config.get("num_image_tokens"), int):
        raise CheckpointError(
            f"{path} is missing or has no num_image_tokens; a model folder needs it"
        )
    if config.get("sft_format", _KNOWN_SFT_FORMATS[0]) not in _KNOWN_SFT_FORMATS:
        raise CheckpointError(
            f"{path} asks for the prompt format {config['sft_format']!r}; known are "
            f"{', '.join(_KNOWN_SFT_FORMATS)}"
        )
    if config.get("add_special_token"):
        raise CheckpointError(
            f"{path} sets add_special_token, with which no published model was trained; set it "
            "to false"
        )
    return config


def _published_roles(folder: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """Role names where processor_config.json has none: published code left them to its user."""
    is_janusflow = "vision_gen_dec_config" in read_json(folder / "config.json")
    knows_role = JANUS_PRO_ROLES["user_role"] in tokenizer.get_added_vocab()
    return JANUS_PRO_ROLES if knows_role and not is_janusflow else {}
