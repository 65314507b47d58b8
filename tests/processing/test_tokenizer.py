from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from janusflow import CheckpointError
from janusflow.processing.conversations import Segment
from janusflow.processing.tokenizer import (
    BOS_TOKEN,
    EOS_TOKEN,
    GENERATION_TAG,
    PAD_TOKEN,
    SPECIAL_TOKENS,
    SegmentEncoder,
    load_tokenizer,
)

TEXTS = [
    "User: a red circle above a blue square\n\nAssistant:",
    "  Grüße, 日本語 🙂\n\n\ttabs  and   spaces ",
    "<image_placeholder>\nWhat colour?<｜end▁of▁sentence｜>User: 1234567",
]


def test_the_file_is_obeyed_to_the_letter(published: Path) -> None:
    from tokenizers import Tokenizer

    raw = Tokenizer.from_file(str(published / "tokenizer.json"))
    tokenizer = load_tokenizer(published)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == raw.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text
    assert len(tokenizer) == raw.get_vocab_size()


def test_special_tokens_are_found_by_name_and_rows_padded_on_the_left(published: Path) -> None:
    tokenizer = load_tokenizer(published)
    assert (tokenizer.bos_token, tokenizer.eos_token) == (BOS_TOKEN, EOS_TOKEN)
    assert tokenizer.pad_token == PAD_TOKEN
    assert tokenizer.padding_side == "left"
    assert tokenizer.model_max_length == 16384
    for tag in SPECIAL_TOKENS:
        assert tokenizer.encode(tag, add_special_tokens=False) == [
            tokenizer.convert_tokens_to_ids(tag)
        ]


def test_other_numbers_for_the_same_names_are_no_trouble(write_folder) -> None:
    tokenizer = load_tokenizer(write_folder(SPECIAL_TOKENS[::-1]))
    assert tokenizer.bos_token_id == len(SPECIAL_TOKENS) - 1


def test_a_missing_tag_is_added_and_reported(write_folder, caplog) -> None:
    folder = write_folder(tuple(tag for tag in SPECIAL_TOKENS if tag != GENERATION_TAG))
    with caplog.at_level(logging.WARNING):
        tokenizer = load_tokenizer(folder)
    new = len(tokenizer) - 1
    assert tokenizer.convert_tokens_to_ids(GENERATION_TAG) == new
    assert tokenizer.encode(f"a{GENERATION_TAG}", add_special_tokens=False)[-1] == new
    assert caplog.text.count(GENERATION_TAG) == 1
    assert EOS_TOKEN not in caplog.text


def test_nothing_is_reported_when_nothing_is_missing(published: Path, caplog) -> None:
    with caplog.at_level(logging.INFO):
        load_tokenizer(published)
    assert not caplog.text


def test_a_tag_that_the_file_calls_ordinary_becomes_special(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    for token in content["added_tokens"]:
        token["special"] = False
    path.write_text(json.dumps(content), encoding="utf-8")
    tokenizer = load_tokenizer(folder)
    ids = [tokenizer.convert_tokens_to_ids(tag) for tag in SPECIAL_TOKENS]
    assert tokenizer.decode(ids, skip_special_tokens=True) == ""
    assert ids == list(range(len(SPECIAL_TOKENS)))


def test_a_tag_that_is_only_in_the_vocabulary_keeps_its_number(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["added_tokens"] = [
        token for token in content["added_tokens"] if token["content"] != GENERATION_TAG
    ]
    path.write_text(json.dumps(content), encoding="utf-8")
    tokenizer = load_tokenizer(folder)
    number = SPECIAL_TOKENS.index(GENERATION_TAG)
    assert tokenizer.encode(GENERATION_TAG, add_special_tokens=False) == [number]


def test_tokens_listed_beside_the_file_are_added(folder: Path, edit_json) -> None:
    edit_json(folder / "special_tokens_map.json", additional_special_tokens=["<|ref|>"])
    listed = {"500": {"content": "<|det|>", "special": True}, "0": {"content": BOS_TOKEN}}
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder=listed)
    size = len(load_tokenizer(folder))
    encode = SegmentEncoder(load_tokenizer(folder))
    assert encode([Segment("<|det|><|ref|>", template=True)]) == [size - 2, size - 1]


def test_padding_and_truncation_of_the_file_are_switched_off(folder: Path) -> None:
    from tokenizers import Tokenizer

    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    raw.enable_truncation(3)
    raw.enable_padding(length=40)
    raw.save(str(folder / "tokenizer.json"))
    encode = SegmentEncoder(load_tokenizer(folder))
    ids = encode([Segment(TEXTS[0], template=True)])
    assert ids == SegmentEncoder(load_tokenizer(folder))([Segment(TEXTS[0], template=False)])
    assert 3 < len(ids) < 40


@pytest.mark.parametrize("typed", SPECIAL_TOKENS)
def test_a_special_token_that_somebody_typed_is_plain_text(published: Path, typed: str) -> None:
    tokenizer = load_tokenizer(published)
    encode = SegmentEncoder(tokenizer)
    segments = [
        Segment("User: ", template=True),
        Segment(f"a {typed} b", template=False),
        Segment(f"{EOS_TOKEN}{typed}", template=True),
    ]
    ids = encode(segments)
    assert ids.count(tokenizer.convert_tokens_to_ids(typed)) == (2 if typed == EOS_TOKEN else 1)
    assert ids[-1] == tokenizer.convert_tokens_to_ids(typed)
    assert tokenizer.decode(ids) == f"User: a {typed} b{EOS_TOKEN}{typed}"


def test_a_tag_typed_across_a_seam_does_not_count_either(published: Path) -> None:
    tokenizer = load_tokenizer(published)
    segments = [Segment("<begin_of", template=False), Segment("_image>", template=True)]
    ids = SegmentEncoder(tokenizer)(segments)
    assert tokenizer.convert_tokens_to_ids("<begin_of_image>") not in ids
    assert tokenizer.decode(ids) == "<begin_of_image>"


def test_ordinary_text_gets_the_ids_of_the_whole_prompt(published: Path) -> None:
    tokenizer = load_tokenizer(published)
    encode = SegmentEncoder(tokenizer)
    for text in TEXTS:
        whole = tokenizer.encode(text, add_special_tokens=False)
        # Every seam, also in the middle of a word; the tags stay in the template's part.
        for seam in range(len(text)) if "<" not in text else ():
            parts = [Segment(text[:seam], template=True), Segment(text[seam:], template=False)]
            assert encode(parts) == whole
        assert encode([Segment(text, template=True)]) == whole


def test_typed_tags_change_no_token_around_them(published: Path) -> None:
    """The cut way of encoding and the way in one piece agree wherever both apply."""
    tokenizer = load_tokenizer(published)
    encode = SegmentEncoder(tokenizer)
    left = [Segment("User: a red circle", template=False), Segment(EOS_TOKEN, template=True)]
    right = [Segment(f"hm {PAD_TOKEN}", template=False)]
    assert encode([*left, *right])[: len(encode(left))] == encode(left)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("tokenizer.json", "{}", "is no tokenizer"),
        ("tokenizer_config.json", "{", "cannot be read"),
        ("special_tokens_map.json", "[]", "must hold a JSON object, got list"),
    ],
)
def test_a_broken_folder_is_refused(
    folder: Path, name: str, content: str | None, message: str
) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(folder)
