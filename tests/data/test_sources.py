"""Every format of samples in its published layout, and what can be broken in it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from data.made import llava, picture, write_files, write_folder, write_lines, write_shard
from PIL import Image
from tiny import make_processor

from janusflow import SettingsError
from janusflow.data.samples import BrokenSample, Sample
from janusflow.data.shapes.language import is_held_out, scene_meaning, training_scene
from janusflow.data.sources import Source, open_source, source_settings, webdataset
from janusflow.processing.conversations import read_conversation


def opened(format: str, kind: str = "generation", **values: object) -> Source:
    return open_source("it", source_settings("it", {"format": format, "kind": kind, **values}))


def red(image: Image.Image | None) -> int:
    assert image is not None
    assert image.mode == "RGB"
    return np.asarray(image)[0, 0, 0]


def pictures_of(sample: Sample) -> list[int]:
    return [red(image) for image in read_conversation(sample.messages).images]


def texts_of(sample: Sample) -> list[str]:
    """The turns as the model reads them."""
    turns = read_conversation(sample.messages).turns
    return ["".join(piece.text for piece in turn.content) for turn in turns]


def broken(source: Source, index: int = 0) -> BrokenSample:
    with pytest.raises(BrokenSample) as caught:
        source[index]
    return caught.value


# --- a folder of pictures ----------------------------------------------------------------------


def test_a_folder_pairs_pictures_with_the_texts_of_their_names(tmp_path: Path) -> None:
    folder = write_files(
        tmp_path / "photos",
        {
            "b.JPG": picture(200, form="JPEG"),
            "b.txt": "\ufeffa bee\n",
            "sub/a.png": picture(7),
            "sub/a.txt": "  two\nlines ",
            ".hidden.png": picture(),
            "notes.md": "no picture",
        },
    )
    source = opened("folder", path=str(folder))
    assert [source[index].name for index in range(len(source))] == [
        "photos/b.JPG",
        "photos/sub/a.png",
    ]
    assert [source[index].prompt for index in range(2)] == ["a bee", "two\nlines"]
    assert abs(int(red(source[0].image)) - 200) < 3
    assert red(source[1].image) == 7


def test_a_folder_with_metadata_is_read_as_imagefolder_has_it(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "photos", {"x/1.png": picture(1), "2.png": picture(2)})
    rows = [
        {"file_name": "2.png", "text": "two", "alt": "zwei"},
        {"file_name": "x/1.png", "text": "one", "alt": "eins"},
    ]
    write_lines(folder / "metadata.jsonl", rows)
    source = opened("folder", path=str(folder))
    read = [source[index] for index in range(len(source))]
    assert [(one.name, one.prompt, red(one.image)) for one in read] == [
        ("photos/2.png", "two", 2),
        ("photos/x/1.png", "one", 1),
    ]
    assert opened("folder", path=str(folder), text_column="alt")[0].prompt == "zwei"


def test_a_caption_can_be_the_answer_to_a_question(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "photos", 2)
    source = opened("folder", "understanding", path=str(folder), question="What is it?")
    sample = source[1]
    assert sample.kind == "understanding"
    assert sample.image is None
    assert texts_of(sample) == ["<image_placeholder>\nWhat is it?", "caption 1"]
    assert pictures_of(sample) == [1]


@pytest.mark.parametrize(
    ("files", "reason", "detail"),
    [
        ({"a.png": picture()}, "no caption", "a.txt"),
        ({"a.png": picture(), "a.txt": ""}, "no caption", "0 bytes"),
        ({"a.png": picture(), "a.txt": " \n"}, "no caption", "empty"),
        ({"a.png": picture(), "a.txt": b"\xff\xfe\x00"}, "no caption", "UTF-8"),
        ({"a.png": b"", "a.txt": "a"}, "empty file", "0 bytes"),
        ({"a.png": b"text", "a.txt": "a"}, "unreadable picture", "not a picture"),
        ({"a.png": picture()[:-30], "a.txt": "a"}, "unreadable picture", "damaged"),
        (
            {"a.bmp": b"P6 40000 40000 255\n0", "a.txt": "a"},
            "unreadable picture",
            "megapixels",
        ),
        (
            {"a.bmp": picture(form="BMP")[:18] + bytes(4) + picture(form="BMP")[22:], "a.txt": "a"},
            "unreadable picture",
            "not a picture",
        ),
        ({"metadata.jsonl": "{nonsense\n"}, "bad JSON", "line 1"),
        ({"metadata.jsonl": "[1, 2]\n"[1:]}, "bad JSON", "Extra data"),
        ({"metadata.jsonl": "17\n"}, "bad JSON", "object"),
        ({"metadata.jsonl": b'{"file_name": "\xff"}'}, "bad JSON", "utf-8"),
        ({"metadata.jsonl": '{"text": "a"}'}, "bad JSON", "file_name"),
        (
            {"metadata.jsonl": '{"file_name": "b.png", "text": "a"}'},
            "missing file",
            "photos/b.png",
        ),
        ({"metadata.jsonl": '{"file_name": "a.png"}'}, "no caption", "None"),
    ],
)
def test_each_kind_of_broken_picture_or_caption_is_named(
    tmp_path: Path, files: dict[str, bytes | str], reason: str, detail: str
) -> None:
    source = opened("folder", path=str(write_files(tmp_path / "photos", files)))
    assert len(source) == 1
    found = broken(source)
    assert (found.reason, detail in found.detail) == (reason, True), found
    assert found.name.startswith("photos/")


def test_a_file_that_cannot_be_read_is_a_broken_sample(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "photos", {"a.txt": "a"})
    (folder / "a.png").mkdir()
    assert broken(opened("folder", path=str(folder))).reason == "unreadable file"


@pytest.mark.parametrize(("path", "match"), [("nowhere", "a folder"), ("", "a folder")])
def test_a_folder_that_is_not_there_is_a_mistake(path: str, match: str) -> None:
    with pytest.raises(SettingsError, match=f"source 'it': path is '{path}'.*{match}"):
        opened("folder", path=path)


def test_a_folder_without_pictures_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no pictures in .*cat\.png"):
        opened("folder", path=str(write_files(tmp_path, {"a.txt": "a"})))


# --- conversations -----------------------------------------------------------------------------


def test_llava_conversations_become_messages_that_the_processor_takes(tmp_path: Path) -> None:
    folder = write_files(tmp_path, {"pics/a.png": picture(4), "pics/b.png": picture(5)})
    rows = [
        {"image": "a.png", "conversations": llava("<image>\nWhat is it?", "A cat.", "Big?", "No.")},
        {"image": ["a.png", "b.png"], "conversations": llava("Which? <image>\n<image>", "B.")},
        {"conversations": llava("Hello", "Hi")},
        {"image": "a.png", "conversations": llava("What is it?\n<image>", "It is an <image>.")},
    ]
    lines = write_lines(folder / "talk.jsonl", rows)
    source = opened(
        "conversations", "understanding", path=str(lines), image_root=str(folder / "pics")
    )
    one, two, text, last = (source[index] for index in range(4))
    assert one.name == "talk.jsonl:0"
    assert texts_of(one) == ["<image_placeholder>\nWhat is it?", "A cat.", "Big?", "No."]
    assert pictures_of(one) == [4]
    assert texts_of(two)[0] == "Which? <image_placeholder>\n<image_placeholder>"
    assert pictures_of(two) == [4, 5]
    assert (text.kind, texts_of(text)) == ("text", ["Hello", "Hi"])
    assert texts_of(last) == ["What is it?\n<image_placeholder>", "It is an <image>."]
    for sample in (one, two, text, last):
        ids, labels, images = make_processor().training_row(sample.messages)
        assert len(ids) == len(labels)
        assert len(images) == len(pictures_of(sample))


def test_hf_conversations_hold_pictures_in_parts_or_beside(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.png": picture(4), "b.png": picture(5)})
    question = {"type": "text", "text": "What is it?", "image": None}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}

    def asked(*parts: object) -> dict[str, object]:
        system = {"role": "system", "content": "Be brief."}
        return {"messages": [system, {"role": "user", "content": [*parts, question]}, answer]}

    rows = [
        asked({"type": "image", "image": "a.png"}),
        asked({"type": "image", "path": "b.png", "text": None}),
        {**asked({"type": "image"}, {"type": "image"}), "images": ["b.png", "a.png"]},
        {"messages": [{"role": "user", "content": "<image>Who?"}, answer], "images": ["a.png"]},
        {"messages": [{"role": "user", "content": "What does <image> mean?"}, answer]},
    ]
    source = opened("conversations", "understanding", path=str(write_lines(tmp_path / "x", rows)))
    read = [source[index] for index in range(len(source))]
    assert [pictures_of(sample) for sample in read] == [[4], [5], [5, 4], [4], []]
    assert texts_of(read[0]) == ["<image_placeholder>\nWhat is it?", "A cat."]
    assert read[0].messages[0] == {"role": "system", "content": "Be brief."}
    assert texts_of(read[3])[0] == "<image_placeholder>\nWho?"
    assert texts_of(read[4])[0] == "What does <image> mean?"
    assert read[4].kind == "text"


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ({}, "bad conversation", "list of messages"),
        ({"conversations": "text"}, "bad conversation", "list of messages"),
        ({"conversations": ["text"]}, "bad conversation", "expected a message"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "bad conversation", "'tool' speaks"),
        ({"messages": [{"role": ["user"]}]}, "bad conversation", "speaks"),
        ({"messages": [{"role": "user", "content": 3}]}, "bad conversation", "text or parts"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
            "bad conversation",
            "unknown type",
        ),
        ({"conversations": llava("Hello", "")}, "bad conversation", "end in an answer"),
        ({"conversations": llava("Hello")}, "bad conversation", "end in an answer"),
        ({"conversations": llava("", "Hi")}, "bad conversation", "message 0"),
        ({"conversations": llava("<image>", "Hi")}, "bad conversation", "than pictures"),
        (
            {"image": "a.png", "conversations": llava("Who?", "I")},
            "bad conversation",
            "1 pictures for 0",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "Draw"},
                    {"role": "assistant", "content": [{"type": "image", "image": "a.png"}]},
                ]
            },
            "bad conversation",
            "message of assistant",
        ),
        ({"image": 3, "conversations": llava("<image>", "I")}, "bad conversation", "a path"),
        ({"image": "b.png", "conversations": llava("<image>", "I")}, "missing file", "b.png"),
        ({"image": "c.png", "conversations": llava("<image>", "I")}, "unreadable picture", "known"),
        ({"image": "a\0", "conversations": llava("<image>", "I")}, "unreadable file", "null"),
    ],
)
def test_each_kind_of_broken_conversation_is_named(
    tmp_path: Path, row: dict, reason: str, detail: str
) -> None:
    write_files(tmp_path, {"a.png": picture(), "c.png": "x"})
    lines = write_lines(tmp_path / "talk.jsonl", [row])
    found = broken(opened("conversations", "understanding", path=str(lines)))
    assert (found.reason, detail in found.detail) == (reason, True), found
    assert found.name == "talk.jsonl:0"


def test_a_source_of_text_takes_no_pictures(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.png": picture()})
    row = {"image": "a.png", "conversations": llava("<image>", "Hi")}
    lines = write_lines(tmp_path / "talk.jsonl", [row])
    assert broken(opened("conversations", "text", path=str(lines))).reason.startswith("picture in")


def test_lines_are_found_whatever_ends_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("janusflow.data.sources.lines._BLOCK", 5)
    rows = [json.dumps({"conversations": llava(f"Say {n}", str(n))}) for n in range(3)]
    path = tmp_path / "talk.jsonl"
    path.write_bytes(f"\n{rows[0]}\r\n\r\n\n{rows[1]}\n{rows[2]}".encode())
    source = opened("conversations", "text", path=str(path))
    assert [texts_of(source[index])[1] for index in range(len(source))] == ["0", "1", "2"]


def test_a_file_that_vanishes_breaks_its_samples(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "talk.jsonl", [{"conversations": llava("Hi", "Ho")}])
    source = opened("conversations", "text", path=str(path))
    path.unlink()
    assert broken(source).reason == "unreadable file"


@pytest.mark.parametrize(
    ("content", "values", "match"),
    [
        (None, {}, "expected a JSONL file"),
        ("", {}, "is empty"),
        ('\n [{"conversations": []}]', {}, "one JSON list.*jq"),
        ("{}", {"image_root": "nowhere"}, "image_root is 'nowhere'"),
    ],
)
def test_a_file_of_conversations_that_is_none_is_a_mistake(
    tmp_path: Path, content: str | None, values: dict, match: str
) -> None:
    path = tmp_path / "talk.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SettingsError, match=match):
        opened("conversations", "text", path=str(path), **values)


# --- WebDataset shards -------------------------------------------------------------------------


def shards(folder: Path) -> Path:
    """Two shards of three samples: captions in txt and json, and a long name."""
    long = "d" * 150
    write_shard(
        folder / "s-008.tar",
        {
            "./a.jpg": picture(10, form="PNG"),
            "./a.txt": "ten",
            "./a.json": '{"caption": "not this"}',
            "b.webp": picture(11),
            "b.json": '{"caption": "eleven"}',
            f"{long}/c.seg.png": picture(12),
            f"{long}/c.txt": "twelve",
        },
    )
    write_shard(
        folder / "s-009.tar",
        {
            f"{n}.{end}": picture(n) if end == "png" else str(n)
            for n in range(3)
            for end in ("png", "txt")
        },
    )
    write_shard(folder / "s-010.tar", {"x.png": picture(13), "x.txt": "thirteen"})
    return folder


def test_shards_are_read_by_index_in_the_order_of_their_members(tmp_path: Path) -> None:
    folder = shards(tmp_path)
    ranged = str(folder / "s-{008..010}.tar")
    for path in (
        ranged,
        str(folder / "s-*.tar"),
        [str(folder / "s-008.tar"), str(folder / "s-0[01][09].tar")],
    ):
        source = opened("webdataset", path=path)
        read = [source[index] for index in range(len(source))]
        assert [one.prompt for one in read] == [
            "ten",
            "eleven",
            "twelve",
            "0",
            "1",
            "2",
            "thirteen",
        ]
        assert [red(one.image) for one in read] == [10, 11, 12, 0, 1, 2, 13]
    assert [one.name for one in read[:2]] == ["s-008.tar:./a", "s-008.tar:b"]
    assert read[2].name.endswith("d/c")
    assert opened("webdataset", path=ranged)[5].prompt == "2"
    with pytest.raises(IndexError, match="no 7"):
        source[7]


def test_shards_hold_conversations_with_their_pictures(tmp_path: Path) -> None:
    row = {"conversations": llava("<image>\n<image>\nWhich?", "The first.")}
    path = write_shard(
        tmp_path / "s.tar",
        {
            "a.0.png": picture(1),
            "a.1.png": picture(2),
            "a.json": json.dumps(row),
            "b.json": json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": "x"},
                        {"role": "assistant", "content": "y"},
                    ]
                }
            ),
            "c.png": picture(3),
            "c.txt": "three",
        },
    )
    source = opened("webdataset", "understanding", path=str(path))
    assert pictures_of(source[0]) == [1, 2]
    assert source[1].kind == "text"
    assert texts_of(source[2])[1] == "three"
    text = opened("webdataset", "text", path=str(path))
    assert texts_of(text[1]) == ["x", "y"]
    assert broken(text, 2).reason == "bad conversation"


def test_the_index_of_a_shard_is_made_once_and_again_when_the_shard_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shards(tmp_path)
    path = folder / "s-009.tar"
    looked = []
    find = webdataset._find
    monkeypatch.setattr(webdataset, "_find", lambda p, size: looked.append(p) or find(p, size))
    for _ in range(3):
        assert len(opened("webdataset", path=str(path))) == 3
    assert looked == [path]
    index = folder / "s-009.tar.index.npz"
    assert np.load(index, allow_pickle=False)["borders"].dtype == np.int64
    os.utime(path, ns=(1, 1))
    opened("webdataset", path=str(path))
    index.write_bytes(b"cut off")
    assert len(opened("webdataset", path=str(path))) == 3
    assert looked == [path] * 3


def test_a_folder_that_cannot_be_written_costs_the_index_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(webdataset, "atomic_path", refuse)
    assert len(opened("webdataset", path=str(shards(tmp_path) / "s-009.tar"))) == 3
    assert "s-009.tar.index.npz cannot be kept (Permission denied)" in caplog.text


@pytest.mark.parametrize(
    ("members", "reason", "detail"),
    [
        ({"a.png": picture(), "a.json": "{"}, "bad JSON", "line 1"),
        ({"a.png": picture(), "a.json": "[]"}, "bad JSON", "object"),
        ({"a.png": picture(), "a.json": "{}"}, "no caption", "None"),
        ({"a.png": picture()[:-30], "a.txt": "a"}, "unreadable picture", "damaged"),
        ({"a.png": b"", "a.txt": "a"}, "unreadable picture", "0 bytes"),
        ({"a.txt": "a"}, "missing file", "no picture among txt"),
    ],
)
def test_each_kind_of_broken_member_is_named(
    tmp_path: Path, members: dict, reason: str, detail: str
) -> None:
    source = opened("webdataset", path=str(write_shard(tmp_path / "s.tar", members)))
    found = broken(source)
    assert (found.reason, detail in found.detail) == (reason, True), found
    assert found.name == "s.tar:a"


def test_damage_to_a_shard_costs_the_samples_behind_it_and_no_others(tmp_path: Path) -> None:
    path = shards(tmp_path) / "s-009.tar"
    whole = path.read_bytes()
    # Each member is a header and a block: the third sample begins at block 8.
    cut_in_text = whole[: 11 * 512 + 0]
    cut_in_header = whole[: 8 * 512 + 100]
    overwritten = whole[: 8 * 512] + b"\x07" * 1024 + whole[10 * 512 :]
    for content, reason in (
        (cut_in_text, "unreadable shard"),
        (cut_in_header, "unreadable shard"),
        (overwritten, "unreadable shard"),
        (b"", "unreadable shard"),
        (b"no tar" * 1000, "unreadable shard"),
    ):
        path.write_bytes(content)
        source = opened("webdataset", path=str(path))
        good = len(source) - 1
        assert good == (2 if len(content) > 4000 and content[:2] != b"no" else 0)
        assert [source[index].prompt for index in range(good)] == ["0", "1"][:good]
        found = broken(source, good)
        assert found.reason == reason
        assert found.name.startswith("s-009.tar:")


def test_a_shard_without_zeros_at_its_end_is_whole(tmp_path: Path) -> None:
    path = shards(tmp_path) / "s-009.tar"
    path.write_bytes(path.read_bytes()[: 12 * 512])
    source = opened("webdataset", path=str(path))
    assert [source[index].prompt for index in range(len(source))] == ["0", "1", "2"]


def test_a_shard_that_vanishes_breaks_its_samples(tmp_path: Path) -> None:
    source = opened("webdataset", path=str(shards(tmp_path) / "s-009.tar"))
    (tmp_path / "s-009.tar").unlink()
    assert broken(source).detail.endswith("No such file or directory")


@pytest.mark.parametrize("path", ["", "none-*.tar", "none-{00..01}.tar", "a.tar.gz", []])
def test_shards_that_are_not_there_or_compressed_are_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(write_files(tmp_path, {"a.tar.gz": "x"}))
    with pytest.raises(SettingsError, match="expected tar files"):
        opened("webdataset", path=path)


# --- Hugging Face datasets ---------------------------------------------------------------------


def captions(num: int = 3) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {
            "image": [{"bytes": picture(n), "path": None} for n in range(num)],
            "text": [f"caption {n}" for n in range(num)],
        },
        features=datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")}),
    )


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


def test_datasets_are_read_from_every_place_that_they_are_kept_in(
    tmp_path: Path, cache: str
) -> None:
    captions().save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": captions(), "test": captions(2)}).save_to_disk(tmp_path / "dict")
    (tmp_path / "parquet").mkdir()
    captions().to_parquet(tmp_path / "parquet" / "train-00000-of-00001.parquet")
    folder = write_files(tmp_path / "folder", {f"{n}.png": picture(n) for n in range(3)})
    rows = [{"file_name": f"{n}.png", "text": f"caption {n}"} for n in range(3)]
    write_lines(folder / "metadata.jsonl", rows)
    places = ["saved", "dict", "parquet", "parquet/train-00000-of-00001.parquet", "folder"]
    for place in places:
        source = opened("huggingface", path=str(tmp_path / place), cache_dir=cache)
        read = [source[index] for index in range(len(source))]
        assert [(one.prompt, red(one.image)) for one in read] == [
            (f"caption {n}", n) for n in range(3)
        ], place
        assert read[2].name == f"{Path(place).name}/train:2"
    assert len(opened("huggingface", path=str(tmp_path / "dict"), split="test")) == 2


def test_datasets_hold_conversations_in_columns_that_the_settings_name(tmp_path: Path) -> None:
    held = [{"bytes": picture(n), "path": None} for n in range(2)]
    rows = {
        "pics": [held, [], None],
        "talk": [llava("<image><image>Which?", "Two"), llava("Hi", "Ho"), llava("<image>", "no")],
    }
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    options = {"path": str(tmp_path / "saved"), "image_column": "pics", "messages_column": "talk"}
    source = opened("huggingface", "understanding", **options)
    assert pictures_of(source[0]) == [0, 1]
    assert source[1].kind == "text"
    assert broken(source, 2).reason == "bad conversation"
    assert opened("huggingface", "text", **options)[1].kind == "text"


def test_broken_rows_of_a_dataset_are_named(tmp_path: Path) -> None:
    held = [b"", b"nonsense", picture()[:-30], None, picture()]
    rows = {"image": held, "text": ["a", "a", "a", "a", None]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    source = opened("huggingface", path=str(tmp_path / "saved"))
    found = [broken(source, index) for index in range(5)]
    assert [one.reason for one in found] == [*["unreadable picture"] * 4, "no caption"]
    assert found[1].name == "saved/train:1"
    missing = {"image": [{"bytes": None, "path": "gone.png"}], "text": ["a"]}
    datasets.Dataset.from_dict(missing).save_to_disk(tmp_path / "missing")
    assert broken(opened("huggingface", path=str(tmp_path / "missing"))).reason == "missing file"


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"image_column": "img"}, "has no column 'img'; it has image, text"),
        ({"split": "test"}, "no split 'test'; it has train"),
        ({"path": ""}, "path is empty"),
        ({"path": "nobody/nothing"}, "datasets cannot open 'nobody/nothing'"),
        ({"messages_column": "talk"}, "leave it empty"),
        ({"kind": "text"}, "set messages_column"),
    ],
)
def test_what_a_dataset_lacks_is_a_mistake(tmp_path: Path, values: dict, match: str) -> None:
    datasets.DatasetDict({"train": captions()}).save_to_disk(tmp_path / "dict")
    with pytest.raises(SettingsError, match=match):
        opened("huggingface", **{"path": str(tmp_path / "dict"), **values})


def test_an_empty_dataset_is_a_mistake(tmp_path: Path) -> None:
    captions().select([]).save_to_disk(tmp_path / "saved", num_shards=1)
    with pytest.raises(SettingsError, match=r"the split 'train' of .* is empty"):
        opened("huggingface", path=str(tmp_path / "saved"))


def test_without_datasets_the_message_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SettingsError, match=r"pip install 'janusflow\[train\]'"):
        opened("huggingface", path="somewhere")


# --- shapes ------------------------------------------------------------------------------------


def test_shapes_are_a_source_like_any_other() -> None:
    source = opened("shapes", num_pictures=5, image_size=48, seed=3)
    sample = source[4]
    assert (len(source), sample.name) == (5, "shapes-3:4")
    assert sample.image is not None
    assert sample.image.size == (48, 48)
    again = opened("shapes", num_pictures=5, image_size=48, seed=3)[4]
    assert again.prompt == sample.prompt
    assert again.image is not None
    assert again.image.tobytes() == sample.image.tobytes()
    assert len({opened("shapes", seed=seed)[0].image.tobytes() for seed in range(5)}) == 5


def test_shapes_ask_only_about_scenes_that_are_not_held_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = []

    def remember(*args: object):
        drawn.append(training_scene(*args))
        return drawn[-1]

    monkeypatch.setattr("janusflow.data.sources.shapes.training_scene", remember)
    source = opened("shapes", "understanding", num_questions=2)
    samples = [source[index] for index in range(100)]
    assert not any(is_held_out(scene_meaning(scene)) for scene in drawn)
    assert len(drawn) == 100
    assert {len(sample.messages) for sample in samples} == {4}
    assert all(len(read_conversation(sample.messages).images) == 1 for sample in samples)


# --- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"format": "tar"}, "format is 'tar'; expected one of folder, conversations, webdataset"),
        ({"format": "folder", "kind": "drawing"}, "kind is 'drawing'.*'generation' or"),
        ({"format": "folder", "kind": "text"}, "kind is 'text'"),
        ({"format": "conversations", "kind": "generation"}, "'understanding' or 'text'"),
        ({"format": "folder", "kind": "generation", "weigt": 2}, "did you mean 'weight'"),
        ({"format": "folder", "kind": "generation", "weight": 0}, "weight is 0.0"),
        ({"format": "folder", "kind": "generation", "image_root": "x"}, "unknown setting"),
        ({"format": "shapes", "kind": "generation", "num_pictures": 0}, "num_pictures is 0"),
        ({"format": "shapes", "kind": "generation", "seed": -1}, "seed is -1"),
    ],
)
def test_a_mistake_in_a_source_names_the_source_and_the_fix(values: dict, match: str) -> None:
    with pytest.raises(SettingsError, match=f"source 'mine': .*{match}"):
        source_settings("mine", values)
