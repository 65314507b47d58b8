r"""How a conversation is written down for the language model.

`User: {text}\n\nAssistant:` — role, colon, space, text; a blank line after the user, the
end-of-sentence token after the assistant. Knows nothing of ids: the begin-of-sentence token is the
tokenizer's business, and so is what a placeholder grows into.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from janusflow.errors import PromptError
from janusflow.processing.conversations import (
    IMAGE_TAG,
    Conversation,
    Segment,
    Turn,
    read_conversation,
)

UNDERSTANDING_SYSTEM_PROMPT = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)

JANUS_PRO_ROLES = {"user_role": "<|User|>", "assistant_role": "<|Assistant|>"}

# Who answers a user whose role was spelled like this; None is left to the prompt format.
_ANSWERS_TO: dict[str | None, str | None] = {
    None: None,
    "User": "Assistant",
    "<|User|>": "<|Assistant|>",
}


@dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """The words and marks around what users and assistants say."""

    user_role: str = "User"
    assistant_role: str = "Assistant"
    system_prompt: str = UNDERSTANDING_SYSTEM_PROMPT
    """Stands before conversations that bring none; "" for none at all."""
    eos_token: str = "<｜end▁of▁sentence｜>"
    """Ends an assistant's message."""
    separator: str = "\n\n"
    """Ends the system prompt and a user's message."""
    image_tag: str = IMAGE_TAG

    def __post_init__(self) -> None:
        """Refuse a format that cannot be rendered."""
        if not (self.user_role and self.assistant_role):
            raise PromptError("a prompt format needs a name for the user and for the assistant")

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        system_prompt: str | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """Write a conversation of either form (`conversations`) down as text.

        Args:
            messages: the conversation.
            system_prompt: used where the conversation brings none; None takes the format's own.
            add_generation_prompt: end in `Assistant:`, ready for an answer.

        Raises:
            PromptError: the conversation is not understood, or its last word is the assistant's
                although an answer is asked for.
        """
        segments = self.segments(
            read_conversation(messages, image_tag=self.image_tag),
            system_prompt,
            add_generation_prompt=add_generation_prompt,
        )
        return "".join(segment.text for segment in segments)

    def segments(
        self,
        conversation: Conversation,
        system_prompt: str | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> list[Segment]:
        """Return the pieces of the text, each marked as the template's or somebody's own words.

        Raises:
            PromptError: an answer is asked for after the assistant's last word.
        """
        turns = conversation.turns
        if add_generation_prompt:
            if turns[-1].role == "user":
                answer = Turn("assistant", _ANSWERS_TO.get(turns[-1].printed_role), ())
                turns = (*turns, answer)
            elif turns[-1].content:
                raise PromptError(
                    "the conversation ends in the assistant's answer; end it in a user message, "
                    "or pass add_generation_prompt=False to have it written down as it is"
                )
        pieces = self._system(conversation, system_prompt)
        for turn in turns:
            pieces.append(Segment(f"{self._role(turn)}:", template=True))
            if turn.content:
                pieces += self._said(turn)
        return pieces

    def exchanges(
        self, conversation: Conversation, system_prompt: str | None = None
    ) -> list[tuple[list[Segment], list[Segment]]]:
        """Return what is asked and what is answered, exchange by exchange, for training.

        An answer begins after the colon of `Assistant:`, where generation begins, and holds the
        end-of-sentence token. Both put together are what `segments` gives.

        Raises:
            PromptError: the conversation does not end in an answer.
        """
        last = conversation.turns[-1]
        if last.role == "user" or not last.content:
            raise PromptError(
                "a conversation to learn from ends in an assistant's answer, this one in "
                f"{'a user message' if last.role == 'user' else 'an empty one'}"
            )
        asked, found = self._system(conversation, system_prompt), []
        for turn in conversation.turns:
            asked.append(Segment(f"{self._role(turn)}:", template=True))
            if turn.role == "user":
                asked += self._said(turn)
            else:
                found.append((asked, self._said(turn)))
                asked = []
        return found

    def _system(self, conversation: Conversation, system_prompt: str | None) -> list[Segment]:
        texts = (conversation.system_prompt, system_prompt, self.system_prompt)
        system = next(text for text in texts if text is not None)
        if not system:
            return []
        return [Segment(system, template=False), Segment(self.separator, template=True)]

    def _role(self, turn: Turn) -> str:
        return turn.printed_role or (self.user_role if turn.role == "user" else self.assistant_role)

    def _said(self, turn: Turn) -> list[Segment]:
        """What stands after the colon."""
        end = self.separator if turn.role == "user" else self.eos_token
        return [Segment(" ", template=True), *turn.content, Segment(end, template=True)]

    def generation(self, prompt: str, tag: str) -> list[Segment]:
        """Return the pieces of a prompt for a picture: no system prompt, `tag` at the end."""
        return [
            Segment(f"{self.user_role}: ", template=True),
            Segment(prompt.strip(), template=False),
            Segment(f"{self.separator}{self.assistant_role}:{tag}", template=True),
        ]
