"""`janusflow ask`: an answer about pictures, word by word on a terminal."""

from __future__ import annotations

import argparse
import sys

from janusflow.commands.common import load_pipeline
from janusflow.errors import PromptError


def run(arguments: argparse.Namespace) -> None:
    """Prints the answer."""
    if not arguments.question.strip():
        raise PromptError("the question is empty; the last argument is what to ask")

    from janusflow.processing.images import load_image

    # Before the model: a file that cannot be read should not take a minute to say so.
    pictures = [load_image(image) for image in arguments.images]
    pipe = load_pipeline(arguments, pictures=False)
    content = [{"type": "image", "image": picture} for picture in pictures]
    content.append({"type": "text", "text": arguments.question})
    messages = [{"role": "user", "content": content}]
    if not sys.stdout.isatty():
        print(pipe.chat(messages, max_new_tokens=arguments.max_new_tokens))
        return
    for piece in pipe.chat(messages, max_new_tokens=arguments.max_new_tokens, stream=True):
        print(piece, end="", flush=True)
    print()
