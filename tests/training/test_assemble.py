"""A new model from parts that others trained: they compute in it what they computed alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from janusflow import CheckpointError, JanusFlowPipeline, SettingsError
from janusflow.models.checkpoints import resolve_model_folder
from janusflow.settings import fill
from janusflow.training.assemble import AssembleSettings, assemble
from janusflow.training.run import run

TINY = resolve_model_folder("tiny")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    language = LlamaConfig(
        vocab_size=500,  # fewer than the tokenizer has
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(language).save_pretrained(folder / "language")
    shutil.copy(TINY / "processor" / "tokenizer.json", folder / "language")
    vision = SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        patch_size=8,
    )
    SiglipVisionModel(vision).save_pretrained(folder / "vision")
    return {"language": folder / "language", "vision": folder / "vision"}


def settings_of(parts: dict[str, Path], folder: Path, **changes: Any) -> AssembleSettings:
    values = {
        "output_dir": str(folder),
        "language_model": str(parts["language"]),
        "vision_model": str(parts["vision"]),
        "vae": str(TINY / "vae"),
        "flow": {"hidden_size": 16, "time_frequencies": 16, "kernel_size": 3},
    }
    return fill(AssembleSettings, {**values, **changes})


@torch.no_grad()
def test_parts_compute_what_they_computed_alone(parts: dict[str, Path], tmp_path: Path) -> None:
    folder = assemble(settings_of(parts, tmp_path))
    pipe = JanusFlowPipeline.from_pretrained(folder)
    assert pipe.model.generation_heads == ("flow",)
    language = LlamaForCausalLM.from_pretrained(parts["language"], dtype=torch.bfloat16).float()
    ids = torch.tensor([[5, 9, 200, 31]])
    found = pipe.model(input_ids=ids).logits[..., :500]
    torch.testing.assert_close(found, language(input_ids=ids).logits, atol=1e-5, rtol=0)
    vision = SiglipVisionModel.from_pretrained(parts["vision"], dtype=torch.bfloat16).float()
    pixels = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(
        pipe.model.vision_model(pixels).last_hidden_state,
        vision(pixels).last_hidden_state,
        atol=1e-5,
        rtol=0,
    )
    out = pipe("a red circle", num_inference_steps=2, seed=0)
    assert out.images[0].size == (64, 64)
    assert isinstance(pipe.chat([{"role": "user", "content": "Hello"}], max_new_tokens=2), str)
    assert (folder / "parts.json").is_file()


def test_a_stage_starts_from_it(parts: dict[str, Path], tmp_path: Path) -> None:
    config = tmp_path / "start.yaml"
    config.write_text(f"task: assemble\nlanguage_model: {parts['language']}\n")
    options = [
        f"vision_model={parts['vision']}",
        f"vae={TINY / 'vae'}",
        f"output_dir={tmp_path / 'start'}",
        "flow={hidden_size: 16, time_frequencies: 16, kernel_size: 3}",
    ]
    assert run(config, options)
    made = (tmp_path / "start" / "final" / "parts.json").stat().st_mtime_ns
    assert run(config, options), "a second time there is nothing to do"
    assert (tmp_path / "start" / "final" / "parts.json").stat().st_mtime_ns == made
    stage = tmp_path / "stage.yaml"
    stage.write_text(
        f"""task: stage
model: {tmp_path / "start" / "final"}
output_dir: {tmp_path / "stage"}
data:
  threads: 0
  sources:
    drawing: {{format: shapes, kind: generation, num_pictures: 20}}
    looking: {{format: shapes, kind: understanding, num_pictures: 20, num_questions: 1}}
packing: {{length: 256}}
alignment: {{layer: 2, width: 16}}
loop: {{steps: 2, precision: "no", log_every: 1}}
"""
    )
    assert run(stage)
    before, after = (
        JanusFlowPipeline.from_pretrained(tmp_path / name / "final").model.state_dict()
        for name in ("start", "stage")
    )
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert {name.split(".")[0] for name in changed} == {"aligner", "begin_embedding", "flow_head"}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"language_model": ""}, SettingsError, "by --language-model"),
        ({"language_model": "nowhere at all"}, CheckpointError, "no model folder"),
        ({"vision_model": "language"}, CheckpointError, "type 'llama'; expected 'siglip'"),
        ({"language_model": "vision"}, CheckpointError, "type 'siglip_vision_model'; expected"),
    ],
)
def test_parts_of_another_kind_are_refused(
    parts: dict[str, Path], tmp_path: Path, changes: dict[str, str], error: Any, message: str
) -> None:
    changes = {name: str(parts.get(value, value)) for name, value in changes.items()}
    with pytest.raises(error, match=message):
        assemble(settings_of(parts, tmp_path, **changes))
    assert not (tmp_path / "final").exists()
