r"""Reads conversations in either form that users have them in.

Knows nothing of prompt text or ids.

Two forms, told apart for each conversation:

- HF style: `{"role": "user", "content": "…"}` or content parts,
  `[{"type": "image", "image": …}, {"type": "text", "text": "…"}]`. Text is text: a tag that
  somebody typed stays the characters that they typed.
- Published style, `{"role": "User", "content": "<image_placeholder>\n…", "images": […]}`: here
  `<image_placeholder>` stands for an image. A conversation is of this style when a message has
  "images", when a role is spelled as the published demos spell it (`User`, `<|User|>`, …), or when
  the images are handed over beside the conversation. Content parts are HF style even then.

Whether characters come from a user or from the template is kept to the end (`Segment.template`),
so that only the template's tags ever become special tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from janusflow.errors import PromptError

IMAGE_TAG = "<image_placeholder>"

Role = Literal["user", "assistant", "system"]

_ROLES: dict[str, Role] = {
    **dict.fromkeys(("user", "User", "<|User|>"), "user"),
    **dict.fromkeys(("assistant", "Assistant", "<|Assistant|>"), "assistant"),
    "system": "system",
}


class Segment(NamedTuple):
    """A piece of a prompt; only where `template` is true do tags in it mean something."""

    text: str
    template: bool


@dataclass(frozen=True)
class Turn:
    """One message of a user or an assistant."""

    role: Role
    printed_role: str | None
    """The role's name as the published form gave it; None leaves it to the prompt format."""
    content: tuple[Segment, ...]
    """The message without white space at its ends; empty where an answer is to be written."""


@dataclass(frozen=True)
class Conversation:
    """What was said, and the pictures in the order in which it speaks of them."""

    turns: tuple[Turn, ...]
    system_prompt: str | None
    """Text of its own system message, None when it has none."""
    images: tuple[Any, ...]
    """The pictures that the messages hold, unread; empty when they are handed over apart."""
    num_placeholders: int


def read_conversation(
    messages: Sequence[Mapping[str, Any]],
    *,
    images_apart: bool = False,
    image_tag: str = IMAGE_TAG,
) -> Conversation:
    """Read one conversation of either form.

    Args:
        messages: the messages, oldest first. None is modified.
        images_apart: the pictures come beside the conversation, not in it. The caller then
            compares their number with `num_placeholders`.
        image_tag: what stands for an image in published-style text.

    Raises:
        PromptError: it is empty, a message is not understood or says nothing, or the number of
            placeholders is not the number of images.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise PromptError(
            f"a conversation is a list of messages, got {type(messages).__name__}; write "
            '[{"role": "user", "content": "…"}]'
        )
    if not messages:
        raise PromptError("the conversation is empty; it needs at least one user message")
    published = images_apart or any(_is_published(message) for message in messages)
    turns: list[Turn] = []
    images: list[Any] = []
    system_prompt = None
    for index, message in enumerate(messages):
        where = f"message {index}"
        role = _read_role(message, where)
        own_images = _own_images(message, where, images_apart)
        content = message["content"]
        if isinstance(content, str):
            tag = image_tag if published and role != "system" else None
            pieces = _split_placeholders(content, tag)
        else:
            if own_images:
                raise PromptError(
                    f'{where} has content parts and "images"; put the images into the parts'
                )
            pieces, own_images = _read_parts(content, where, images_apart, image_tag)
        images += own_images
        if role == "system":
            if index or any(piece.template for piece in pieces):
                raise PromptError(f"{where}: a system message comes first and holds text only")
            system_prompt = "".join(piece.text for piece in pieces)
            continue
        turn = Turn(role, _printed(message["role"]), _strip(pieces))
        last = index == len(messages) - 1
        if not turn.content and not (role == "assistant" and last):
            raise PromptError(
                f"{where} ({message['role']}) is empty; only a last, assistant's message may be"
            )
        turns.append(turn)
    if not any(turn.role == "user" for turn in turns):
        raise PromptError("the conversation has no user message, so there is nothing to answer")
    num_placeholders = sum(piece.template for turn in turns for piece in turn.content)
    if not images_apart and num_placeholders != len(images):
        raise PromptError(count_message(num_placeholders, len(images), image_tag))
    return Conversation(tuple(turns), system_prompt, tuple(images), num_placeholders)


def count_message(num_placeholders: int, num_images: int, image_tag: str = IMAGE_TAG) -> str:
    """Say that text and images disagree, and what to do."""
    return (
        f"the text has {num_placeholders} {image_tag} and there are {num_images} images; "
        "write one placeholder for each image, where the image belongs"
    )


def _read_role(message: object, where: str) -> Role:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise PromptError(f'{where} must be a mapping with "role" and "content", got {message!r}')
    role = message["role"]
    if not isinstance(role, str) or role not in _ROLES:
        raise PromptError(f"{where} has the unknown role {role!r}; known are {', '.join(_ROLES)}")
    return _ROLES[role]


def _printed(role: str) -> str | None:
    """Return the role as the published form spells it, None for the lower-case HF names."""
    return None if role.islower() else role


def _is_published(message: object) -> bool:
    if not isinstance(message, Mapping):
        return False
    role = message.get("role")
    return "images" in message or (isinstance(role, str) and _printed(role) is not None)


def _own_images(message: Mapping[str, Any], where: str, images_apart: bool) -> list[Any]:
    """The "images" of a published-style message."""
    images = message.get("images")
    if images is None:
        return []
    if isinstance(images, (str, bytes)) or not isinstance(images, Sequence):
        raise PromptError(f'{where}: "images" must be a list, got {type(images).__name__}')
    if images and images_apart:
        raise PromptError(f"{where} has images and others were given beside it; keep one of both")
    return list(images)


def _split_placeholders(text: str, image_tag: str | None) -> list[Segment]:
    if image_tag is None:
        return [Segment(text, template=False)]
    pieces = re.split(f"({re.escape(image_tag)})", text)
    return [Segment(piece, template=n % 2 == 1) for n, piece in enumerate(pieces) if piece]


def _read_parts(
    parts: object, where: str, images_apart: bool, image_tag: str
) -> tuple[list[Segment], list[Any]]:
    """Content parts: an image is a placeholder and a line break, text is text."""
    if not isinstance(parts, Sequence) or isinstance(parts, bytes):
        raise PromptError(
            f"{where}: content must be text or a list of parts, got {type(parts).__name__}"
        )
    pieces: list[Segment] = []
    images: list[Any] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            pieces.append(Segment(part["text"], template=False))
        elif kind == "image":
            held = [part[key] for key in ("image", "path") if part.get(key) is not None]
            if images_apart and held:
                raise PromptError(
                    f"{where} has images and others were given beside it; keep one of both"
                )
            if not images_apart and not held:
                raise PromptError(f'{where} has an image part without "image"; give it a picture')
            images += held[:1]
            pieces += [Segment(image_tag, template=True), Segment("\n", template=False)]
        else:
            raise PromptError(
                f'{where} has the part {part!r}; known are {{"type": "text", "text": …}} and '
                '{"type": "image", "image": …}'
            )
    return pieces, images


def _strip(pieces: list[Segment]) -> tuple[Segment, ...]:
    """Join neighbouring text and drop white space at both ends of the message."""
    merged: list[Segment] = []
    for piece in pieces:
        if merged and not piece.template and not merged[-1].template:
            merged[-1] = Segment(merged[-1].text + piece.text, template=False)
        else:
            merged.append(piece)
    if merged and not merged[0].template:
        merged[0] = Segment(merged[0].text.lstrip(), template=False)
    if merged and not merged[-1].template:
        merged[-1] = Segment(merged[-1].text.rstrip(), template=False)
    return tuple(piece for piece in merged if piece.text)
