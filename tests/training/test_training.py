"""The first trainer: settings are strict, resuming is exact, losses are what they say."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from toy_run import Regression, curve, loop

from janusflow.errors import DivergedError, SettingsError
from janusflow.settings import fill, overrides_from_arguments, read_yaml
from janusflow.training import muon
from janusflow.training.autoencoder import AutoencoderSettings
from janusflow.training.ema import EMA
from janusflow.training.loop import train
from janusflow.training.losses import next_token_loss, rectified_flow_loss
from janusflow.training.optimizers import OptimizerSettings, build_optimizers, rate_factor
from janusflow.training.run import run


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path, optimizer):
    settings = OptimizerSettings(name=optimizer, learning_rate=1e-2, warmup_steps=3)
    train(Regression(), loop(optimizer=settings), tmp_path / "whole")

    stopped = Regression()
    calls = 0
    draw = stopped.batch

    def batch(step, part):
        nonlocal calls
        calls += 1
        if calls == 7:
            raise KeyboardInterrupt  # in the middle of a save interval
        return draw(step, part)

    stopped.batch = batch
    with pytest.raises(KeyboardInterrupt):
        train(stopped, loop(optimizer=settings), tmp_path / "parts")
    resumed = Regression()
    with torch.no_grad():
        resumed.net[0].weight.zero_()  # whatever it starts from, the checkpoint counts
    assert train(resumed, loop(optimizer=settings), tmp_path / "parts")

    for name in ("model", "ema"):
        file = f"step-0000012/{name}.safetensors"
        one, other = (load_file(tmp_path / run / file) for run in ("whole", "parts"))
        assert all(torch.equal(one[key], other[key]) for key in one), name
    curves = [curve(tmp_path / run) for run in ("whole", "parts")]
    assert curves[0] == curves[1]
    assert len(curves[0]) == 12


@pytest.mark.parametrize(("broken", "told"), [(0, 1), (2, 6)])
def test_a_gradient_that_is_not_finite_ends_the_run_and_is_never_saved(tmp_path, broken, told):
    objective = Regression()
    draw = objective.batch

    def batch(step, part):
        return {"x": draw(step, part)["x"] * (torch.nan if step >= broken else 1)}

    objective.batch = batch
    with pytest.raises(DivergedError, match=f"not finite at step {told}, .*; lower loop.optim"):
        train(objective, loop(log_every=50, save_every=6), tmp_path)
    assert not [*tmp_path.glob("step-*")]


def test_muon_steps_in_float32_where_nothing_is_to_be_in_bfloat16(tmp_path, monkeypatch):
    seen = []
    orthogonal = muon.orthogonal

    def noted(matrix):
        seen.append(matrix.dtype)
        return orthogonal(matrix)

    monkeypatch.setattr(muon, "orthogonal", noted)
    for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16)):
        settings = loop(steps=1, precision=precision, optimizer=OptimizerSettings(name="muon"))
        train(Regression(), settings, tmp_path / precision)
        assert set(seen) == {dtype}
        seen.clear()


def test_training_learns_and_keeps_the_last_two_checkpoints(tmp_path):
    settings = loop(steps=200, save_every=40, optimizer=OptimizerSettings(learning_rate=1e-2))
    assert train(Regression(), settings, tmp_path)
    losses = [json.loads(line)["squared"] for line in (tmp_path / "log.jsonl").open()]
    assert losses[-1] < 0.3 * losses[0]
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-0000160", "step-0000200"]
    assert (tmp_path / "final").is_dir()


def test_a_time_limit_ends_a_run_that_can_go_on(tmp_path, capsys):
    assert not train(Regression(), loop(max_minutes=1e-9), tmp_path)
    assert not (tmp_path / "final").exists()
    assert "stopped at step 1 of " in capsys.readouterr().out
    assert train(Regression(), loop(), tmp_path)
    assert f"done: {tmp_path / 'final'}" in capsys.readouterr().out


def test_the_average_follows_its_formula_and_lends_itself_only():
    model = nn.Linear(2, 2)
    ema = EMA(model, decay=0.9)
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    ema.update(model)
    decay = 2 / 11  # (1 + n) / (10 + n) at the first update
    expected = decay * start + (1 - decay) * (start + 1)
    torch.testing.assert_close(ema.averages["weight"], expected)
    with ema.applied(model):
        torch.testing.assert_close(model.weight.detach(), expected)
    torch.testing.assert_close(model.weight.detach(), start + 1)


def test_the_rate_rises_holds_and_falls():
    settings = OptimizerSettings(warmup_steps=10, decay_fraction=0.2)
    factors = [rate_factor(step, 100, settings) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[79] == 1.0
    assert factors[90] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.05)
    assert {rate_factor(step, 100, OptimizerSettings()) for step in range(100)} == {1.0}


def test_muon_takes_the_matrices_and_adamw_the_rest():
    objective = Regression()
    objective.embed_tokens = nn.Embedding(3, 4)
    muon, adamw = build_optimizers(objective, OptimizerSettings(name="muon"))
    shapes = [tuple(p.shape) for p in muon.param_groups[0]["params"]]
    assert shapes == [(8, 4), (2, 8)]
    assert (3, 4) in [tuple(p.shape) for p in adamw.param_groups[0]["params"]]


def test_muon_takes_the_kernels_inside_when_asked():
    objective = nn.ModuleDict(
        {
            "conv_in": nn.Conv2d(3, 8, 3),
            "inner": nn.Conv2d(8, 16, 3),
            "depthwise": nn.Conv2d(16, 16, 3, groups=16),
            "linear": nn.Linear(16, 16),
            "conv_out": nn.Conv2d(16, 3, 3),
        }
    )
    for kernels, inside in [(False, [(16, 16)]), (True, [(16, 8, 3, 3), (16, 16)])]:
        settings = OptimizerSettings(name="muon", kernels=kernels)
        muon, adamw = build_optimizers(objective, settings)
        assert [tuple(p.shape) for p in muon.param_groups[0]["params"]] == inside
        assert len(adamw.param_groups[0]["params"]) == 10 - len(inside)
    with pytest.raises(SettingsError, match=r"a choice of Muon's; set optimizer\.name to muon"):
        OptimizerSettings(kernels=True)


def test_only_what_is_trainable_has_an_optimizer():
    objective = Regression()
    objective.net[0].requires_grad_(False)
    objective.net[2].bias.requires_grad_(False)
    (muon,) = build_optimizers(objective, OptimizerSettings(name="muon"))
    assert muon.param_groups[0]["params"] == [objective.net[2].weight]
    with pytest.raises(SettingsError, match="every weight is frozen"):
        build_optimizers(objective.requires_grad_(False), OptimizerSettings())


def test_the_flow_loss_is_the_squared_distance_to_image_minus_noise():
    x_0, x_1 = torch.zeros(2, 4, 2, 2), torch.ones(2, 4, 2, 2)
    assert rectified_flow_loss(x_1 - x_0, x_0, x_1) == 0
    assert rectified_flow_loss(x_0, x_0, x_1) == 1
    assert rectified_flow_loss(3 * x_1, x_0, x_1) == 4


def test_the_answer_loss_is_taken_of_the_next_token_where_labelled():
    logits = torch.zeros(1, 3, 4)
    logits[0, 1, 2] = math.log(5)
    labels = torch.tensor([[-100, -100, 2]])
    assert next_token_loss(logits, labels).item() == pytest.approx(-math.log(5 / 8))


def test_an_unknown_setting_is_refused_with_the_nearest_one():
    with pytest.raises(SettingsError, match=r"'loop.stepss'; did you mean 'loop.steps'"):
        fill(AutoencoderSettings, {"loop": {"stepss": 3}})
    with pytest.raises(SettingsError, match="'batchsize'; did you mean 'batch_size'"):
        fill(AutoencoderSettings, {}, ["batchsize=3"])


def test_a_value_of_the_wrong_kind_is_refused():
    with pytest.raises(SettingsError, match="many"):
        fill(AutoencoderSettings, {"batch_size": "many"})
    with pytest.raises(SettingsError, match=r"optimizer.name is 'adamw' or 'muon', not 'sgd'"):
        fill(AutoencoderSettings, {"loop": {"optimizer": {"name": "sgd"}}})


def test_overrides_are_read_from_the_command_line():
    assert overrides_from_arguments(["--loop.save-every", "5", "--seed=1"]) == [
        "loop.save_every=5",
        "seed=1",
    ]
    for wrong in (["5"], ["--seed"]):
        with pytest.raises(SettingsError):
            overrides_from_arguments(wrong)


@pytest.mark.parametrize("content", [None, "- 1\n", "a: [", "task: dance\n"])
def test_a_config_that_is_none_is_refused(tmp_path, content):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SettingsError, match=str(path)):
        read_yaml(path) if content != "task: dance\n" else run(path)
