"""What a run leaves to go on from, and how exactly it does."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from toy_run import Regression, Streams, curve, loop

from janusflow.errors import CheckpointError, SettingsError
from janusflow.files import held_alone
from janusflow.training import checkpoints
from janusflow.training.changes import changed
from janusflow.training.ema import EMA
from janusflow.training.loop import train
from janusflow.training.stage import StageObjective

TESTS = Path(__file__).parents[1]


def same_files(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    return names == sorted(path.name for path in other.iterdir()) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )


@pytest.mark.slow
def test_a_run_that_is_killed_ten_times_is_the_run_that_was_not(tmp_path):
    # A checkpoint every second step: most of the time, one is being written or removed.
    settings = {"steps": 300, "microbatches": 2, "save_every": 2, "preview_every": 7}
    settings |= {"best": "score", "precision": "bf16"}
    whole = loop(**settings)
    assert train(Streams(whole), whole, tmp_path / "whole")

    command = [sys.executable, str(TESTS / "toy_run.py"), str(tmp_path / "killed")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    rng, kills = random.Random(0), 0
    while kills < 10:
        process = subprocess.Popen(
            [*command, json.dumps(settings)], env=environment, stdout=subprocess.PIPE, text=True
        )
        # Counted in lines, not in seconds: a machine under load is slow to make progress.
        for _ in range(rng.randint(8, 40)):
            process.stdout.readline()
        time.sleep(rng.random() * 0.02)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
    subprocess.run([*command, json.dumps(settings)], env=environment, check=True)

    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    names = [sorted(p.name for p in (tmp_path / run).iterdir()) for run in ("whole", "killed")]
    assert names[0] == names[1]
    for name in names[0]:
        if name.startswith("step-") or name == "final":
            assert same_files(tmp_path / "whole" / name, tmp_path / "killed" / name), name


class Killed(BaseException):
    """No handler may catch it, as none catches SIGKILL."""


@pytest.mark.parametrize("file", ["model", "ema", "optimizer-0"])
def test_a_checkpoint_that_was_being_written_does_not_count(tmp_path, monkeypatch, file):
    settings = loop(steps=8)
    train(Streams(settings), settings, tmp_path / "whole")

    def write(tensors, path):
        save_file(tensors, path)
        if path.name == f"{file}.safetensors" and "step-0000008" in str(path):
            shutil.copytree(path.parent, tmp_path / "killed" / ".step-0000008-left" / "new")
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", write)
        with pytest.raises(Killed):
            train(Streams(settings), settings, tmp_path / "killed")
    with (tmp_path / "killed" / "log.jsonl").open("a") as log:
        log.write('{"step": 9, "squa')
    assert train(Streams(settings), settings, tmp_path / "killed")
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    runs = [tmp_path / run / "step-0000008" for run in ("whole", "killed")]
    assert same_files(*runs)
    assert [path.name for path in (tmp_path / "killed").glob(".*")] == [".lock"]


def test_a_checkpoint_that_was_being_removed_does_not_count(tmp_path, monkeypatch):
    settings = loop(keep_last=1)

    remove = shutil.rmtree

    def remove_in_part(path, **options):
        if path.name not in ("step-0000004", ".step-0000004-removed"):
            return remove(path, **options)
        (path / "model.safetensors").unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.shutil, "rmtree", remove_in_part)
        with pytest.raises(Killed):
            train(Regression(), settings, tmp_path)
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["step-0000008"]
    assert train(Regression(), settings, tmp_path)
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["step-0000012"]


def test_streams_go_on_with_the_very_next_sample(tmp_path):
    settings = loop(microbatches=2)
    train(Streams(settings), settings, tmp_path / "whole")
    half = loop(microbatches=2, steps=6)
    train(Streams(half), half, tmp_path / "parts")
    objective = Streams(settings)
    train(objective, settings, tmp_path / "parts")
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert objective.positions == {0: 12, 1: 12}


@pytest.mark.parametrize(("best", "kept"), [("score", 9), ("-score", 6)])
def test_the_best_checkpoint_stays(tmp_path, best, kept):
    class Scored(Regression):
        def preview(self, step, folder):
            return {"score": {3: 0.3, 6: 0.1, 9: 0.9, 12: 0.5, 15: 0.9, 18: 0.2, 20: 0.3}[step]}

    settings = loop(steps=20, preview_every=3, best=best, keep_last=1)
    train(Scored(), settings, tmp_path)
    names = [path.name for path in checkpoints.checkpoints(tmp_path)]
    assert names == [f"step-{kept:07d}", "step-0000020"]
    train(Scored(), replace(settings, keep_last=20), tmp_path / "all")
    steps = {int(path.name[5:]) for path in checkpoints.checkpoints(tmp_path / "all")}
    assert steps == {4, 8, 12, 16, 20, 3, kept}  # each time that it got better, and as ever
    assert checkpoints.best_figure(tmp_path, best) == (0.9 if kept == 9 else 0.1)


def test_the_best_is_remembered_by_a_run_that_goes_on(tmp_path):
    class Scored(Regression):
        def preview(self, step, folder):
            return {"score": 1.0 if step == 3 else 0.5}

    for steps in (6, 12):
        train(Scored(), loop(steps=steps, preview_every=3, best="score", keep_last=9), tmp_path)
    names = [path.name for path in checkpoints.checkpoints(tmp_path)]
    assert names == [f"step-{step:07d}" for step in (3, 4, 6, 8, 12)]  # none at 9


def test_a_best_figure_that_nothing_measures_is_refused(tmp_path):
    settings = loop(preview_every=2, best="shapes")
    with pytest.raises(SettingsError, match=r"loop.best is 'shapes', but there are only score"):
        train(Streams(settings), settings, tmp_path)


def test_other_settings_are_refused_by_name(tmp_path):
    train(Regression(), loop(), tmp_path)
    for changes in (
        {"seed": 1},
        {"microbatches": 2},
        {"precision": "bf16"},
        {"optimizer": {"learning_rate": 1.0}},
    ):
        name = next(iter(changes))
        with pytest.raises(SettingsError, match=f"other settings .loop.{name}.*: .* -> .*accept"):
            train(Regression(), loop(steps=14, **changes), tmp_path)
    assert json.loads((tmp_path / "settings.json").read_text())["loop"]["seed"] == 0
    assert train(Regression(), loop(steps=14, seed=1, accept_changes=True), tmp_path)


def test_a_second_run_in_the_folder_is_refused_and_changes_nothing(tmp_path):
    train(Regression(), loop(steps=4), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with held_alone(tmp_path, "run"):
        for settings in (loop(), loop(seed=1)):
            with pytest.raises(SettingsError, match=f"another run is at work in {tmp_path}; wait"):
                train(Regression(), settings, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert train(Regression(), loop(), tmp_path)


def test_settings_that_change_nothing_learned_may_change(tmp_path):
    train(Regression(), loop(), tmp_path)
    free = {"steps": 13, "log_every": 2, "save_every": 5, "keep_last": 3, "ema_device": "cpu"}
    assert train(Regression(), loop(**free, max_minutes=60, validate_every=13), tmp_path)


def test_workers_change_nothing_that_is_learned(tmp_path):
    class Counted(Regression):
        asked = 0  # in this process

        def batch(self, step, part=0):
            self.asked += 1
            return super().batch(step, part)

    def begun(run, **changes):
        settings = loop(microbatches=2, **changes)
        objective = Counted(settings)
        assert train(objective, settings, tmp_path / run)
        return objective

    assert begun("none", workers=0).asked == 24
    assert begun("two", workers=2).asked == 0
    begun("parts", workers=2, steps=6)
    assert begun("parts", workers=0).asked == 12
    begun("more", workers=0, steps=6)
    assert begun("more", workers=2).asked == 0
    for run in ("two", "parts", "more"):
        assert curve(tmp_path / run) == curve(tmp_path / "none"), run
        for name in ("model", "ema", "optimizer-0"):
            file = f"step-0000012/{name}.safetensors"
            one, other = ((tmp_path / r / file).read_bytes() for r in ("none", run))
            assert one == other, (run, name)


def test_workers_are_refused_where_batches_come_from_streams(tmp_path):
    settings = loop(workers=2)
    with pytest.raises(SettingsError, match=r"loop.workers is 2, .*\(data\.ahead\); set .* to 0"):
        train(Streams(settings), settings, tmp_path)
    assert not any(tmp_path.iterdir())
    assert StageObjective.has_streams


def test_an_objective_names_its_own_free_settings():
    before = {"data": {"workers": 1, "seed": 0}, "old": 1, "preview": {"num": 1}}
    now = {"data": {"workers": 2, "seed": 1}, "new": 1, "preview": {"num": 2}}
    assert changed(before, now, ["data.workers"]) == ["data.seed: 0 -> 1"]
    assert changed(before, now, ["data"]) == []
    assert changed({"data_set": 1}, {"data_set": 2}, ["data"]) == ["data_set: 1 -> 2"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_first_kind_of_checkpoint_still_goes_on(tmp_path, optimizer):
    settings = {"optimizer": {"name": optimizer, "learning_rate": 1e-2}}
    train(Regression(), loop(**settings), tmp_path / "whole")
    train(Regression(), loop(**settings, steps=8), tmp_path / "old")
    for folder in checkpoints.checkpoints(tmp_path / "old"):
        for number, names in enumerate(
            [["net.0.weight", "net.2.weight"], ["net.0.bias", "net.2.bias"]]
            if optimizer == "muon"
            else [["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"]]
        ):
            file = folder / f"optimizer-{number}.safetensors"
            numbered = {
                f"{names.index(key.rsplit('.', 1)[0])}.{key.rsplit('.', 1)[1]}": tensor
                for key, tensor in load_file(file).items()
            }
            save_file(numbered, file)
        state = checkpoints.read_state(folder)
        kept = {name: state[name] for name in ("step", "ema_updates")}
        (folder / "state.json").write_text(json.dumps(kept))
    train(Regression(), loop(**settings), tmp_path / "old")
    for name in ("model", "ema"):
        one, other = (
            load_file(tmp_path / run / f"step-0000012/{name}.safetensors")
            for run in ("whole", "old")
        )
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_weight_that_was_never_stepped_stays_without_moments(tmp_path):
    def make():
        model = nn.ModuleDict({"used": nn.Linear(2, 2), "idle": nn.Linear(2, 2)})
        return model, EMA(model, 0.9), [torch.optim.AdamW(model.parameters())]

    model, ema, optimizers = make()
    model["used"](torch.ones(1, 2)).sum().backward()
    optimizers[0].step()
    path = checkpoints.save(tmp_path, 1, model, ema, optimizers)
    other, ema, optimizers = make()
    checkpoints.restore(path, other, ema, optimizers)
    assert set(optimizers[0].state) == set(other["used"].parameters())


def test_a_checkpoint_without_moments_is_nothing_to_go_on_from(tmp_path):
    train(Regression(), loop(steps=4), tmp_path)
    (tmp_path / "step-0000004" / "optimizer-0.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds weights but no moments"):
        train(Regression(), loop(), tmp_path)


def test_checkpoints_hold_tensors_and_json_only(tmp_path):
    train(Regression(), loop(steps=4), tmp_path)
    suffixes = {path.suffix for path in (tmp_path / "step-0000004").iterdir()}
    assert suffixes == {".safetensors", ".json"}
