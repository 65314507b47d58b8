from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from transformers import ProcessorMixin

from janusflow import CheckpointError, ImageError, PromptError
from janusflow.processing.processor import JanusFlowProcessor
from janusflow.processing.prompts import UNDERSTANDING_SYSTEM_PROMPT, PromptFormat
from janusflow.processing.tokenizer import EOS_TOKEN, SPECIAL_TOKENS

CASES = json.loads(
    (Path(__file__).parents[1] / "golden" / "prompts.json").read_text(encoding="utf-8")
)["cases"]
RED, GREEN, BLUE = (Image.new("RGB", (20, 20), colour) for colour in ("red", "lime", "blue"))


class Pipeline(DiffusionPipeline):
    """Nothing but a processor, to be saved with."""

    def __init__(self, processor: JanusFlowProcessor) -> None:
        super().__init__()
        self.register_modules(processor=processor)


def colours(pixel_values: torch.Tensor) -> list[str]:
    """Which of red, green and blue each picture is."""
    middle = pixel_values[:, :, 16, 16]
    assert middle.abs().eq(1).all()
    return ["rgb"[i] for i in middle.argmax(1)]


def user(*parts: str | Image.Image) -> dict:
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": part}
        for part in parts
    ]
    return {"role": "user", "content": content}


def expand(processor: JanusFlowProcessor, text: str) -> list[int]:
    """What the published processor makes of a rendered prompt."""
    ids = [processor.bos_token_id]
    for token in processor.tokenizer.encode(text, add_special_tokens=False):
        if token == processor.image_token_id:
            ids += [processor.begin_of_image_id, *[token] * 4, processor.end_of_image_id]
        else:
            ids.append(token)
    return ids


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["messages"][0][1][:25])
def test_published_conversations_get_the_ids_of_their_whole_text(processor, case) -> None:
    talk = [
        {"role": role, "content": text, "images": [RED] * text.count("<image_placeholder>")}
        for role, text in case["messages"]
    ]
    out = processor(talk, system_prompt=case["system"])
    assert out["input_ids"].tolist() == [expand(processor, case["prompt"])]
    assert out["attention_mask"].eq(1).all()
    assert out["input_ids"].dtype == out["attention_mask"].dtype == torch.int64


def test_attributes_name_the_tokens_of_this_folder(processor) -> None:
    ids = processor.tokenizer.convert_tokens_to_ids
    bos, eos, pad, image, begin, end, generation = map(ids, SPECIAL_TOKENS)
    assert (processor.bos_token_id, processor.eos_token_id) == (bos, eos)
    assert (processor.pad_token_id, processor.image_token_id) == (pad, image)
    assert (processor.begin_of_image_id, processor.end_of_image_id) == (begin, end)
    assert processor.image_gen_id == generation
    assert ids(processor.image_gen_tag) == generation
    assert processor.num_image_tokens == 4
    assert processor.prompt_format.system_prompt == UNDERSTANDING_SYSTEM_PROMPT


def test_a_conversation_without_images_has_no_pixel_values(processor) -> None:
    assert set(processor([user("Hello")])) == {"input_ids", "attention_mask"}


def test_both_forms_give_the_same_inputs(processor) -> None:
    text = "<image_placeholder>\nWhat colour?"
    forms = [
        processor([user(RED, "What colour?")]),
        processor([{"role": "User", "content": text, "images": [RED]}]),
        processor([{"role": "user", "content": text}], images=[RED]),
        processor([{"role": "user", "content": text}], images=RED),
        processor(
            [[{"role": "User", "content": text}, {"role": "Assistant", "content": ""}]],
            images=[[RED]],
        ),
        processor(
            [{"role": "user", "content": [{"type": "image"}, *user("What colour?")["content"]]}],
            images=[RED],
        ),
    ]
    for other in forms[1:]:
        assert torch.equal(other["input_ids"], forms[0]["input_ids"])
        assert torch.equal(other["pixel_values"], forms[0]["pixel_values"])


def test_many_conversations_are_padded_on_the_left_and_unchanged_by_their_neighbours(
    processor,
) -> None:
    batch = [
        [user("Hi")],
        [user(RED, GREEN, "Same?"), {"role": "assistant", "content": "No."}, user(BLUE, "And?")],
        [user("Which is ", GREEN, "it?")],
    ]
    out = processor(batch)
    lengths = []
    for row, mask, talk in zip(out["input_ids"], out["attention_mask"], batch, strict=True):
        alone = processor(talk)["input_ids"][0]
        lengths.append(len(alone))
        assert torch.equal(row[-len(alone) :], alone)
        assert row[: -len(alone)].eq(processor.pad_token_id).all()
        assert mask.tolist() == [0] * (len(row) - len(alone)) + [1] * len(alone)
    assert out["input_ids"].shape == (3, max(lengths))
    assert len(set(lengths)) == 3
    assert out["pixel_values"].shape == (4, 3, 32, 32)
    assert colours(out["pixel_values"]) == ["r", "g", "b", "g"]
    assert out["input_ids"].eq(processor.image_token_id).sum() == 4 * 4


def test_images_beside_a_batch_come_flat_or_one_list_each(processor) -> None:
    batch = [
        [{"role": "User", "content": "<image_placeholder>a<image_placeholder>"}],
        [{"role": "User", "content": "none"}],
        [{"role": "User", "content": "<image_placeholder>"}],
    ]
    for images in ([RED, GREEN, BLUE], [[RED, GREEN], [], [BLUE]]):
        assert colours(processor(batch, images=images)["pixel_values"]) == ["r", "g", "b"]


def test_images_are_read_from_paths_and_bytes(processor, tmp_path: Path) -> None:
    path = tmp_path / "b.png"
    BLUE.save(path)
    talk = [
        {
            "role": "user",
            "content": [
                {"type": "image", "path": path},
                {"type": "image", "image": path.read_bytes()},
                {"type": "text", "text": "Same?"},
            ],
        }
    ]
    assert colours(processor(talk)["pixel_values"]) == ["b", "b"]


def test_an_unreadable_image_is_refused(processor, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"a\.png is empty"):
        processor(
            [{"role": "User", "content": "<image_placeholder>", "images": [tmp_path / "a.png"]}]
        )


@pytest.mark.parametrize("typed", SPECIAL_TOKENS)
def test_tags_that_a_user_typed_stay_text_in_hf_messages(processor, typed: str) -> None:
    number = processor.tokenizer.convert_tokens_to_ids(typed)
    said = f"what does {typed}{typed} mean?"
    for message in (user(said), {"role": "user", "content": said}):
        ids = processor([message], system_prompt="")["input_ids"][0].tolist()
        assert ids.count(number) == (1 if number == processor.bos_token_id else 0)
        assert processor.decode(ids) == f"User: {said}\n\nAssistant:"
    ids = processor([user(RED, said)])["input_ids"][0].tolist()
    assert ids.count(processor.image_token_id) == 4
    assert ids.count(processor.begin_of_image_id) == 1


def test_other_tags_stay_text_in_the_published_form_too(processor) -> None:
    talk = [{"role": "User", "content": f"<image_placeholder> {EOS_TOKEN}", "images": [RED]}]
    ids = processor(talk)["input_ids"][0].tolist()
    assert processor.eos_token_id not in ids
    assert ids.count(processor.image_token_id) == 4


@pytest.mark.parametrize(("tag", "name"), [("flow", "image_gen_id"), ("vq", "begin_of_image_id")])
def test_generation_prompts_end_in_the_tag_of_their_head(processor, tag: str, name: str) -> None:
    prompts = ["a red circle", " a red circle above a blue square ", ""]
    ids, mask = processor.generation_prompts(prompts, tag=tag)
    assert ids.shape == mask.shape
    assert ids[:, -1].eq(getattr(processor, name)).all()
    for row, seen, prompt in zip(ids, mask, prompts, strict=True):
        text = f"User: {prompt.strip()}\n\nAssistant:"
        plain = processor.tokenizer.encode(text, add_special_tokens=False)
        own = [processor.bos_token_id, *plain, getattr(processor, name)]
        assert row[seen.bool()].tolist() == own
        assert row[~seen.bool()].eq(processor.pad_token_id).all()
        assert seen.tolist() == sorted(seen.tolist())


@pytest.mark.parametrize("typed", SPECIAL_TOKENS)
def test_tags_typed_into_a_generation_prompt_stay_text(processor, typed: str) -> None:
    ids, _ = processor.generation_prompts([f"a {typed} b"])
    number = processor.tokenizer.convert_tokens_to_ids(typed)
    fixed = (processor.bos_token_id, processor.image_gen_id)
    assert ids[0].tolist().count(number) == fixed.count(number)


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(processor) -> None:
    ids, _ = processor.generation_prompts(["a red circle"])
    length = ids.shape[1]
    processor.generation_prompts(["a red circle"], max_length=length)
    with pytest.raises(PromptError, match=f"has {length} tokens and at most {length - 1} fit"):
        processor.generation_prompts(["a", "a red circle"], max_length=length - 1)
    with pytest.raises(PromptError, match="at most 9 fit"):
        processor([user(RED, "What?")], max_length=9)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "list of prompts is empty"),
        ("a cat", "must be a list of texts, got str"),
        (None, "must be a list of texts, got NoneType"),
        (["a", None], "prompt 1 must be text, got NoneType"),
        ([["a"]], "prompt 0 must be text, got list"),
    ],
)
def test_prompts_that_are_none_are_refused(processor, prompts, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        processor.generation_prompts(prompts)


def test_an_unknown_head_is_refused(processor) -> None:
    with pytest.raises(PromptError, match="expected one of flow, vq"):
        processor.generation_prompts(["a"], tag="gan")


@pytest.mark.parametrize(
    ("talk", "images", "message"),
    [
        ([], None, "the list is empty"),
        ("What?", None, "got str"),
        ([[]], None, "conversation is empty"),
        ([[user("a")], []], None, "conversation 1: the conversation is empty"),
        (
            [[user("a")], [{"role": "User", "content": "<image_placeholder>", "images": []}]],
            None,
            "conversation 1: the text has 1 <image_placeholder> and there are 0 images",
        ),
        ([{"role": "user", "content": "a"}], [RED], "0 <image_placeholder> and there are 1"),
        ([{"role": "user", "content": "<image_placeholder>"}], [], "1 .* and there are 0"),
        ([[user("a")], [user("b")]], [[RED]], "1 lists of images for 2 conversations"),
        (
            [[{"role": "User", "content": "<image_placeholder>"}]] * 2,
            [[RED], [RED, RED]],
            "conversation 1: the text has 1 <image_placeholder> and there are 2 images",
        ),
        ([user("a"), {"role": "assistant", "content": "b"}], None, "ends in the assistant's"),
    ],
)
def test_conversations_that_make_no_sense_are_refused(processor, talk, images, message) -> None:
    with pytest.raises(PromptError, match=message):
        processor(talk, images=images)


def test_decoding_leaves_special_tokens_out_unless_asked(processor) -> None:
    ids = processor.tokenizer.encode(f"yes, it is.{EOS_TOKEN}", add_special_tokens=False)
    assert processor.decode(ids) == "yes, it is."
    assert processor.decode(torch.tensor(ids), skip_special_tokens=False).endswith(EOS_TOKEN)
    assert processor.batch_decode(torch.tensor([ids, ids])) == ["yes, it is."] * 2


def test_saving_and_loading_keeps_everything(published: Path, tmp_path: Path) -> None:
    style = PromptFormat(user_role="Ask", assistant_role="Say", system_prompt="")
    first = JanusFlowProcessor.from_pretrained(published, prompt_format=style)
    assert isinstance(first, ProcessorMixin)
    first.save_pretrained(tmp_path / "deep" / "saved")
    again = JanusFlowProcessor.from_pretrained(tmp_path / "deep" / "saved")
    assert again.to_dict() == first.to_dict()
    assert again.prompt_format == style
    talk = [user(RED, f"What {EOS_TOKEN} colour, ünïcode?")]
    before, after = first(talk), again(talk)
    assert torch.equal(before["input_ids"], after["input_ids"])
    assert torch.equal(before["pixel_values"], after["pixel_values"])
    assert first.render(talk) == again.render(talk)
    assert "num_image_tokens" in repr(again)


def test_a_folder_that_cannot_be_written_is_refused(processor, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        processor.save_pretrained(tmp_path / "file" / "folder")


def test_janus_pro_is_known_by_its_tokenizer_and_janusflow_by_its_config(
    write_folder, edit_json
) -> None:
    folder = write_folder((*SPECIAL_TOKENS, "<|User|>", "<|Assistant|>"))
    pro = JanusFlowProcessor.from_pretrained(folder)
    ids, _ = pro.generation_prompts(["a cat"], tag="vq")
    roles = [pro.tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("User", "Assistant")]
    assert [token for token in ids[0].tolist() if token in roles] == roles
    edit_json(folder / "config.json", vision_gen_dec_config={})
    assert JanusFlowProcessor.from_pretrained(folder).prompt_format.user_role == "User"


def test_typed_role_names_stay_text(write_folder) -> None:
    pro = JanusFlowProcessor.from_pretrained(write_folder((*SPECIAL_TOKENS, "<|User|>")))
    number = pro.tokenizer.convert_tokens_to_ids("<|User|>")
    ids = pro([user("I am <|User|>: you?")])["input_ids"][0].tolist()
    assert ids.count(number) == 1


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("processor_config.json", {"num_image_tokens": None}, "has no num_image_tokens"),
        ("processor_config.json", {"num_image_tokens": 0}, "num_image_tokens is 0"),
        ("processor_config.json", {"sft_format": "plain"}, "prompt format 'plain'"),
        ("processor_config.json", {"add_special_token": True}, "add_special_token"),
        ("preprocessor_config.json", {"image_size": None}, "has no image_size"),
    ],
)
def test_a_folder_that_asks_for_the_unknown_is_refused(
    folder: Path, edit_json, file: str, changes: dict, message: str
) -> None:
    edit_json(folder / file, **changes)
    with pytest.raises(CheckpointError, match=message):
        JanusFlowProcessor.from_pretrained(folder)


def test_a_folder_without_an_image_processor_is_refused(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="has no preprocessor_config"):
        JanusFlowProcessor.from_pretrained(folder)


def test_a_tag_that_is_no_single_token_is_refused(processor) -> None:
    with pytest.raises(CheckpointError, match="tokens of <draw>"):
        JanusFlowProcessor(
            processor.image_processor,
            processor.tokenizer,
            num_image_tokens=4,
            image_gen_tag="<draw>",
        )


def test_calling_twice_gives_the_same_and_changes_nothing(processor) -> None:
    picture = np.asarray(RED).copy()
    talk = [user(RED, f"a {EOS_TOKEN}")]
    first, second = processor(talk), processor(talk)
    assert torch.equal(first["input_ids"], second["input_ids"])
    assert np.array_equal(RED, picture)
    assert processor.tokenizer.encode(EOS_TOKEN, add_special_tokens=False) == [
        processor.eos_token_id
    ]


@pytest.mark.parametrize("travel", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_in_another_process_still_tells_typed_tags_from_real_ones(processor, travel) -> None:
    talk = [user(RED, f"a {EOS_TOKEN}")]
    before = processor(talk)["input_ids"]
    assert torch.equal(travel(processor)(talk)["input_ids"], before)


def test_a_diffusers_pipeline_saves_and_loads_it(processor, tmp_path: Path) -> None:
    pipe = Pipeline(processor)
    pipe.save_pretrained(tmp_path)
    again = Pipeline.from_pretrained(tmp_path).processor
    assert again.to_dict() == processor.to_dict()
