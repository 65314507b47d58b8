"""Ablations: which runs are made with which settings, and what the tables make of their figures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from janusflow.errors import JanusFlowError, SettingsError
from janusflow.experiments.ablation import (
    AblationSettings,
    Figure,
    Hypothesis,
    hypotheses_table,
    outcome,
    run_ablation,
    runs_table,
)
from janusflow.files import held_alone
from janusflow.settings import fill, read_yaml

ROOT = Path(__file__).parents[2]
DESIGN = ROOT / "configs" / "ablation" / "tiny.yaml"


def records(**shares: list[float]) -> pd.DataFrame:
    """Shares of 100 prompts by run, one a seed."""
    return pd.DataFrame(
        [
            {"run": run, "seed": seed, "num": 100, "shapes_flow": share}
            for run, found in shares.items()
            for seed, share in enumerate(found)
        ]
    )


def test_the_error_of_one_seed_is_that_of_its_prompts():
    figure = Figure.of([0.5], 96)
    assert (figure.mean, figure.error) == (0.5, pytest.approx(0.05))
    assert 0.01 < Figure.of([0.0], 96).error < 0.03  # none of few is not none of all


def test_the_error_of_several_seeds_is_that_of_their_spread_where_it_is_larger():
    assert Figure.of([0.2, 0.8], 1000).error == pytest.approx(0.3)
    alike = Figure.of([0.5, 0.5], 48)
    assert alike.error == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("mean", "expected"),
    [(0.21, "holds"), (0.2, "undecided"), (-0.1, "undecided"), (-0.21, "the contrary")],
)
def test_two_standard_errors_decide(mean, expected):
    assert outcome(Figure(mean, 0.1)) == expected


def test_tables_show_figures_with_their_errors_and_leave_out_what_a_run_has_not():
    found = records(base=[0.9, 0.8], other=[0.5, 0.6])
    found.loc[len(found)] = {"run": "silent", "seed": 0, "num": 100, "shapes_flow": math.nan}
    lines = runs_table(found).splitlines()
    error = Figure.of([0.9, 0.8], 100).error
    assert lines[2] == f"| base | 0.850 ± {error:.3f} |"
    assert lines[4] == "| silent |  |"
    claim = Hypothesis("base is better", "base / shapes_flow", "other / shapes_flow")
    row = hypotheses_table(found, [claim]).splitlines()[2]
    both = math.hypot(error, Figure.of([0.5, 0.6], 100).error)
    assert row == f"| base is better | ours | 0.850 | 0.550 | +0.300 ± {both:.3f} | holds |"
    with pytest.raises(SettingsError, match="silent has no shapes_flow"):
        hypotheses_table(found, [Hypothesis("x", "silent / shapes_flow", "base / shapes_flow")])


def test_a_hypothesis_names_runs_of_the_design():
    with pytest.raises(SettingsError, match=r"'bas / shapes_flow'; expected RUN / FIGURE .* base"):
        AblationSettings("x.yaml", {"base": {}}, [Hypothesis("x", "bas / shapes_flow", "base / a")])
    with pytest.raises(SettingsError, match="all different"):
        AblationSettings("x.yaml", {"base": {}}, seeds=[1, 1])


@pytest.mark.parametrize("names", [["a/b"], ["a b", "a-b"]])
def test_every_run_has_a_folder_of_its_own(names):
    with pytest.raises(SettingsError, match="differ by more than blanks and dashes"):
        AblationSettings("x.yaml", {name: {} for name in names})


def test_no_jobs_at_all_are_refused(tmp_path):
    with pytest.raises(SettingsError, match="jobs is at least 1, not 0"):
        run_ablation(DESIGN, tmp_path, jobs=0)


def test_runs_of_the_shipped_design_change_settings_that_there_are():
    from janusflow.training.joint import JointSettings

    design = fill(AblationSettings, read_yaml(DESIGN))
    base = read_yaml(ROOT / design.base)
    for changes in design.runs.values():
        changed = fill(JointSettings, base, [f"{k}={json.dumps(v)}" for k, v in changes.items()])
        assert changed != fill(JointSettings, base) or not changes


@pytest.fixture
def small(tmp_path) -> Path:
    """A design of two runs of a toy size that differ in the density of times."""
    base: dict[str, Any] = {
        "task": "joint",
        "autoencoder": "tiny",
        "model": {
            "language_width": 32,
            "language_layers": 2,
            "language_heads": 2,
            "language_mlp": 64,
            "vision_width": 16,
            "vision_layers": 1,
            "vision_heads": 2,
            "adapter_width": 16,
        },
        "drawing": {"num_pictures": 16, "batch_size": 2, "noises_per_picture": 1},
        "looking": {"batch_size": 2},
        "patches": {"vision_weight": 0, "drawing_weight": 0},
        "preview": {"num": 6, "num_inference_steps": 1},
        "loop": {"steps": 1, "preview_every": 1, "precision": "no"},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    design = {
        "base": str(tmp_path / "base.yaml"),
        "runs": {"base": {}, "even times": {"drawing.timesteps": "uniform"}},
        "hypotheses": [
            {"claim": "c", "better": "base / shapes_flow", "than": "even times / shapes_flow"}
        ],
    }
    (tmp_path / "design.yaml").write_text(yaml.safe_dump(design))
    return tmp_path / "design.yaml"


def test_all_runs_are_made_and_their_tables_drawn(small, tmp_path):
    folder = tmp_path / "out"
    page = run_ablation(small, folder, ["loop.log_every=1"], jobs=2)
    assert (folder / "ablation.md").read_text() == page + "\n"
    assert page.count("\n| base | ") == 1
    assert page.count("\n| even times | ") == 1
    assert "| c | ours |" in page
    even = json.loads((folder / "even-times-seed0" / "settings.json").read_text())
    base = json.loads((folder / "base-seed0" / "settings.json").read_text())
    assert (base["drawing"]["timesteps"], even["drawing"]["timesteps"]) == (
        "logit-normal",
        "uniform",
    )
    losses = [
        json.loads((folder / name / "log.jsonl").read_text().splitlines()[0])["flow"]
        for name in ("base-seed0", "even-times-seed0")
    ]
    assert losses[0] != losses[1]
    assert len(list((folder / "encoded").glob("latents*.safetensors"))) == 1


def test_a_second_command_in_the_folder_is_refused(small, tmp_path):
    with (
        held_alone(tmp_path / "out", "ablation"),
        pytest.raises(SettingsError, match="another ablation is at work in"),
    ):
        run_ablation(small, tmp_path / "out", ["loop.stepps=1"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_a_run_that_fails_is_named_with_its_log(small, tmp_path):
    with pytest.raises(JanusFlowError, match=r"run 'base' failed .*stepps.*base-seed0\.log"):
        run_ablation(small, tmp_path / "out", ["loop.stepps=1"])
