"""Fitted solvers: sums of velocities with weights from a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from janusflow.errors import SettingsError
from janusflow.flow.fitted_solver import FittedSolver, bundled_names
from janusflow.flow.solvers import make_solver, solve, solver_names
from janusflow.flow.timesteps import time_grid

sys.path.insert(0, str(Path(__file__).parents[1]))
from problems import MIXTURE, PROBLEMS

START = torch.tensor([[1.0, -0.5], [0.3, 2.0]], dtype=torch.float64)
NAMES = [f"fitted:{name}" for name in bundled_names()]

# Two steps of Adams-Bashforth, the first of them Euler's.
TIMES = [0.0, 0.4, 1.0]
WEIGHTS = [[0.4], [0.4 - 0.45, 0.6 + 0.45]]


def written(folder: Path, **changes: object) -> str:
    file = folder / "solver.json"
    file.write_text(json.dumps({"times": TIMES, "weights": WEIGHTS, **changes}))
    return f"fitted:{file}"


def test_the_weights_of_a_known_solver_are_that_solver(tmp_path: Path) -> None:
    found = solve(
        MIXTURE.velocity, START, time_grid(2), solver=written(tmp_path), return_trajectory=True
    )
    times = torch.tensor(TIMES, dtype=torch.float64)
    known = solve(MIXTURE.velocity, START, times, solver="ab2", return_trajectory=True)
    torch.testing.assert_close(found.trajectory, known.trajectory, rtol=0, atol=1e-12)
    assert found.times.tolist() == TIMES
    assert found.nfe == 2


@pytest.mark.parametrize("name", NAMES)
def test_bundled_solvers_integrate_a_constant_velocity_exactly(name: str) -> None:
    problem = PROBLEMS["constant"]
    found = solve(problem.field, START, time_grid(make_solver(name).steps), solver=name)
    torch.testing.assert_close(found.latents, problem.solution(START), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_bundled_solvers_are_listed_and_take_rows_alone(name: str) -> None:
    assert solver_names()[name] == (None, 1, False, False)
    grid = time_grid(make_solver(name).steps)
    both = solve(MIXTURE.velocity, START, grid, solver=name).latents
    alone = solve(MIXTURE.velocity, START[1:], grid, solver=name).latents
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-12)


def test_a_solver_is_written_as_it_is_read(tmp_path: Path) -> None:
    name = written(tmp_path)
    content = FittedSolver.from_file(name.removeprefix("fitted:")).content()
    assert content == {"times": TIMES, "weights": WEIGHTS}


def test_a_replaced_state_moves_all_later_ones(tmp_path: Path) -> None:
    field, seen = PROBLEMS["of time"].field, []

    def moved(index: int, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x + 1 if index == 0 else x

    name = written(tmp_path)
    found = solve(field, START, time_grid(2), solver=name, on_step=moved).latents
    plain = solve(field, START, time_grid(2), solver=name).latents
    torch.testing.assert_close(found, plain + 1, rtol=0, atol=1e-12)
    assert len(seen) == 2


@pytest.mark.parametrize("times", [time_grid(3), time_grid(1), [0.1, 0.5, 1.0], [0.0, 0.5, 0.9]])
def test_other_runs_are_refused(tmp_path: Path, times: object) -> None:
    with pytest.raises(SettingsError, match=r"fitted for 2 steps .* set num_inference_steps=2"):
        solve(MIXTURE.velocity, START, times, solver=written(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"times": [0.0, 0.4, 0.9]}, "go from 0 to 1, got 0 to 0.9"),
        ({"times": [0.0, 1.4, 1.0]}, "increase strictly"),
        ({"times": [0.0, 1.0]}, r"have shape \(1, 1\).* got \(2, 2\)"),
        ({"weights": [[0.4], [0.4, 0.5]]}, "sum to the times of their states"),
        ({"weights": [[0.4], [float("nan"), 0.5]]}, "sum to the times of their states"),
        ({"weights": [[0.4], [0.3, 0.3, 0.4]]}, "no fitted solver"),
        ({"weights": "none"}, "no fitted solver"),
        ({"times": None}, "no fitted solver"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make_solver(written(tmp_path, **changes))


def test_weights_of_velocities_to_come_are_refused() -> None:
    times, weights = torch.tensor(TIMES), torch.tensor([[0.3, 0.1], [0.5, 0.5]])
    with pytest.raises(SettingsError, match="zeros above the diagonal"):
        FittedSolver(times, weights)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for name in (tmp_path / "none.json", tmp_path, ""):
        with pytest.raises(SettingsError, match=r"expected a bundled one .* or a file"):
            make_solver(f"fitted:{name}")
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(SettingsError, match="no fitted solver"):
        make_solver(f"fitted:{tmp_path / 'text.json'}")
