"""Fitting a solver to pairs: where it starts, what it learns, what comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import janusflow
from janusflow import JanusFlowPipeline, SettingsError
from janusflow.data.sources import open_source, source_settings
from janusflow.flow.timesteps import time_grid
from janusflow.models.checkpoints import describe
from janusflow.settings import fill
from janusflow.training.pairs import PairsRunSettings, make_pairs
from janusflow.training.run import run
from janusflow.training.solver import SolverObjective, SolverSettings, coefficients_of

CAPTIONS = {"format": "shapes", "kind": "generation", "num_pictures": 30}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = {
        "output_dir": str(tmp_path_factory.mktemp("pairs")),
        "data": {"sources": {"captions": CAPTIONS}, "threads": 0},
        "num_pairs": 8,
        "num_inference_steps": 8,
        "solver": "unipc",
        "guidance_scale": 1.75,
    }
    return make_pairs(fill(PairsRunSettings, values))


def values_of(pairs: Path, **changes: Any) -> dict[str, Any]:
    source = {"format": "pairs", "kind": "generation", "path": str(pairs)}
    values = {
        "task": "solver",
        "data": {"sources": {"pairs": source}},
        "num_inference_steps": 3,
        "shift": 1.5,
        "guidance_scale": 1.75,
        "batch_size": 8,
        "loop": {
            "steps": 12,
            "precision": "no",
            "ema_decay": 0.0,
            "optimizer": {"learning_rate": 0.01},
        },
    }
    return {**values, **changes}


def objective_of(pairs: Path, **changes: Any) -> SolverObjective:
    return SolverObjective(fill(SolverSettings, values_of(pairs, **changes)))


def missed(pairs: Path, saturation: float, **options: Any) -> float:
    """The loss of what the pipeline draws of the pairs, with three evaluations."""
    source = {"format": "pairs", "kind": "generation", "path": str(pairs)}
    held = open_source("pairs", source_settings("pairs", source))
    samples = [held[index] for index in range(len(held))]
    x_0, x_1 = (torch.cat(ends) for ends in zip(*(sample.ends for sample in samples), strict=True))
    pipe = JanusFlowPipeline.from_pretrained("tiny", vae=None)
    pipe.set_progress_bar_config(disable=True)
    out = pipe(
        [sample.prompt for sample in samples],
        latents=x_0,
        num_inference_steps=3,
        guidance_scale=1.75,
        output_type="latent",
        **options,
    )
    assert out.nfe == 3
    errors = (out.latents - x_1).square().flatten(1).mean(1)
    return (errors / (errors + saturation)).mean().item()


@pytest.mark.parametrize("start", ["euler", "ab2", "dpm++2m", "unipc"])
def test_it_starts_as_the_known_solver(pairs: Path, start: str) -> None:
    objective = objective_of(pairs, start=start, saturation=0.5)
    loss = objective(**objective.batch(0))["missed"].item()
    assert loss > 0.1, "a loss without errors says nothing"
    assert loss == pytest.approx(missed(pairs, 0.5, solver=start, shift=1.5), rel=1e-3)


def test_what_it_learns_draws_nearer_to_the_pairs(pairs: Path, tmp_path: Path) -> None:
    bad = {"start": "euler", "shift": 4.0, "saturation": 0.5}
    config = tmp_path / "solver.yaml"
    config.write_text(json.dumps(values_of(pairs, output_dir=str(tmp_path), **bad)))
    assert run(config)
    file = tmp_path / "final" / "solver.json"
    before = missed(pairs, 0.5, solver="euler", shift=4.0)
    assert missed(pairs, 0.5, solver=f"fitted:{file}") < 0.9 * before
    fitted_to = json.loads(file.read_text())["fitted_to"]
    assert (fitted_to["model"], fitted_to["guidance_scale"]) == ("tiny", 1.75)


def test_the_model_is_left_alone_and_few_numbers_are_trained(pairs: Path) -> None:
    objective = objective_of(pairs)
    assert sum(weight.numel() for weight in objective.parameters()) == 3 + 9
    objective(**objective.batch(0))["missed"].backward()
    assert objective.log_gaps.grad is not None
    assert objective.weights.grad is not None
    assert objective.log_gaps.grad.abs().min() > 0
    below = objective.weights.grad[torch.tril(torch.ones(3, 3), -1).bool()]
    assert below.abs().min() > 0


def test_a_stream_goes_on_where_it_was(pairs: Path) -> None:
    first = objective_of(pairs, batch_size=3)
    first.batch(0)
    state = first.data_state()
    expected = first.batch(1)
    second = objective_of(pairs, batch_size=3)
    second.load_data_state(state)
    for name, held in second.batch(1).items():
        assert torch.equal(held, expected[name])


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
        ({"start": "midpoint"}, "start is 'midpoint'.* take euler, ab2"),
        ({"start": "dopri5"}, "start is 'dopri5'.* take euler, ab2"),
        ({"data": {"sources": {"captions": CAPTIONS}}}, "make them with task pairs"),
    ],
)
def test_bad_settings_are_refused(pairs: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        objective_of(pairs, **changes)


def test_coefficients_are_the_weights_of_all_velocities() -> None:
    expected = torch.tensor([[0.5, 0.0], [0.5 - 0.25, 0.5 + 0.25]], dtype=torch.float64)
    torch.testing.assert_close(coefficients_of("ab2", time_grid(2)), expected)


def test_the_bundled_solver_is_of_the_bundled_model() -> None:
    file = Path(janusflow.__file__).parent / "assets" / "solvers" / "tiny-6.json"
    fitted_to = json.loads(file.read_text(encoding="utf-8"))["fitted_to"]
    assert fitted_to["weights_hash"] == describe("tiny").weights_hash
