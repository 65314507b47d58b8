"""From what a user holds — sentences, conversations, pictures — to what a model takes.

`conversations` reads both message forms, `prompts` renders them to text, `tokenizer` turns text
into ids, `images` turns pictures into pixel values, and `processor` puts the four together. Names
are imported when they are first asked for, so that prompt text alone needs no transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from janusflow.processing.conversations import read_conversation
    from janusflow.processing.images import JanusFlowImageProcessor, load_image
    from janusflow.processing.processor import JanusFlowProcessor
    from janusflow.processing.prompts import PromptFormat
    from janusflow.processing.tokenizer import load_tokenizer

__all__ = [
    "JanusFlowImageProcessor",
    "JanusFlowProcessor",
    "PromptFormat",
    "load_image",
    "load_tokenizer",
    "read_conversation",
]

# Name -> the module of this folder that holds it.
_LAZY = {
    "JanusFlowImageProcessor": "images",
    "JanusFlowProcessor": "processor",
    "PromptFormat": "prompts",
    "load_image": "images",
    "load_tokenizer": "tokenizer",
    "read_conversation": "conversations",
}


def __getattr__(name: str) -> object:
    """Import a public name on first use."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, those not yet imported included."""
    return sorted({*globals(), *__all__})
