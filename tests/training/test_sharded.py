"""configs/accelerate as accelerate's launcher reads it; a stage in the shards of fsdp.yaml."""

from __future__ import annotations

import json
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from launching import ACCELERATE, TESTS, launched
from safetensors.torch import load_file
from tiny import make_pipeline
from toy_run import curve

from janusflow import JanusFlowPipeline
from janusflow.settings import fill, read_yaml
from janusflow.training.run import run
from janusflow.training.stage import StageObjective, StageSettings

STAGE = """task: stage
model: tiny
trained: [language_model, vision_model, aligner, flow_head, vq_head]
data:
  threads: 0
  sources:
    drawing: {format: shapes, kind: generation, num_pictures: 50}
    looking: {format: shapes, kind: understanding, num_pictures: 50, num_questions: 2}
packing: {length: 256}
drawing: {heads: [flow, vq], noises_per_picture: 2}
alignment: {layer: 3, width: 32}
validation:
  parts: 1
  data:
    threads: 0
    sources: {drawing: {format: shapes, kind: generation, num_pictures: 9, seed: 3}}
preview: {prompts: [a red circle], num_inference_steps: 2}
loop:
  steps: 4
  seed: 1
  microbatches: 2
  precision: "no"
  log_every: 1
  save_every: 2
  validate_every: 4
  preview_every: 4
  # A first step of AdamW goes by a gradient's sign, even where that is rounding: it is kept small.
  optimizer: {learning_rate: 1.0e-4, warmup_steps: 4, max_grad_norm: 0.5}
"""
KINDS = {
    "multi_gpu": DistributedType.MULTI_GPU,
    "fsdp": DistributedType.FSDP,
    "deepspeed_zero1": DistributedType.DEEPSPEED,
}


def test_accelerate_reads_every_config_and_knows_every_key() -> None:
    files = sorted(ACCELERATE.glob("*.yaml"))
    assert {file.stem for file in files} == KINDS.keys()
    for file in files:
        config = load_config_from_file(str(file))  # refuses keys that it does not know
        assert config.distributed_type is KINDS[file.stem]
        assert config.mixed_precision == "no", "loop.precision decides"
        options = vars(launch_command_parser().parse_args(["train.py"]))
        for section in (config.fsdp_config, config.deepspeed_config):
            assert section.keys() <= options.keys()  # of sections, it takes any


@pytest.mark.parametrize("name", KINDS)
def test_the_launcher_takes_the_way_that_a_config_names(name: str) -> None:
    given = launch_command_parser().parse_args(
        ["--config_file", str(ACCELERATE / f"{name}.yaml"), "train.py"]
    )
    taken, _, _ = _validate_launch_command(given)
    ways = {"multi_gpu": taken.multi_gpu, "fsdp": taken.use_fsdp}
    assert {**ways, "deepspeed_zero1": taken.use_deepspeed} == {key: key == name for key in KINDS}
    assert (taken.num_processes, taken.num_machines) == (8, 1)


def test_the_layers_that_shards_follow_exist() -> None:
    shards = read_yaml(ACCELERATE / "fsdp.yaml")["fsdp_config"]
    layers = set(shards["fsdp_transformer_layer_cls_to_wrap"].split(","))
    assert layers <= {type(module).__name__ for module in make_pipeline().model.modules()}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sharded") / "stage.yaml"
    path.write_text(STAGE)
    return path


@pytest.fixture(scope="module")
def objective(config: Path) -> StageObjective:
    return StageObjective(fill(StageSettings, read_yaml(config), [f"output_dir={config.parent}"]))


@pytest.fixture(scope="module")
def runs(config: Path) -> SimpleNamespace:
    """A stage of four steps: whole, in shards, and either way after two steps of the other."""
    folder, said = config.parent, StringIO()

    def second_half_of(name: str) -> Path:
        target = folder / f"after-{name}"
        shutil.copytree(folder / name / "step-0000002", target / "step-0000002")
        return target

    with redirect_stdout(said):
        run(config, [f"output_dir={folder / 'whole'}"])
    done = launched(
        ACCELERATE / "fsdp.yaml",
        str(TESTS / "stage_run.py"),
        str(config),
        str(folder / "sharded"),
        str(second_half_of("whole")),
    )
    assert done.returncode == 0, done.stderr
    assert "starting at step 0 of 4 in 2 processes" in done.stdout
    run(config, [f"output_dir={second_half_of('sharded')}"])
    return SimpleNamespace(folder=folder, said={"whole": said.getvalue(), "sharded": done.stdout})


def test_the_parts_of_a_step_hold_different_things(objective: StageObjective) -> None:
    """What the runs below have to stand: processes that draw beside others that look."""
    kinds = {"pixel_values", "t"}
    held = [[kinds & objective.batch(step, part).keys() for part in (0, 1)] for step in range(4)]
    assert [{"t"}, {"pixel_values"}] in held
    assert [kinds, {"pixel_values"}] in held
    assert [kinds, {"t"}] in held


def test_shards_are_those_that_the_config_names(
    runs: SimpleNamespace, objective: StageObjective
) -> None:
    layout = json.loads((runs.folder / "sharded" / "layout.json").read_text())
    gathering = {"StageObjective": 1, "LlamaDecoderLayer": 6, "JanusVisionEncoderLayer": 4}
    assert layout["gathering"] == gathering
    names = [name for name, _ in objective.named_parameters()]
    assert layout["whole"] == [name for name in names if "vq_head.tokenizer" in name] != []


def by_deepspeed(accelerate: Path, config: Path, *folders: Path) -> CompletedProcess:
    pytest.importorskip("deepspeed", reason="DeepSpeed is for Linux alone")
    return launched(accelerate, str(TESTS / "stage_run.py"), str(config), *map(str, folders))


@pytest.fixture(scope="module")
def deepspeed_runs(runs: SimpleNamespace, config: Path) -> Path:
    """The same stage in slices of DeepSpeed, and either way after two steps of the other."""
    zero, after_whole = runs.folder / "zero", runs.folder / "zero-after-whole"
    shutil.copytree(runs.folder / "whole/step-0000002", after_whole / "step-0000002")
    done = by_deepspeed(ACCELERATE / "deepspeed_zero1.yaml", config, zero, after_whole)
    assert done.returncode == 0, done.stderr
    after_zero = runs.folder / "whole-after-zero"
    shutil.copytree(zero / "step-0000002", after_zero / "step-0000002")
    run(config, [f"output_dir={after_zero}"])
    return runs.folder


@pytest.mark.parametrize("name", ["zero", "zero-after-whole", "whole-after-zero"])
def test_slices_of_deepspeed_change_neither_the_curve_nor_the_weights(
    deepspeed_runs: Path, name: str
) -> None:
    agree(deepspeed_runs / "whole", deepspeed_runs / name, steps=4 if name == "zero" else 2)


def test_gradients_in_shards_of_deepspeed_are_refused(config: Path, tmp_path: Path) -> None:
    two = tmp_path / "zero2.yaml"
    one = (ACCELERATE / "deepspeed_zero1.yaml").read_text()
    two.write_text(one.replace("zero_stage: 1", "zero_stage: 2"))
    done = by_deepspeed(two, config, tmp_path / "run")
    assert done.returncode != 0
    assert "DeepSpeed's zero_stage is 2; only 1 is known" in done.stderr
    assert not (tmp_path / "run").exists()


def agree(whole: Path, other: Path, steps: int) -> None:
    """Whether a run has the curve of another in its last steps, and its weights and moments."""
    records, others = curve(whole), curve(other)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 4]
    assert {"valid_flow", "valid_flow_t0.90", "valid_alignment", "valid_vq"} <= records[-1].keys()
    assert len(others) == steps + 1
    for one, another in zip(records[-len(others) :], others, strict=True):
        assert one == pytest.approx(another, abs=1e-4, rel=1e-4)
    # An update is of up to 1e-4. The moments of two such runs are sums of gradients of norm 1.
    for file, tolerance in {"model": 1e-5, "ema": 1e-5, "optimizer-0": 1e-6}.items():
        one, another = (
            load_file(folder / "step-0000004" / f"{file}.safetensors") for folder in (whole, other)
        )
        assert one.keys() == another.keys()
        for key in one:
            torch.testing.assert_close(one[key], another[key], rtol=0, atol=tolerance, msg=key)


@pytest.mark.parametrize("name", ["sharded", "after-whole", "after-sharded"])
def test_shards_change_neither_the_curve_nor_the_weights(runs: SimpleNamespace, name: str) -> None:
    agree(runs.folder / "whole", runs.folder / name, steps=4 if name == "sharded" else 2)


def test_shards_write_a_whole_model(runs: SimpleNamespace) -> None:
    one, other = (
        JanusFlowPipeline.from_pretrained(runs.folder / name / "final").model.state_dict()
        for name in ("whole", "sharded")
    )
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=2**-7, atol=2e-5, msg=key)
    assert (runs.folder / "sharded" / "preview-vq.png").is_file()


def test_a_part_takes_as_many_operations_in_shards(runs: SimpleNamespace) -> None:
    one, other = (
        [line for line in said.splitlines() if "GFLOP forward and backward" in line]
        for said in (runs.said["whole"], runs.said["sharded"])
    )
    assert len(one) == 1
    assert one == other[:1]
