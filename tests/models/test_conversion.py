"""Converting between layouts, there and back again, and describing models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models.conftest import WriteFolder
from models.toy import (
    PUBLISHED_CONFIG,
    janus_config,
    tiny_config,
    tiny_model_of,
    write_config,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import JanusForConditionalGeneration

from janusflow import CheckpointError, SettingsError
from janusflow import JanusFlowForConditionalGeneration as Model
from janusflow.models.checkpoints import convert, describe, identify_layout, weights_hash


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert (tensor.dtype, tensor.shape) == (second[name].dtype, second[name].shape), name
        equal = torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8))
        assert equal, name


@pytest.mark.parametrize("shard_bytes", [10**9, 100_000])
def test_published_to_ours_and_back_gives_the_same_bytes(
    shard_bytes: int, write_published: WriteFolder, tmp_path: Path
) -> None:
    # Types are mixed and one number is NaN: nothing may be computed with them on the way.
    norm = torch.full((64,), torch.nan, dtype=torch.float32)
    folder = write_published(dtype=torch.bfloat16)
    held = tensors_of(folder) | {"vision_gen_dec_aligner_norm.weight": norm}
    save_file(held, folder / "model.safetensors")
    ours = convert(folder, tmp_path / "ours", shard_bytes=shard_bytes)
    assert identify_layout(ours) == "janusflow"
    shards = list(ours.glob("model*.safetensors"))
    assert len(shards) > 1 if shard_bytes < 10**9 else len(shards) == 1
    assert all(file.stat().st_size < shard_bytes + 20_000 for file in shards)
    back = convert(ours, tmp_path / "back", to="published", shard_bytes=shard_bytes)
    assert_same_tensors(tensors_of(back), held)
    assert json.loads((back / "config.json").read_text()) == PUBLISHED_CONFIG


def test_ours_to_published_and_back_gives_the_same_bytes_and_config(
    fresh_model: Model, tmp_path: Path
) -> None:
    fresh_model.to(torch.bfloat16).save_pretrained(tmp_path / "ours")
    published = convert(tmp_path / "ours", tmp_path / "published", to="published")
    assert identify_layout(published) == "janusflow-published"
    back = convert(published, tmp_path / "back")
    assert_same_tensors(tensors_of(back), tensors_of(tmp_path / "ours"))
    first, second = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "ours", back))
    assert first == second


def test_a_converted_model_loads_in_either_layout(
    write_published: WriteFolder, tiny_model: Model, tmp_path: Path
) -> None:
    convert(write_published(), tmp_path / "ours")
    loaded = Model.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    for name, tensor in tiny_model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    by_library = Model.from_pretrained(tmp_path / "ours", weights_only=True)
    for name, tensor in tiny_model.state_dict().items():
        assert torch.equal(by_library.state_dict()[name], tensor), name


def test_settings_that_published_sections_cannot_say_survive(tmp_path: Path) -> None:
    config = tiny_config(
        text_config={"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        flow_config={"kernel_size": 3, "mlp_ratio": 2, "image_size": 64, "num_encoder_blocks": 1},
        pixel_mean=[0.1, 0.2, 0.3],
        pixel_std=[0.5, 0.5, 0.6],
        drawing_defaults={"flow": {"guidance_scale": 3.0}},
    )
    tiny_model_of(config).save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "published", to="published")
    convert(tmp_path / "published", tmp_path / "back")
    first, second = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "back")
    )
    assert first == second


def test_tied_weights_survive(tmp_path: Path) -> None:
    model = tiny_model_of(tiny_config(text_config={"tie_word_embeddings": True}))
    model.save_pretrained(tmp_path / "ours")
    published = convert(tmp_path / "ours", tmp_path / "published", to="published")
    loaded = Model.from_pretrained(published)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    # Published code may have written the copy too.
    held = tensors_of(published)
    table = held["language_model.model.embed_tokens.weight"]
    save_file(
        held | {"language_model.lm_head.weight": table.clone()}, published / "model.safetensors"
    )
    assert torch.equal(Model.from_pretrained(published).get_input_embeddings().weight, table)


def test_texts_and_the_autoencoder_come_along(
    tiny_model: Model, write_published: WriteFolder, tmp_path: Path
) -> None:
    pipeline = tmp_path / "pipeline"
    tiny_model.save_pretrained(pipeline / "model")
    (pipeline / "model_index.json").write_text("{}")
    (pipeline / "processor").mkdir()
    (pipeline / "processor" / "preprocessor_config.json").write_text('{"image_size": 32}')
    (pipeline / "processor" / "code.py").write_text("")
    (pipeline / "vae").mkdir()
    save_file({"weight": torch.ones(2, 3)}, pipeline / "vae" / "model.safetensors")
    converted = convert(pipeline, tmp_path / "published", to="published")
    names = {str(file.relative_to(converted)) for file in converted.rglob("*") if file.is_file()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "vae/model.safetensors",
    }
    assert describe(converted).parameters["vae"] == 6


def test_what_cannot_be_converted_is_refused_and_leaves_nothing(
    write_published: WriteFolder, tmp_path: Path
) -> None:
    published = write_published()
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("")
    for options, error, message in (
        ({"dst": full}, CheckpointError, "exists already"),
        ({"dst": full / "file"}, CheckpointError, "exists already"),
        ({"dst": full / "file" / "new"}, CheckpointError, "cannot be written"),
        ({"dst": tmp_path / "new", "to": "onnx"}, SettingsError, "'onnx'; expected one of"),
        ({"dst": tmp_path / "new", "to": "published"}, CheckpointError, "already"),
    ):
        with pytest.raises(error, match=message):
            convert(published, **options)
    before = {file.name for file in tmp_path.iterdir()}
    for name, changes, message in (
        ("headless", {"flow_config": None}, "needs a flow head"),
        ("plain", {"learned_begin_embedding": False}, "learned begin embedding"),
        ("deep", {"vision_config": {"depth": 2}}, "one linear layer"),
    ):
        tiny_model_of(tiny_config(**changes)).save_pretrained(tmp_path / name)
        with pytest.raises(CheckpointError, match=message):
            convert(tmp_path / name, tmp_path / "new", to="published")
    assert {file.name for file in tmp_path.iterdir()} == before | {"headless", "plain", "deep"}


def test_queries_and_keys_of_different_types_cannot_become_one_tensor(
    fresh_model: Model, tmp_path: Path
) -> None:
    fresh_model.save_pretrained(tmp_path / "ours")
    held = tensors_of(tmp_path / "ours")
    name = "vision_model.encoder.layers.0.self_attn.q_proj.weight"
    held[name] = held[name].to(torch.bfloat16)
    save_file(held, tmp_path / "ours" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="must be of one type"):
        convert(tmp_path / "ours", tmp_path / "new", to="published")


def test_a_description_counts_parameters_by_part(
    write_published: WriteFolder, tiny_model: Model
) -> None:
    info = describe(write_published(dtype=torch.bfloat16))
    total = sum(parameter.numel() for parameter in tiny_model.parameters())
    assert info.total_parameters == total
    assert info.parameters["flow head"] == sum(p.numel() for p in tiny_model.flow_head.parameters())
    assert info.parameters["aligner"] == 48 * 64 + 64 + 64
    assert (info.layout, info.heads, info.dtype) == ("janusflow-published", ("flow",), "bfloat16")
    assert info.memory == {"float32": 4 * total, "bfloat16": 2 * total}
    assert info.num_bytes == 2 * (total + 48 + 48 * 48)  # the unused weights are on disk
    assert len(info.unused) == 2
    assert len(info.weights_hash) == 64


def test_a_broken_checkpoint_is_not_described(write_published: WriteFolder) -> None:
    folder = write_published(changes={"beg_of_und_embed": None})
    with pytest.raises(CheckpointError, match="beg_of_und_embed"):
        describe(folder)


def test_the_hash_knows_names_numbers_types_and_shapes_but_not_files(tmp_path: Path) -> None:
    def hash_of(tensors: dict[str, Tensor], files: int = 1) -> str:
        folder = tmp_path / "hashed"
        folder.mkdir(exist_ok=True)
        for file in folder.iterdir():
            file.unlink()
        names = list(tensors)
        for number in range(files):
            held = {name: tensors[name] for name in names[number::files]}
            save_file(held, folder / f"{number}.safetensors")
        return weights_hash(folder)

    base = {"a": torch.zeros(2, 3), "b": torch.ones(4), "c": torch.tensor(1.0)}
    known = hash_of(base)
    assert hash_of(base, files=2) == known
    assert hash_of(dict(reversed(base.items()))) == known
    for changed in (
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3, dtype=torch.int32)},
        {"b": torch.tensor([1.0, 1.0, 1.0, 1.5])},
        {"d": torch.zeros(1)},
    ):
        assert hash_of(base | changed) != known
    write_config(tmp_path / "hashed", {"anything": 1})
    assert hash_of(base) == known


# Janus


def janus_folder(folder: Path) -> Path:
    """A Janus model in the published layout, with what nobody reads, of mixed types."""
    model = tiny_model_of(janus_config())
    model.to(torch.bfloat16).save_pretrained(folder / "made")
    published = convert(folder / "made", folder / "published", to="published")
    held = tensors_of(published) | {
        "gen_vision_model.quantize.codebook_used": torch.zeros(16),
        "vision_model.vision_tower.attn_pool.latent": torch.randn(1, 1, 48),
        "gen_embed.weight": torch.full((48, 4), torch.nan),
    }
    save_file(held, published / "model.safetensors")
    return published


def test_janus_goes_round_all_layouts_and_comes_back_the_same(tmp_path: Path) -> None:
    published = janus_folder(tmp_path)
    assert identify_layout(published) == "janus-published"
    held = tensors_of(published)
    config = json.loads((published / "config.json").read_text())
    ours = convert(published, tmp_path / "ours")
    theirs = convert(ours, tmp_path / "theirs", to="transformers")
    assert identify_layout(theirs) == "janus-transformers"
    assert load_file(theirs / "model.safetensors").keys() >= {
        "lm_head.weight",
        "model.language_model.norm.weight",
        "model.vqmodel.encoder.mid.attn_1.q.weight",
        "model.generation_aligner.hidden_layers.0.weight",
    }
    for source, name in ((ours, "a"), (theirs, "b"), (convert(theirs, tmp_path / "c"), "d")):
        back = convert(source, tmp_path / f"back-{name}", to="published")
        assert_same_tensors(tensors_of(back), held)
        assert json.loads((back / "config.json").read_text()) == config


def test_what_janus_draws_with_survives_in_all_layouts(tmp_path: Path) -> None:
    ours = convert(janus_folder(tmp_path), tmp_path / "ours")
    config = json.loads((ours / "config.json").read_text())
    config["drawing_defaults"] = {"vq": {"guidance_scale": 2.0, "temperature": 0.5}}
    (ours / "config.json").write_text(json.dumps(config))
    theirs = convert(ours, tmp_path / "theirs", to="transformers")
    published = convert(theirs, tmp_path / "there", to="published")
    back = convert(published, tmp_path / "back")
    assert json.loads((back / "config.json").read_text()) == config
    JanusForConditionalGeneration.from_pretrained(theirs)  # reads past it


def test_janus_shards_of_bin_files_load(tmp_path: Path) -> None:
    published = janus_folder(tmp_path)
    held = load_file(published / "model.safetensors")
    (published / "model.safetensors").unlink()
    names = sorted(held)
    index = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: held[name] for name in part}, published / file)
        index |= dict.fromkeys(part, file)
    (published / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    loaded = Model.from_pretrained(published, dtype=torch.float32)
    made = Model.from_pretrained(tmp_path / "made", dtype=torch.float32)
    for name, tensor in made.state_dict().items():
        if name != "vq_head.embeddings.weight":
            assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_janus_config_that_asks_for_what_is_not_there_is_refused(tmp_path: Path) -> None:
    published = janus_folder(tmp_path)
    path = published / "config.json"
    good = path.read_text()
    for old, new, message in (
        ("mlp_gelu", "low_high_hybrid_split_mlp_gelu", "projector_type is 'low_high"),
        ('"VQ-16"', '"VQ-8"', "cls is 'VQ-8'; expected 'VQ-16'"),
        ('"image_token_size": 48', '"image_token_size": 49', "image_token_size|wrong shape"),
    ):
        assert old in good
        path.write_text(good.replace(old, new, 1))
        with pytest.raises(CheckpointError, match=message):
            Model.from_pretrained(published)


def test_info_counts_the_vq_head(tmp_path: Path) -> None:
    info = describe(janus_folder(tmp_path))
    assert info.heads == ("vq",)
    assert info.layout == "janus-published"
    assert info.parameters["VQ head"] > 100_000
    assert len(info.unused) == 2


def test_a_head_of_the_language_model_that_is_stored_is_not_tied(tmp_path: Path) -> None:
    theirs = convert(janus_folder(tmp_path), tmp_path / "theirs", to="transformers")
    path = theirs / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "tie_word_embeddings": True}))
    loaded = Model.from_pretrained(theirs)
    assert loaded.get_output_embeddings().weight is not loaded.get_input_embeddings().weight
    held = load_file(theirs / "model.safetensors")
    del held["lm_head.weight"]
    save_file(held, theirs / "model.safetensors", metadata={"format": "pt"})
    loaded = Model.from_pretrained(theirs)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
