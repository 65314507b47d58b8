"""Samples for training, and how captions and conversations of other people's files become them.

A sample is a decoded picture with a prompt to draw it from, or a conversation that ends in an
answer. Nothing here knows of tokens, or of where the rows lie on a disk.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from janusflow.errors import ImageError, PromptError
from janusflow.processing.conversations import read_conversation
from janusflow.processing.images import load_image

if TYPE_CHECKING:
    from janusflow.data.shapes.language import Request

KINDS = ("understanding", "generation", "text")

Messages = tuple[dict[str, Any], ...]
LoadPicture = Callable[[Any], Image.Image]

_IMAGE_TAG = "<image>"  # LLaVA's; the model's own placeholder is no tag in a user's text
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant"), "assistant"),
    "system": "system",
}


class BrokenSample(Exception):
    """A sample that cannot be learned from.

    Attributes:
        reason: A few words, the same for all samples that are broken in this way.
        detail: What exactly is wrong with this one.
        name: Where it comes from, once that is known.
    """

    def __init__(self, reason: str, detail: str, name: str = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.name = name


@dataclass(frozen=True)
class Sample:
    """One thing to learn from."""

    kind: str
    """"generation", "understanding" (a conversation about pictures) or "text" (one without)."""
    name: str
    """Where it comes from, such as "photos/cat.png" or "shard-000.tar:00012"."""
    image: Image.Image | None = None
    """What is to be drawn, RGB; None for conversations, whose messages hold their pictures."""
    ends: tuple[Tensor, Tensor] | None = None
    """Instead of a picture: the noise and the latents that a path is to join, (1, C, h, w)."""
    prompt: str = ""
    """What it is to be drawn from; empty for conversations."""
    request: Request | None = None
    """What the prompt asks for, where that can be judged: in the shapes world."""
    messages: Messages = ()
    """HF-style messages that end in an answer, their pictures RGB; empty for generation."""
    entropy: tuple[int, ...] = ()
    """What `rng` starts from; the stream sets it."""

    def rng(self) -> np.random.Generator:
        """A new generator for what is drawn at random about this sample, such as its crop.

        It is the same whenever the sample comes from this place of its stream, another one in
        another epoch.
        """
        return np.random.default_rng(self.entropy)


def read_file(path: str | Path) -> bytes:
    """The bytes of a file.

    Raises:
        BrokenSample: It is missing, cannot be read, or is empty.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise BrokenSample("missing file", f"there is no {path}") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = getattr(error, "strerror", None) or error
        raise BrokenSample("unreadable file", f"{path}: {reason}") from None
    if not content:
        raise BrokenSample("empty file", f"{path} has 0 bytes")
    return content


def decode_picture(content: bytes) -> Image.Image:
    """The picture in the bytes of an image file, RGB.

    Raises:
        BrokenSample: It is no picture, damaged, or too large to be read safely.
    """
    try:
        return load_image(content)
    except ImageError as error:
        raise BrokenSample("unreadable picture", str(error)) from None


def parse_object(content: bytes) -> dict[str, Any]:
    """The JSON object in a file or a line.

    Raises:
        BrokenSample: It is none.
    """
    try:
        row = json.loads(content)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise BrokenSample("bad JSON", str(error)) from None
    if not isinstance(row, dict):
        raise BrokenSample("bad JSON", f"expected an object, got {row!r:.80}")
    return row


def caption_sample(
    kind: str, picture: Callable[[], Image.Image], caption: Any, question: str, name: str
) -> Sample:
    """A sample of a picture and its caption.

    Args:
        kind: "generation" (the caption is the prompt) or "understanding" (it is the answer).
        picture: Reads the picture; called when there is a caption.
        caption: What the file has as the caption.
        question: What the caption answers, for understanding.
        name: Where the sample comes from.

    Raises:
        BrokenSample: There is no caption, or the picture cannot be read.
    """
    if not isinstance(caption, str) or not caption.strip():
        found = "an empty one" if isinstance(caption, str) else repr(caption)
        raise BrokenSample("no caption", f"expected text, found {found}")
    caption, image = caption.strip(), picture()
    if kind == "generation":
        return Sample("generation", name, image=image, prompt=caption)
    asked = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return Sample(
        "understanding",
        name,
        messages=({"role": "user", "content": asked}, {"role": "assistant", "content": caption}),
    )


def conversation_of(row: Mapping[str, Any]) -> tuple[Any, list[Any]]:
    """The messages and the pictures beside them of a row in LLaVA's or the HF layout."""
    messages = row.get("conversations")
    if messages is None:
        messages = row.get("messages")
    beside = row.get("images")
    if beside is None:
        beside = row.get("image")
    if beside is None:
        return messages, []
    return messages, list(beside) if isinstance(beside, (list, tuple)) else [beside]


def conversation_sample(
    kind: str, messages: Any, beside: Sequence[Any], load: LoadPicture, name: str
) -> Sample:
    """A sample of a conversation in LLaVA's layout (from, value) or the HF one (role, content).

    Pictures stand in content parts, or beside the conversation: then `<image>` in a text, or an
    image part without its own, stands for the next of them.

    Args:
        kind: The kind of its source. In one for understanding, a conversation without pictures
            becomes a sample of kind "text".
        messages: What the file has as the conversation.
        beside: What the file has as the pictures of the whole conversation.
        load: Reads a picture as the file has it.
        name: Where the sample comes from.

    Raises:
        BrokenSample: The conversation is not understood, does not end in an answer, does not fit
            its pictures, or one of them cannot be read.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise BrokenSample("bad conversation", f"expected a list of messages, got {messages!r:.80}")
    waiting = iter(beside)
    converted = tuple(_message(message, waiting, bool(beside)) for message in messages)
    pictures = [part for message in converted for part in _image_parts(message)]
    num_unused = len(list(waiting))
    if num_unused:
        raise BrokenSample(
            "bad conversation",
            f"{len(beside)} pictures for {len(beside) - num_unused} {_IMAGE_TAG} in the text",
        )
    if kind == "text" and pictures:
        raise BrokenSample("picture in a text source", "set the kind of the source: understanding")
    try:
        last = read_conversation(converted).turns[-1]
    except PromptError as error:
        raise BrokenSample("bad conversation", str(error)) from None
    if last.role != "assistant" or not last.content:
        raise BrokenSample("bad conversation", "it does not end in an answer")
    for part in pictures:
        part["image"] = load(part["image"])
    return Sample("understanding" if pictures else "text", name, messages=converted)


def _image_parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    parts = [] if isinstance(content, str) else [part for part in content if "image" in part]
    if parts and message["role"] != "user":
        raise BrokenSample("bad conversation", f"a picture in a message of {message['role']}")
    return parts


def _message(message: Any, waiting: Iterator[Any], beside: bool) -> dict[str, Any]:
    """One message in HF style, its pictures as the file has them."""
    if not isinstance(message, Mapping):
        raise BrokenSample("bad conversation", f"expected a message, got {message!r:.80}")
    published = "from" in message
    speaker, content = (
        (message["from"], message.get("value"))
        if published
        else (message.get("role"), message.get("content"))
    )
    role = _ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise BrokenSample(
            "bad conversation", f"{speaker!r:.80} speaks; expected one of {', '.join(_ROLES)}"
        )
    if isinstance(content, str):
        if role != "user" or not (published or beside) or _IMAGE_TAG not in content:
            return {"role": role, "content": content.strip()}
        return {"role": role, "content": list(_split(content, waiting))}
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise BrokenSample("bad conversation", f"expected text or parts, got {content!r:.80}")
    return {"role": role, "content": [_part(part, waiting) for part in content]}


def _split(text: str, waiting: Iterator[Any]) -> Iterator[dict[str, Any]]:
    """Text and pictures in turn; an image part brings the line break after it itself."""
    for index, piece in enumerate(re.split(f"{_IMAGE_TAG}\n?", text)):
        if index:
            yield _next_image(waiting)
        if piece:
            yield {"type": "text", "text": piece}


def _part(part: Any, waiting: Iterator[Any]) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "image":
        own = [part[key] for key in ("image", "path") if part.get(key) is not None]
        return {"type": "image", "image": own[0]} if own else _next_image(waiting)
    raise BrokenSample("bad conversation", f"a part of unknown type: {part!r:.80}")


def _next_image(waiting: Iterator[Any]) -> dict[str, Any]:
    for picture in waiting:
        return {"type": "image", "image": picture}
    raise BrokenSample("bad conversation", f"more {_IMAGE_TAG} in the text than pictures")
