"""Loading model folders: every layout, and every way in which one can be wrong."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models.conftest import WriteFolder
from models.toy import (
    BOS,
    EOS,
    LONG,
    PUBLISHED_CONFIG,
    noise,
    published_tensors,
    tiny_config,
    tiny_model_of,
    write_config,
)
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models

from janusflow import CheckpointError, SettingsError
from janusflow import JanusFlowForConditionalGeneration as Model
from janusflow.models.checkpoints import identify_layout, model_folder, resolve_model_folder
from janusflow.models.janus_config import JANUS_SECTIONS
from janusflow.models.layouts import load_config
from janusflow.models.published_config import config_from_published, config_to_published

GOLDEN = Path(__file__).parents[1] / "golden"
EMBEDDING = "language_model.model.embed_tokens.weight"


def assert_same_weights(model: Any, other: Any) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.equal(ours[name], theirs[name]), name


def edited(section: str, **params: Any) -> dict[str, Any]:
    """The published config with other parameters in one section; None removes one."""
    content = json.loads(json.dumps(PUBLISHED_CONFIG))
    held = content[section]["params"] | params
    content[section]["params"] = {key: value for key, value in held.items() if value is not None}
    return content


# Loading


def test_a_published_folder_gives_the_model_with_its_weights(
    write_published: WriteFolder, tiny_model: Model
) -> None:
    model = Model.from_pretrained(write_published(), dtype=torch.float32)
    assert_same_weights(model, tiny_model)
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_loaded_model_computes_what_the_original_does(
    write_published: WriteFolder, tiny_model: Model
) -> None:
    # Buffers are in no file; wrong ones would show here.
    model = Model.from_pretrained(write_published(), dtype=torch.float32)
    ids, x = torch.tensor([LONG]), noise(1)
    ours = model.generate_latents(ids, latents=x, num_inference_steps=2)
    assert torch.equal(ours, tiny_model.generate_latents(ids, latents=x, num_inference_steps=2))
    for name, buffer in tiny_model.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name


def test_without_a_dtype_weights_keep_the_one_they_are_stored_in(
    write_published: WriteFolder,
) -> None:
    folder = write_published(dtype=torch.bfloat16)
    model = Model.from_pretrained(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.dtype == torch.bfloat16
    assert model.language_model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert Model.from_pretrained(folder, torch_dtype="float32").dtype == torch.float32
    write_config(folder, {**PUBLISHED_CONFIG, "torch_dtype": "float16"})
    assert Model.from_pretrained(folder).dtype == torch.float16


def test_a_dtype_that_is_none_is_refused(write_published: WriteFolder) -> None:
    with pytest.raises(SettingsError, match="'int8'; expected float32"):
        Model.from_pretrained(write_published(), dtype="int8")


def test_many_safetensors_with_and_without_an_index_make_one_model(
    write_published: WriteFolder, tiny_model: Model
) -> None:
    folder = write_published(weights=False)
    tensors = published_tensors(tiny_model)
    names = list(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "second.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    assert_same_weights(Model.from_pretrained(folder), tiny_model)
    weight_map = {name: file for file, held in shards.items() for name in held}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert_same_weights(Model.from_pretrained(folder), tiny_model)
    (folder / "second.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of 2 weight files: second\.safetensors"):
        Model.from_pretrained(folder)


def test_an_index_cannot_name_files_outside_its_folder(write_published: WriteFolder) -> None:
    folder = write_published(weights=False)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        Model.from_pretrained(folder)
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="no index of weights"):
        Model.from_pretrained(folder)


def test_two_files_with_the_same_tensor_are_refused(
    write_published: WriteFolder, tiny_model: Model
) -> None:
    folder = write_published(weights=False)
    for file in ("a.safetensors", "b.safetensors"):
        save_file(published_tensors(tiny_model), folder / file)
    with pytest.raises(CheckpointError, match="both hold the tensor"):
        Model.from_pretrained(folder)


def test_bin_shards_make_the_same_model(write_published: WriteFolder, tiny_model: Model) -> None:
    folder = write_published(weights=False)
    tensors = published_tensors(tiny_model)
    names = list(tensors)
    for number in range(2):
        held = {name: tensors[name] for name in names[number::2]}
        torch.save(held, folder / f"pytorch_model-0000{number + 1}-of-00002.bin")
    assert_same_weights(Model.from_pretrained(folder), tiny_model)
    with pytest.raises(CheckpointError, match="use_safetensors"):
        Model.from_pretrained(folder, use_safetensors=True)


class Evil:
    """Would write a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "ran")


def test_a_bin_file_with_code_is_refused_and_the_code_not_run(
    write_published: WriteFolder, tmp_path: Path
) -> None:
    folder = write_published(weights=False)
    torch.save({"weight": Evil(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds more than tensors") as caught:
        Model.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    torch.save({"weight": torch.zeros(2), "step": 3}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="more than tensors by name"):
        Model.from_pretrained(folder)


def test_a_device_map_places_the_whole_model(write_published: WriteFolder) -> None:
    folder = write_published()
    for device_map in ("cpu", {"": "cpu"}, "auto"):
        model = Model.from_pretrained(folder, device_map=device_map)
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    with pytest.raises(SettingsError, match="names no device"):
        Model.from_pretrained(folder, device_map="nowhere")
    with pytest.raises(SettingsError, match="no device for"):
        Model.from_pretrained(folder, device_map={"vision_model": "cpu"})


def test_an_unknown_option_is_an_error_in_every_layout(
    write_published: WriteFolder, tiny_model: Model, tmp_path: Path
) -> None:
    published = write_published()
    with pytest.raises(TypeError, match="dtipe"):
        Model.from_pretrained(published, dtipe=torch.float32)
    with pytest.raises(SettingsError, match="janusflow convert"):
        Model.from_pretrained(published, quantization_config={"load_in_4bit": True})
    tiny_model.save_pretrained(tmp_path / "ours")
    with pytest.raises(TypeError, match="dtipe"):
        Model.from_pretrained(tmp_path / "ours", dtipe=torch.float32)


def test_attention_can_be_chosen(write_published: WriteFolder) -> None:
    model = Model.from_pretrained(write_published(), attn_implementation="eager")
    assert model.language_model.config._attn_implementation == "eager"
    assert model.vision_model.config._attn_implementation == "eager"


def test_loading_says_what_it_loaded_and_draws_nothing(
    write_published: WriteFolder, caplog: pytest.LogCaptureFixture
) -> None:
    folder, state = write_published(), torch.get_rng_state()
    with caplog.at_level(logging.INFO, logger="janusflow"):
        Model.from_pretrained(folder)
    assert torch.equal(state, torch.get_rng_state())
    (message,) = [record.getMessage() for record in caplog.records]
    assert "janusflow-published layout" in message
    assert "attn_pool.q.weight" in message


# Config sections


def test_the_published_config_is_read_and_written_as_it_was() -> None:
    path = GOLDEN / "janusflow_shallow.config.json"
    content = json.loads(path.read_text())
    config = config_from_published(content, {})
    assert config.vision_config.num_hidden_layers == 2
    assert config.text_config.bos_token_id == 508
    assert config.image_token_id is None
    assert config_to_published(config) == content


@pytest.mark.parametrize(("layer", "blocks"), [(-1, 24), (0, 24), (-2, 23), (-24, 1), (3, 3)])
def test_select_layer_says_how_many_blocks_are_kept(layer: int, blocks: int) -> None:
    content = json.loads((GOLDEN / "janusflow_shallow.config.json").read_text())
    content["vision_und_enc_config"]["params"]["select_layer"] = layer
    assert config_from_published(content, {}).vision_config.num_hidden_layers == blocks


def test_pixel_mean_and_std_come_from_the_vision_section(write_published: WriteFolder) -> None:
    folder = write_published()
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    write_config(folder, edited("vision_und_enc_config", pixel_mean=mean, pixel_std=std))
    normalising, plain = Model.from_pretrained(folder), Model.from_pretrained(write_published("b"))
    assert (normalising.config.pixel_mean, normalising.config.pixel_std) == (mean, std)
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    by_hand = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(
        normalising.get_image_features(pixels), plain.get_image_features(by_hand)
    )


def write_tokenizer(folder: Path) -> dict[str, int]:
    tokens = ["a", "<image_placeholder>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"]
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in tokens[1:]])
    tokenizer.save(str(folder / "tokenizer.json"))
    return {token: tokenizer.token_to_id(token) for token in tokens}


def test_ids_of_special_tokens_come_from_the_tokenizer_by_name(
    write_published: WriteFolder,
) -> None:
    folder = write_published()
    plain = Model.from_pretrained(folder)
    assert plain.config.image_token_id is None
    assert plain.generation_config.eos_token_id == EOS
    ids = write_tokenizer(folder)
    model = Model.from_pretrained(folder)
    assert model.config.image_token_id == ids["<image_placeholder>"]
    assert model.config.pad_token_id == ids["<｜▁pad▁｜>"]
    assert model.generation_config.eos_token_id == ids["<｜end▁of▁sentence｜>"]
    assert model.generation_config.pad_token_id == ids["<｜▁pad▁｜>"]
    assert model.generation_config.bos_token_id == BOS  # not in that tokenizer
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is no tokenizer"):
        Model.from_pretrained(folder)


@pytest.mark.parametrize(
    ("section", "params", "message"),
    [
        ("vision_und_enc_config", {"model_name": "clip"}, "known: siglip_large_patch16_384"),
        ("vision_und_enc_config", {"image_size": None}, "has no 'image_size'"),
        ("vision_und_enc_config", {"select_feature": "cls"}, "knows 'same' only"),
        ("vision_und_enc_config", {"pixel_mean": [0.5] * 3}, "or neither"),
        ("vision_gen_enc_config", {"use_bias": False}, "use_bias is False"),
        ("vision_gen_enc_config", {"block_out_channels": [8, 16]}, "must be one number"),
        ("vision_gen_dec_config", {"in_channels": 48}, "in_channels is 48"),
        ("vision_gen_dec_config", {"hidden_size": 96}, "hidden_size is 96"),
    ],
)
def test_a_section_that_asks_for_another_architecture_is_refused(
    section: str, params: dict[str, Any], message: str, write_published: WriteFolder
) -> None:
    folder = write_published()
    write_config(folder, edited(section, **params))
    with pytest.raises(CheckpointError, match=message):
        Model.from_pretrained(folder)


def test_too_deep_a_cut_another_class_and_another_language_model_are_refused(
    tmp_path: Path,
) -> None:
    golden = json.loads((GOLDEN / "janusflow_shallow.config.json").read_text())
    for change, message in (
        (("vision_und_enc_config", "params", "select_layer", -25), "keeps no block of 24"),
        (("vision_gen_dec_config", "cls", "Other"), "expected 'ShallowUViTDecoder'"),
        (("language_config", "model_type", "gpt2"), "must be 'llama'"),
        (("language_config", "hidden_size", "wide"), "describes no model"),
    ):
        content = json.loads(json.dumps(golden))
        place = content
        for key in change[:-2]:
            place = place[key]
        place[change[-2]] = change[-1]
        write_config(tmp_path, content)
        with pytest.raises(CheckpointError, match=message):
            load_config(tmp_path)


# Layouts


def test_layouts_are_told_apart_by_their_sections(tmp_path: Path, tiny_model: Model) -> None:
    for name, content, layout in (
        ("Janus-Pro-7B", PUBLISHED_CONFIG, "janusflow-published"),
        (
            "JanusFlow-1.3B",
            {"model_type": "multi_modality", **{key: {} for key in JANUS_SECTIONS}},
            "janus-published",
        ),
        ("c", {"model_type": "janus", "text_config": {}}, "janus-transformers"),
    ):
        (tmp_path / name).mkdir()
        write_config(tmp_path / name, content)
        assert identify_layout(tmp_path / name) == layout
    tiny_model.save_pretrained(tmp_path / "pipeline" / "model")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    assert model_folder(tmp_path / "pipeline") == tmp_path / "pipeline" / "model"
    assert identify_layout(tmp_path / "pipeline") == "janusflow"
    assert_same_weights(Model.from_pretrained(tmp_path / "pipeline"), tiny_model)


def test_what_is_no_model_folder_is_refused(tmp_path: Path, write_published: WriteFolder) -> None:
    with pytest.raises(CheckpointError, match=r"it has no config\.json"):
        Model.from_pretrained(tmp_path)
    for content, message in (
        ({"model_type": "llama"}, "type 'llama'"),
        ([1], "must hold a JSON object"),
        ({"model_type": "multi_modality", "language_config": {}}, "lacks the sections vision_und"),
        ({"language_config": {}, "gen_head_config": {}}, "vision_config, .* of a Janus model"),
    ):
        write_config(tmp_path, content)
        with pytest.raises(CheckpointError, match=message):
            Model.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Model.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds no weights"):
        Model.from_pretrained(write_published(weights=False))


def test_folders_hub_ids_and_nothing_at_all(tmp_path: Path) -> None:
    assert resolve_model_folder(tmp_path) == tmp_path
    (tmp_path / "file").write_text("")
    for where, message in (
        (str(tmp_path / "file"), "is a file"),
        (str(tmp_path / "absent"), "no model folder"),
        ("absent", "no model folder absent; give a folder, a hub id"),
        ("janusflow-tests/absent", "is no local folder, and the hub did not give it"),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            resolve_model_folder(where)
        assert "\n" not in str(caught.value)


# Weights that do not fit


@pytest.mark.parametrize("layout", ["published", "ours"])
def test_missing_extra_and_misshapen_weights_are_named(
    layout: str, write_published: WriteFolder, tiny_model: Model, tmp_path: Path
) -> None:
    if layout == "published":
        folder = write_published()
    else:
        folder = tmp_path / "ours"
        tiny_model.save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors[EMBEDDING]
    for changed, message in (
        ({EMBEDDING: None}, f"1 weights missing: {EMBEDDING}"),
        ({"surplus": torch.zeros(1)}, "1 weights unexpected: surplus"),
        ({EMBEDDING: embedding[:-1]}, r"wrong shape: .*\[127, 64\], expected \[128, 64\]"),
        ({EMBEDDING: embedding.T.contiguous()}, r"wrong shape: .*\[64, 128\]"),
        ({EMBEDDING: embedding.to(torch.int8)}, "no floating-point numbers: .*int8"),
    ):
        held = {k: v for k, v in {**tensors, **changed}.items() if v is not None}
        save_file(held, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            Model.from_pretrained(folder)


def test_a_truncated_or_empty_safetensors_file_is_refused(write_published: WriteFolder) -> None:
    folder = write_published()
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for content in (whole[:-1], whole[: len(whole) // 2], whole[:100], b"", b"x" * 1000):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"truncated or no safetensors file") as caught:
            Model.from_pretrained(folder)
        assert "\n" not in str(caught.value)


# Saving


def test_what_is_saved_is_loaded_again_to_the_bit(fresh_model: Model, tmp_path: Path) -> None:
    fresh_model.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = Model.from_pretrained(tmp_path)
    assert_same_weights(loaded, fresh_model)
    assert loaded.config.image_token_id == fresh_model.config.image_token_id
    assert loaded.generation_config.eos_token_id == EOS


def test_tied_embeddings_are_saved_once_and_tied_again(tmp_path: Path) -> None:
    model = tiny_model_of(tiny_config(text_config={"tie_word_embeddings": True}))
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is table.weight
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert len({EMBEDDING, "language_model.lm_head.weight"} & names) == 1
    loaded = Model.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert_same_weights(loaded, model)


def test_a_model_without_a_flow_head_is_saved_and_loaded(tmp_path: Path) -> None:
    model = tiny_model_of(tiny_config(flow_config=None))
    model.save_pretrained(tmp_path)
    loaded = Model.from_pretrained(tmp_path)
    assert loaded.generation_heads == ()
    assert_same_weights(loaded, model)


def test_options_of_transformers_reach_its_loader_which_is_as_strict(
    tiny_model: Model, tmp_path: Path
) -> None:
    tiny_model.save_pretrained(tmp_path)
    loaded = Model.from_pretrained(tmp_path, offload_state_dict=None, weights_only=True)
    assert_same_weights(loaded, tiny_model)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if k != EMBEDDING}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"does not fit .*missing_keys.*embed_tokens"):
        Model.from_pretrained(tmp_path, weights_only=True)


# Memory

MEASURE = """
import sys, torch
from pathlib import Path
from janusflow import JanusFlowForConditionalGeneration as Model

def peak():  # not ru_maxrss, which begins with that of the parent
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

Model.from_pretrained(sys.argv[2])  # whatever the libraries need once
before = peak()
model = Model.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[3]))
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print((peak() - before) / weights, (peak() - before - weights) / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_takes_little_more_memory_than_the_weights(
    dtype: str, write_published: WriteFolder, tmp_path: Path
) -> None:
    # 270 MB in float32, half of it in one tensor.
    width = {"vocab_size": 2**17, "hidden_size": 256, "intermediate_size": 256}
    config = tiny_config(text_config=width, vision_config={"projection_dim": 256})
    model = Model(config)
    folder = tmp_path / "large"
    folder.mkdir()
    save_file(published_tensors(model), folder / "model.safetensors")
    write_config(folder, config_to_published(config))
    del model
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, folder, write_published(), dtype],
        capture_output=True,
        text=True,
        check=True,
    )
    assert 0.8 < float(result.stdout.split()[0]) < 1.15
