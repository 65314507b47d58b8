from __future__ import annotations

import json
from pathlib import Path

import pytest

from janusflow import PromptError
from janusflow.processing.conversations import read_conversation
from janusflow.processing.prompts import (
    JANUS_PRO_ROLES,
    UNDERSTANDING_SYSTEM_PROMPT,
    PromptFormat,
)

CASES = json.loads(
    (Path(__file__).parents[1] / "golden" / "prompts.json").read_text(encoding="utf-8")
)["cases"]
PLAIN = PromptFormat(system_prompt="")


def published_form(case: dict) -> list[dict]:
    return [
        {"role": role, "content": text, "images": ["x.png"] * text.count("<image_placeholder>")}
        for role, text in case["messages"]
    ]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["messages"][0][1][:25])
def test_published_conversations_become_the_golden_text(case: dict) -> None:
    assert PLAIN.render(published_form(case), case["system"]) == case["prompt"]


def test_the_default_system_prompt_is_the_published_one() -> None:
    assert CASES[1]["system"] == UNDERSTANDING_SYSTEM_PROMPT
    assert PromptFormat().render(published_form(CASES[1])) == CASES[1]["prompt"]


def test_hf_messages_become_the_same_text_as_published_ones() -> None:
    parts = [{"type": "image", "image": "x.png"}, {"type": "text", "text": " What is it? "}]
    question = [{"role": "user", "content": parts}]
    assert PLAIN.render(question) == "User: <image_placeholder>\n What is it?\n\nAssistant:"
    again = [
        *question,
        {"role": "assistant", "content": "A cube."},
        {"role": "user", "content": "Sure?"},
    ]
    assert PLAIN.render(again) == (
        "User: <image_placeholder>\n What is it?\n\nAssistant: A cube.<｜end▁of▁sentence｜>"
        "User: Sure?\n\nAssistant:"
    )


def test_janus_pro_roles_are_used_for_hf_messages() -> None:
    style = PromptFormat(system_prompt="", **JANUS_PRO_ROLES)
    text = style.render([{"role": "user", "content": "a cat"}])
    assert text == "<|User|>: a cat\n\n<|Assistant|>:"


def test_a_published_question_is_answered_by_the_role_it_was_asked_in() -> None:
    assert PLAIN.render([{"role": "<|User|>", "content": "a"}]).endswith("\n\n<|Assistant|>:")
    pro = PromptFormat(system_prompt="", **JANUS_PRO_ROLES)
    assert pro.render([{"role": "User", "content": "a"}]) == "User: a\n\nAssistant:"


def test_a_system_message_wins_over_the_argument_and_both_over_the_format() -> None:
    own = PromptFormat(system_prompt="format")
    question = {"role": "user", "content": "a"}
    system = {"role": "system", "content": [{"type": "text", "text": "message"}]}
    assert own.render([system, question], "argument").startswith("message\n\nUser:")
    assert own.render([question], "argument").startswith("argument\n\nUser:")
    assert own.render([question], "").startswith("User:")
    assert own.render([question]).startswith("format\n\nUser:")


def test_many_images_in_one_message_stand_on_lines_of_their_own() -> None:
    image = {"type": "image", "image": "x.png"}
    message = {"role": "user", "content": [image, image, {"type": "text", "text": "Same?"}]}
    assert PLAIN.render([message]) == (
        "User: <image_placeholder>\n<image_placeholder>\nSame?\n\nAssistant:"
    )


def test_a_finished_conversation_is_written_down_only_when_asked_to() -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = PLAIN.render(talk, add_generation_prompt=False)
    assert text == "User: a\n\nAssistant: b<｜end▁of▁sentence｜>"
    with pytest.raises(PromptError, match="ends in the assistant's answer"):
        PLAIN.render(talk)


def test_reading_a_conversation_leaves_it_as_it_was() -> None:
    images = ["a.png"]
    talk = [{"role": "User", "content": "<image_placeholder> hm ", "images": images}]
    before = json.dumps(talk)
    assert read_conversation(talk).images == ("a.png",)
    assert json.dumps(talk) == before


def test_a_format_without_role_names_is_refused() -> None:
    with pytest.raises(PromptError, match="needs a name"):
        PromptFormat(user_role="")


IMAGE = {"type": "image", "image": "x.png"}


@pytest.mark.parametrize(
    ("talk", "message"),
    [
        ([], "conversation is empty"),
        ("What?", "list of messages, got str"),
        (["What?"], 'mapping with "role" and "content"'),
        ([{"role": "user"}], 'mapping with "role" and "content"'),
        ([{"role": "robot", "content": "a"}], "unknown role 'robot'"),
        ([{"role": ["user"], "content": "a"}], "unknown role"),
        ([{"role": "user", "content": []}], "is empty"),
        ([{"role": "user", "content": " \n"}], "is empty"),
        ([{"role": "user", "content": None}], "text or a list of parts, got NoneType"),
        ([{"role": "user", "content": [{"type": "video"}]}], "has the part .*video"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "has the part"),
        ([{"role": "user", "content": ["a"]}], "has the part 'a'"),
        ([{"role": "user", "content": [{"type": "image"}]}], 'image part without "image"'),
        ([{"role": "assistant", "content": ""}], "no user message"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}] * 2,
            "message 1 .assistant. is empty",
        ),
        (
            [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}],
            "system message comes first",
        ),
        ([{"role": "system", "content": [IMAGE]}], "holds text only"),
        ([{"role": "User", "content": [IMAGE], "images": ["y"]}], "content parts and"),
        ([{"role": "User", "content": "a", "images": "y.png"}], '"images" must be a list'),
        (
            [{"role": "User", "content": "<image_placeholder> a", "images": ["x", "y"]}],
            "1 <image_placeholder> and there are 2 images",
        ),
        (
            [{"role": "user", "content": "a", "images": ["x"]}],
            "0 <image_placeholder> and there are 1 images",
        ),
        (
            [{"role": "User", "content": "<image_placeholder> a"}],
            "1 <image_placeholder> and there are 0 images",
        ),
    ],
)
def test_a_conversation_that_makes_no_sense_is_refused(talk: object, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        PLAIN.render(talk)


@pytest.mark.parametrize(
    "talk",
    [
        [{"role": "User", "content": "<image_placeholder>", "images": ["x"]}],
        [{"role": "user", "content": [IMAGE]}],
    ],
)
def test_images_in_the_conversation_and_beside_it_are_refused(talk: list[dict]) -> None:
    with pytest.raises(PromptError, match="others were given beside it"):
        read_conversation(talk, images_apart=True)
