"""Distillation of many steps into few: where it starts, what it trains, what comes out."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import DistributedType
from launching import in_two_processes
from toy_run import curve

from janusflow import JanusFlowPipeline, SettingsError
from janusflow.data.sources import open_source, source_settings
from janusflow.flow.guidance import Guidance
from janusflow.flow.presets import PRESETS
from janusflow.models.checkpoints import training_record
from janusflow.models.guided_field import GuidedField
from janusflow.settings import fill, read_yaml
from janusflow.training import processes
from janusflow.training.distillation import DistillationObjective, DistillationSettings
from janusflow.training.loop import LoopSettings, train
from janusflow.training.pairs import PairsRunSettings, make_pairs
from janusflow.training.run import run

CAPTIONS = {"format": "shapes", "kind": "generation", "num_pictures": 30}
FEW = {"num_inference_steps": 3, "shift": 1.5, "guidance_scale": 1.75}
SATURATION = 0.1
LAYERS = ("model.language_model.model.layers.", "model.language_model.model.norm.")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = {
        "output_dir": str(tmp_path_factory.mktemp("pairs")),
        "data": {"sources": {"captions": CAPTIONS}, "threads": 0},
        "num_pairs": 6,
        "num_inference_steps": 8,
        "solver": "unipc",
        "guidance_scale": 4.0,
    }
    return make_pairs(fill(PairsRunSettings, values))


def values_of(pairs: Path, **changes: Any) -> dict[str, Any]:
    values = {
        "task": "distillation",
        "data": {"sources": {"pairs": source_values(pairs)}},
        **FEW,
        "batch_size": 6,
        "saturation": SATURATION,
        "loop": {"steps": 8, "precision": "no", "ema_decay": 0.0},
    }
    return {**values, **changes}


def source_values(pairs: Path) -> dict[str, Any]:
    return {"format": "pairs", "kind": "generation", "path": str(pairs)}


def objective_of(pairs: Path, **changes: Any) -> DistillationObjective:
    return DistillationObjective(fill(DistillationSettings, values_of(pairs, **changes)))


def missed(pairs: Path, model: str | Path, solver: str) -> float:
    """The loss of what a pipeline draws of the pairs in few steps."""
    held = open_source("pairs", source_settings("pairs", source_values(pairs)))
    samples = [held[index] for index in range(len(held))]
    x_0, x_1 = (torch.cat(ends) for ends in zip(*(sample.ends for sample in samples), strict=True))
    pipe = JanusFlowPipeline.from_pretrained(str(model), vae=None)
    pipe.set_progress_bar_config(disable=True)
    prompts = [sample.prompt for sample in samples]
    out = pipe(prompts, latents=x_0, solver=solver, output_type="latent", **FEW)
    errors = (out.latents - x_1).square().flatten(1).mean(1)
    return (errors / (errors + SATURATION)).mean().item()


@pytest.mark.parametrize("solver", ["euler", "unipc", "midpoint"])
def test_its_run_is_the_pipelines(pairs: Path, solver: str) -> None:
    objective = objective_of(pairs, solver=solver)
    losses = objective(**objective.batch(0))
    assert losses["missed"].item() > 0.1, "a loss without errors says nothing"
    assert losses["missed"].item() == pytest.approx(missed(pairs, "tiny", solver), rel=1e-3)
    assert losses["held"].item() < 1e-9


def test_velocities_are_held_where_they_were(pairs: Path) -> None:
    objective = objective_of(pairs, held_weight=3.0)
    batch = objective.batch(0)
    with torch.no_grad():
        for weight in objective.model.flow_head.parameters():
            weight.mul_(1.05)
    x_t = batch["x_0"] + batch["t"] * (batch["x_1"] - batch["x_0"])
    velocities = []
    for model in (objective.model, JanusFlowPipeline.from_pretrained("tiny", vae=None).model):
        prompts = model.encode_prompts("flow", batch["ids"], batch["mask"])
        field = GuidedField(model.velocity, prompts, Guidance())
        velocities.append(torch.stack(field.velocities(x_t, batch["t"])))
    expected = 3 * (velocities[0] - velocities[1]).square().mean().item()
    assert expected > 0.01
    assert objective(**batch)["held"].item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [["language_model", "flow_head"], ["flow_head"]])
def test_what_it_trains_has_gradients(pairs: Path, trained: list[str], dtype: torch.dtype) -> None:
    objective = objective_of(pairs, trained=trained)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        losses = objective(**objective.batch(0))
    losses["missed"].backward()
    wanted = ("model.flow_head.", *(LAYERS if "language_model" in trained else ()))
    for name, weight in objective.named_parameters():
        assert weight.requires_grad == name.startswith(wanted), name
        if weight.requires_grad:
            assert weight.grad is not None, name
            assert weight.grad.abs().max() > 0, name


class Growth:
    """A field whose velocity is the state times a slope for each pair, (B, 1, 1, 1)."""

    def __init__(self, slopes: list[float]) -> None:
        self.slopes = torch.tensor(slopes).view(-1, 1, 1, 1).requires_grad_()

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.slopes * x

    def velocities(self, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.detach(), x.detach()


def test_a_pair_on_the_border_does_not_drown_the_others(
    pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, slopes = 4, [0.0, 0.5, -2.0, 5.0, 12.0]
    changes = {"num_inference_steps": steps, "shift": 1.0, "solver": "euler", "batch_size": 5}
    objective = objective_of(pairs, **changes)
    batch = objective.batch(0)
    growth = (1 + torch.tensor(slopes) / steps).view(-1, 1, 1, 1)
    x_0 = batch["x_0"].clone().requires_grad_()
    ends = (batch["x_0"] * growth**steps).requires_grad_()
    batch |= {"x_0": x_0, "x_1": (ends - 0.3).detach()}
    errors = (ends - batch["x_1"]).square().flatten(1).mean(1)
    (errors / (errors + SATURATION)).mean().backward()
    field = Growth(slopes)
    monkeypatch.setattr(objective, "_field", lambda *_: field)
    objective(**batch)["missed"].backward()
    assert x_0.grad is not None
    assert ends.grad is not None
    gentle = [0, 1, 2]  # Each step's share comes back shorter than the gradient at the end.
    expected = (ends.grad * growth**steps)[gentle]
    torch.testing.assert_close(x_0.grad[gentle], expected, rtol=1e-4, atol=0)
    # The end's own gradient and, from every step, at most as much again.
    grown = x_0.grad.flatten(1).norm(dim=1) / ends.grad.flatten(1).norm(dim=1)
    torch.testing.assert_close(grown[3:], torch.full((2,), 1.0 + steps), rtol=1e-3, atol=0)


def test_nothing_of_a_step_outlives_it(pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = objective_of(pairs)
    fields = []
    make = objective._field

    def kept(*args: Any) -> GuidedField:
        field = make(*args)
        fields.append(weakref.ref(field))
        return field

    monkeypatch.setattr(objective, "_field", kept)
    losses = objective(**objective.batch(0))
    losses["missed"].backward()
    del losses
    gc.collect()
    assert fields
    assert not any(field() for field in fields)


def test_it_learns_to_end_at_the_pairs(pairs: Path, tmp_path: Path) -> None:
    config = tmp_path / "distillation.yaml"
    preview = {"shapes": 6, "prompts": ["a red circle"]}
    values = values_of(pairs, output_dir=str(tmp_path), preview=preview)
    values["loop"] |= {"preview_every": 8}
    config.write_text(json.dumps(values))
    assert run(config)
    final = tmp_path / "final"
    assert missed(pairs, final, "unipc") < 0.8 * missed(pairs, "tiny", "unipc")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert 0 <= lines[-1]["shapes_flow"] <= 1
    assert list(tmp_path.rglob("preview-flow.png"))
    record, first = training_record(str(final)), training_record("tiny")
    assert record is not None
    assert first is not None
    steps = [kept.pop("distillation", {"steps": 0})["steps"] for kept in (first, record)]
    assert (steps[1] - steps[0], record) == (8, first)
    before, after = (
        JanusFlowPipeline.from_pretrained(str(where), vae="default", torch_dtype=torch.bfloat16)
        for where in ("tiny", final)
    )
    assert all(
        torch.equal(a, b) for a, b in zip(*map(weights_of_vae, (before, after)), strict=True)
    )
    changed = {
        name
        for name, weight in after.model.state_dict().items()
        if not torch.equal(weight, before.model.state_dict()[name])
    }
    assert changed
    assert all(f"model.{name}".startswith(("model.flow_head.", *LAYERS)) for name in changed)


def weights_of_vae(pipe: JanusFlowPipeline) -> list[torch.Tensor]:
    return list(pipe.vae.state_dict().values())


def test_a_stream_goes_on_where_it_was(pairs: Path) -> None:
    first = objective_of(pairs, batch_size=4)
    before = first.batch(0)
    state = first.data_state()
    expected = first.batch(1)
    second = objective_of(pairs, batch_size=4)
    second.load_data_state(state)
    for name, held in second.batch(1).items():
        assert torch.equal(held, expected[name])
    assert not torch.equal(before["x_0"], expected["x_0"])
    assert before["t"] != expected["t"]


def test_two_processes_make_the_curve_of_one(pairs: Path, tmp_path: Path) -> None:
    config = tmp_path / "distillation.yaml"
    values = values_of(pairs, batch_size=2)
    values["loop"] |= {"steps": 2, "microbatches": 2, "log_every": 1}
    config.write_text(json.dumps(values))
    assert run(config, [f"output_dir={tmp_path / 'one'}"])
    command = ("-m", "janusflow.training", str(config), "--output-dir", str(tmp_path / "two"))
    done = in_two_processes(*command)
    assert done.returncode == 0, done.stderr
    one, two = (curve(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 2
    for a, b in zip(one, two, strict=True):
        assert [b["missed"], b["held"]] == pytest.approx([a["missed"], a["held"]], abs=1e-4)


def test_weights_in_shards_are_refused(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharding = SimpleNamespace(distributed_type=DistributedType.FSDP)
    monkeypatch.setattr(processes, "Accelerator", lambda **_: sharding)
    with pytest.raises(SettingsError, match=r"several times in a step.*multi_gpu\.yaml"):
        train(objective_of(pairs), LoopSettings(), tmp_path)


def test_guidance_is_the_models_own_where_none_is_given(pairs: Path) -> None:
    batch = objective_of(pairs).batch(0)
    own, two, off = (
        objective_of(pairs, guidance_scale=scale)(**batch)["missed"].item()
        for scale in (None, 2.0, 1.0)
    )
    assert own == two != off


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size is at least 1"),
        ({"saturation": 0}, "saturation is above 0"),
        ({"held_weight": -1}, "held_weight is at least 0"),
        ({"trained": []}, "it names one or more of language_model, flow_head"),
        ({"trained": ["vq_head"]}, "it names one or more of language_model, flow_head"),
        ({"solver": "dopri5"}, "solver is 'dopri5'.* take one of fixed steps"),
        ({"solver": "sde"}, "solver is 'sde'.* take one of fixed steps"),
        ({"solver": "none"}, "unknown solver 'none'"),
        ({"data": {"sources": {"captions": CAPTIONS}}}, "make them with task pairs"),
    ],
)
def test_bad_settings_are_refused(pairs: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        objective_of(pairs, **changes)


def test_the_shipped_config_is_of_the_preset_and_the_pairs_before_it() -> None:
    configs = Path(__file__).parents[2] / "configs" / "train" / "tiny"
    values = read_yaml(configs / "distillation.yaml")
    assert {name: values[name] for name in PRESETS["fast"]} == PRESETS["fast"]
    missed_by = read_yaml(configs / "missed_pairs.yaml")["missed_by"]
    assert missed_by == PRESETS["fast"]
    for name, source in (("distillation_pairs", "pairs"), ("missed_pairs", "missed")):
        made = read_yaml(configs / f"{name}.yaml")["output_dir"]
        assert values["data"]["sources"][source]["path"] == f"{made}/final"
