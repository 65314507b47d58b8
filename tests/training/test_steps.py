"""Parts of a step: one gradient and one curve, however they are shared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import muon_run
import pytest
import torch
from accelerate import DistributedType
from launching import ACCELERATE, TESTS, in_two_processes, launched
from safetensors.torch import load_file
from toy_run import Regression, Streams, curve, loop

from janusflow.errors import SettingsError
from janusflow.files import held_alone
from janusflow.training import muon, processes
from janusflow.training.loop import LoopSettings, train

SHARDS = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP",
    "FSDP_MIN_NUM_PARAMS": "20",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def toy_in_two_processes(folder: Path, settings: dict, **environment: str):
    return in_two_processes(
        str(TESTS / "toy_run.py"), str(folder), json.dumps(settings), **environment
    )


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted(run.glob("step-*"))[-1] / "model.safetensors")


class Joined(Regression):
    """All parts of a step in one."""

    def batch(self, step, part=0):
        halves = [
            Regression.batch(Regression(loop(microbatches=4)), step, part)["x"] for part in range(4)
        ]
        return {"x": torch.cat(halves)}


def test_four_parts_make_the_step_of_their_joined_batch(tmp_path):
    settings = loop(microbatches=4)
    train(Regression(settings), settings, tmp_path / "parts")
    train(Joined(), loop(), tmp_path / "joined")
    parts, joined = (weights(tmp_path / run) for run in ("parts", "joined"))
    for name in parts:
        torch.testing.assert_close(parts[name], joined[name], rtol=0, atol=1e-6)
    for one, other in zip(*(curve(tmp_path / run) for run in ("parts", "joined")), strict=True):
        assert one == pytest.approx(other, abs=2e-5)


def test_the_gradient_is_clipped_once_as_a_whole(tmp_path):
    clipped = loop(microbatches=2, steps=1, optimizer={"max_grad_norm": 0.01})
    objective = Regression(clipped)
    norms = []
    step = torch.optim.AdamW.step

    def note(self, *arguments, **options):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.stack([g.norm() for g in gradients]).norm().item())
        return step(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", note)
        train(objective, clipped, tmp_path)
    assert norms == pytest.approx([0.01], rel=1e-3)
    free = loop(microbatches=2, steps=1, optimizer={"max_grad_norm": 1e9})
    train(Regression(free), free, tmp_path / "free")
    assert curve(tmp_path)[0]["grad_norm"] == curve(tmp_path / "free")[0]["grad_norm"] > 0.1


def test_parts_are_numbered_through_all_steps():
    settings = loop(microbatches=3)
    numbers = [settings.sample(step, part) for step in range(4) for part in range(3)]
    assert numbers == list(range(12))
    assert [loop().sample(step, 0) for step in range(4)] == [0, 1, 2, 3]


def test_averages_on_the_cpu_are_those_beside_the_weights(tmp_path):
    for where in ("device", "cpu"):
        train(Regression(), loop(ema_device=where), tmp_path / where)
    one, other = (
        load_file(tmp_path / w / "step-0000012/ema.safetensors") for w in ("device", "cpu")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_weights_of_few_bits_are_not_trained(tmp_path):
    objective = Regression()
    objective.net[2].to(torch.bfloat16)
    with pytest.raises(SettingsError, match=r"net.2.weight is to be trained in torch.bfloat16"):
        train(objective, loop(), tmp_path)


def test_gradient_checkpointing_is_asked_of_the_objective(tmp_path):
    with pytest.raises(SettingsError, match="Regression has no gradient checkpointing"):
        train(Regression(), loop(gradient_checkpointing=True), tmp_path)

    class Able(Regression):
        asked = False

        def enable_gradient_checkpointing(self):
            self.asked = True

    objective = Able()
    train(objective, loop(gradient_checkpointing=True), tmp_path)
    assert objective.asked


def test_a_compiled_objective_learns_the_same(tmp_path):
    for compiled in (False, True):
        train(Regression(), loop(compile=compiled, steps=3), tmp_path / str(compiled))
    one, other = (weights(tmp_path / str(compiled)) for compiled in (False, True))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-5)


def test_previews_and_validation_see_the_averages_in_evaluation_mode(tmp_path):
    class Watched(Regression):
        def validate(self):
            assert not self.training
            assert not torch.is_grad_enabled()
            return {"first": self.net[0].weight[0, 0].item()}

    objective = Watched()
    train(objective, loop(validate_every=5), tmp_path)
    assert objective.training
    records = [record for record in curve(tmp_path) if "first" in record]
    assert [record["step"] for record in records] == [5, 10, 12]
    average = load_file(tmp_path / "step-0000012/ema.safetensors")["net.0.weight"][0, 0].item()
    assert records[-1]["first"] == average
    assert objective.net[0].weight[0, 0].item() != average


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"microbatches": 0}, "loop.microbatches is at least 1, not 0"),
        ({"workers": -1}, "loop.workers is at least 0, not -1"),
        ({"keep_last": 0}, "loop.keep_last is at least 1, not 0"),
        ({"ema_device": "disk"}, "loop.ema_device is 'device' or 'cpu', not 'disk'"),
        ({"best": "score"}, "nothing measures it"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(SettingsError, match=message):
        LoopSettings(**changes)


def test_workers_are_refused_where_processes_cannot_fork(monkeypatch):
    monkeypatch.setattr(torch.multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    with pytest.raises(SettingsError, match=r"loop.workers is 2, .* processes that fork, .* to 0"):
        loop(workers=2)
    assert loop(workers=0).workers == 0


def test_two_processes_make_the_curve_of_one(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        "task: autoencoder\nimage_size: 32\nblock_out_channels: [8, 16, 16, 16]\nbatch_size: 2\n"
        "loop: {steps: 6, microbatches: 2, precision: 'no', log_every: 1, preview_every: 6,\n"
        "       optimizer: {learning_rate: 1.0e-3}}\n"
    )
    command = ["-m", "janusflow.training", str(config), "--output-dir"]
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
    subprocess.run(
        [sys.executable, *command, str(tmp_path / "one")],
        env=environment, check=True, capture_output=True,
    )  # fmt: skip
    two = launched(ACCELERATE / "multi_gpu.yaml", *command, str(tmp_path / "two"))
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("starting at step 0 of 6 in 2 processes") == 1
    one, other = (curve(tmp_path / run) for run in ("one", "two"))
    assert len(one) == 7
    for a, b in zip(one, other, strict=True):
        losses = {"absolute", "squared", "kl", "psnr"} & a.keys()
        assert losses
        assert {k: a[k] for k in losses} == pytest.approx({k: b[k] for k in losses}, abs=1e-4)


def test_steps_of_muon_are_those_of_the_library_to_the_bit():
    muon_run.compare()


def test_shared_steps_of_muon_are_those_of_the_library_to_the_bit():
    done = in_two_processes(str(TESTS / "muon_run.py"))
    assert done.returncode == 0, done.stderr
    made = sorted(int(count) for count in done.stdout.split())
    assert made == [6, 36], "one has the largest matrix, the other all that are left"


@pytest.mark.parametrize("shapes", [[(4, 27), (4, 3, 3, 3), (4, 27)], [(9, 4)] * 3])
def test_stacked_steps_of_muon_are_those_of_the_library_to_the_bit(monkeypatch, shapes):
    monkeypatch.setattr(muon, "stacks", lambda weights: [list(weights)])  # as on a GPU
    monkeypatch.setattr(muon_run, "SHAPES", shapes)
    muon_run.compare()


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (5, 5)])
def test_a_stack_is_made_orthogonal_matrix_by_matrix(shape):
    sizes = torch.tensor([0.01, 1.0, 100.0]).view(3, 1, 1)
    stack = sizes * torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    for dtype, tolerance in ((torch.bfloat16, 0.0), (torch.float32, 1e-5)):
        one_by_one = torch.stack([muon.orthogonal(matrix.to(dtype)) for matrix in stack])
        together = muon.orthogonal(stack.to(dtype))
        torch.testing.assert_close(together, one_by_one, atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    ("device", "expected"),
    [("meta", [[0, 2, 3], [1, 5], [4]]), ("cpu", [[0], [1], [2], [3], [4], [5]])],
)
def test_matrices_of_one_shape_are_stacked_off_the_cpu(device, expected):
    shapes = [(4, 27), (27, 4), (4, 3, 3, 3), (4, 27), (2, 54), (27, 4)]
    weights = [torch.empty(shape, device=torch.device(device)) for shape in shapes]
    number = {id(weight): n for n, weight in enumerate(weights)}
    assert [[number[id(w)] for w in alike] for alike in muon.stacks(weights)] == expected


@pytest.mark.parametrize("way", ["whole", "shards", "muon"])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, way):
    settings = {"microbatches": 4, "preview_every": 6, "best": "score", "ema_device": "cpu"}
    settings["optimizer"] = {"name": "muon" if way == "muon" else "adamw"}
    full = loop(**settings)
    train(Streams(full), full, tmp_path / "one")

    half = loop(**settings, steps=6)
    train(Streams(half), half, tmp_path / "more")
    environment = SHARDS if way == "shards" else {}
    done = toy_in_two_processes(tmp_path / "more", {**settings, "steps": 9}, **environment)
    assert done.returncode == 0, done.stderr
    assert train(Streams(full), full, tmp_path / "more")

    one, more = (curve(tmp_path / run) for run in ("one", "more"))
    # The run was at its end for a while, and was looked at there.
    more = [record for record in more if record["step"] != 9 or "score" not in record]
    for a, b in zip(one, more, strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    files = sorted(path.name for path in (tmp_path / "one/step-0000012").glob("*.safetensors"))
    assert len(files) == (4 if way == "muon" else 3)
    for name in files:
        a, b = (load_file(tmp_path / run / "step-0000012" / name) for run in ("one", "more"))
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-5)


def test_all_processes_of_a_second_run_are_told(tmp_path):
    with held_alone(tmp_path, "run"):
        done = toy_in_two_processes(tmp_path, {"microbatches": 2})
    assert done.returncode != 0
    assert done.stderr.count("SettingsError: another run is at work in") == 2
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_shards_write_the_model_that_whole_weights_do(tmp_path):
    settings = {"microbatches": 2, "precision": "bf16", "preview_every": 12}
    whole = loop(**settings)
    train(Streams(whole), whole, tmp_path / "whole")
    done = toy_in_two_processes(tmp_path / "shards", settings, **SHARDS)
    assert done.returncode == 0, done.stderr
    a, b = (
        json.loads((tmp_path / run / "final/weights.json").read_text())
        for run in ("whole", "shards")
    )
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(torch.tensor(a[name]), torch.tensor(b[name]), rtol=0, atol=1e-4)
    assert curve(tmp_path / "whole")[-2]["squared"] == pytest.approx(
        curve(tmp_path / "shards")[-2]["squared"], abs=1e-4
    )


def test_parts_that_processes_cannot_share_evenly_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "begin", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(SettingsError, match="is 3, which 2 processes cannot share evenly; set it"):
        train(Regression(), loop(microbatches=3), tmp_path)


@pytest.mark.parametrize(
    ("version", "optimizer", "message"),
    [(2, "muon", "optimizer.name is 'muon', which needs whole"), (1, "adamw", "fsdp_version: 2")],
)
def test_what_shards_cannot_do_is_refused(tmp_path, monkeypatch, version, optimizer, message):
    class Sharding:
        distributed_type = DistributedType.FSDP
        state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=version))

        def __init__(self, **_):
            pass

    monkeypatch.setattr(processes, "Accelerator", Sharding)
    with pytest.raises(SettingsError, match=message):
        train(Regression(), loop(optimizer={"name": optimizer}), tmp_path)
