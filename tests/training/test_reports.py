"""What a run says: at its start, about its speed, and in its logs."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from toy_run import Regression, loop

from janusflow.errors import SettingsError
from janusflow.training import loop as training_loop
from janusflow.training import throughput
from janusflow.training.announcement import lines
from janusflow.training.logs import check_trackers, cut
from janusflow.training.loop import train
from janusflow.training.optimizers import OptimizerSettings, build_optimizers


class Halves(Regression):
    """A frozen half in bfloat16, and a trained one."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 4).to(torch.bfloat16).requires_grad_(False)

    def sources(self):
        return {"frozen": "folder/of/it, 0123abcd"}


def test_modules_and_their_parameters_are_named_at_the_start():
    objective = Halves()
    optimizers = build_optimizers(objective, OptimizerSettings())
    said = list(lines(objective, optimizers, "cpu", 1))
    assert said[:5] == [
        "net: 58 trainable, 0 frozen parameters",
        "  net.0: 40 trainable, 0 frozen parameters",
        "  net.2: 18 trainable, 0 frozen parameters",
        "frozen: 0 trainable, 20 frozen parameters",
        "frozen from folder/of/it, 0123abcd",
    ]
    assert said[-1] == "  activations are not counted"


@pytest.mark.parametrize(("name", "moments"), [("adamw", 8.0), ("muon", 4.0)])
def test_the_memory_is_the_sum_of_what_is_kept(name, moments):
    class Wide(Regression):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(1024, 1024, bias=False)
            self.frozen = nn.Linear(1024, 1024, bias=False).bfloat16().requires_grad_(False)

    objective = Wide()
    optimizers = build_optimizers(objective, OptimizerSettings(name=name))
    said = list(lines(objective, optimizers, "device", 2))[-2]
    assert said == (
        "memory of a process: weights in float32 2.00 MiB, weights in bfloat16 1.00 MiB, gradients "
        f"in float32 2.00 MiB, moments in float32 {moments / 2:.2f} MiB, averages in float32 2.00 "
        f"MiB (on the device), in all {7 + moments / 2:.2f} MiB"
    )


def test_what_no_process_shares_counts_whole_in_the_memory():
    class Encoding(Halves):
        def whole_modules(self):
            return [self.frozen]

    objective = Encoding()
    objective.frozen = nn.Linear(1024, 1024, bias=False).bfloat16().requires_grad_(False)
    objective.register_buffer("table", torch.zeros(1024, 128, dtype=torch.int64))
    optimizers = build_optimizers(objective, OptimizerSettings())
    said = list(lines(objective, optimizers, "device", 2))[-2]
    assert "weights in bfloat16 2.00 MiB, weights in int64 1.00 MiB" in said


def test_the_arithmetic_of_a_part_is_counted_and_leaves_nothing():
    objective = Halves()
    batch = objective.batch(0)
    before = torch.get_rng_state()
    counted = throughput.count_arithmetic(objective, batch)
    # Forward, gradients of both matrices, and of what goes into the second.
    assert counted.flops == 2 * 16 * (4 * 8 * 2 + 8 * 2 * 3)
    assert counted.matrix == (16, 4, 8)
    assert all(p.grad is None for p in objective.parameters())
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module._forward_hooks for module in objective.modules())


def test_a_convolution_counts_as_the_product_that_it_is():
    class Convolved(Regression):
        def __init__(self):
            super().__init__()
            self.net = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, *, x):
            return {"squared": self.net(x).square().mean()}

    counted = throughput.count_arithmetic(Convolved(), {"x": torch.ones(2, 3, 10, 10)})
    assert counted.matrix == (200, 27, 8)
    assert counted.flops == 2 * 2 * 200 * 27 * 8


def test_the_peak_is_that_of_the_matrix_product():
    peak = throughput.matmul_peak((256, 256, 256), torch.float32, torch.device("cpu"), 0.05)
    left, right = torch.randn(256, 256), torch.randn(256, 256)
    begin = time.perf_counter()
    nn.functional.linear(left, right)
    once = 2 * 256**3 / (time.perf_counter() - begin)
    assert peak > 1e8
    assert peak > 0.5 * once


def test_the_peak_of_a_slow_machine_is_tried_once(monkeypatch):
    now, rows = 0.0, []

    def linear(left, right):
        nonlocal now
        now += 10.0
        rows.append(len(left))

    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now)
    monkeypatch.setattr(nn.functional, "linear", linear)
    peak = throughput.matmul_peak((256, 256, 256), torch.float32, torch.device("cpu"))
    assert peak == 2 * 256**3 / 10
    assert rows == [1, 256]  # the first, of a row, is to warm up


@pytest.mark.parametrize(
    ("precision", "device", "peak_of_bfloat16", "advised"),
    [
        ("bf16", "cpu", 1e9, True),
        ("bf16", "cpu", 90e9, False),
        ("bf16", "cpu", 200e9, False),
        ("bf16", "cuda", 1e9, False),
        ("no", "cpu", 1e9, False),
    ],
)
def test_slow_bfloat16_of_a_processor_is_said(
    monkeypatch, precision, device, peak_of_bfloat16, advised
):
    def peak(matrix, dtype, device, seconds=0.25):
        return 95e9 if dtype is torch.float32 else peak_of_bfloat16

    monkeypatch.setattr(throughput, "matmul_peak", peak)
    monkeypatch.setattr(training_loop, "matmul_peak", peak)
    objective = Regression()
    said: list[str] = []
    meter = throughput.Meter(torch.device(device))
    logs = SimpleNamespace(say=said.append)
    training_loop._measure(meter, logs, objective, objective.batch(0), loop(precision=precision))
    advice = (
        "bfloat16 is 95 times slower than float32 on this processor: --loop.precision no is faster"
    )
    assert [line for line in said if "bfloat16 is" in line] == [advice] * advised
    assert meter.peak == (95e9 if precision == "no" else peak_of_bfloat16)


def test_a_meter_tells_computing_from_all_else(monkeypatch):
    now = 0.0
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now)
    meter = throughput.Meter(torch.device("cpu"))
    meter.flops_per_part, meter.peak = 300, 1000.0
    for _ in range(2):  # steps of two parts
        for _ in range(2):
            now += 0.5  # data
            with meter.computing({"tokens": 10}):
                now += 1.0
        now += 1.0  # optimizer
        meter.step()
    with meter.paused():
        now += 100.0
    assert meter.figures(meter.work) == {
        "seconds_per_step": 4.0,
        "tokens_per_second": 5.0,
        "matmul_share": 0.15,
        "overhead_share": 0.5,
    }
    now += 2.0
    meter.step()
    assert meter.figures({})["seconds_per_step"] == 2.0


def test_speed_is_logged_and_said(tmp_path, capsys):
    settings = loop(steps=2, microbatches=3)
    train(Regression(settings), settings, tmp_path)
    said = capsys.readouterr().out
    assert "a step: 3 parts, about 48 rows; a part:" in said
    assert "peak of linear at 16 x 4 x 8 in torch.float32:" in said
    record = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[1])
    assert record["rows_per_second"] == pytest.approx(48 / record["seconds_per_step"], rel=0.05)
    assert 0 < record["overhead_share"] < 1
    assert record["matmul_share"] > 0
    assert f"step 2: squared {record['squared']}, grad_norm" in said


def test_a_log_is_cut_back_to_a_step(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "score": 1}\n{"step": 3}\n{"ste')
    cut(file, 2)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 2, "score": 1}\n'
    cut(file, 0)
    assert file.read_text() == ""


def test_a_tracker_that_is_not_there_says_what_to_install(monkeypatch):
    monkeypatch.setattr("janusflow.training.logs.get_available_trackers", list)
    with pytest.raises(SettingsError, match=r"pip install 'janusflow\[train\]'"):
        check_trackers(["tensorboard"])
    with pytest.raises(SettingsError, match="pip install 'wandb'"):
        check_trackers(["wandb"])
    with pytest.raises(SettingsError, match=r"'tensorbord'; accelerate knows .*tensorboard"):
        check_trackers(["tensorbord"])


def test_tensorboard_holds_the_figures_of_a_run_that_went_on(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in (3, 5):
        train(Regression(), loop(steps=steps, trackers=["tensorboard"]), tmp_path)
    events = EventAccumulator(str(tmp_path / "logs" / "janusflow"))
    events.Reload()
    curve = {event.step: event.value for event in events.Scalars("squared")}
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert curve == pytest.approx({record["step"]: record["squared"] for record in records})
    assert len(curve) == 5
