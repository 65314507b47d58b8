"""The design of a sweep: which cells there are, in which order they are worked on."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from janusflow import JanusFlowConfig, SettingsError
from janusflow.experiments.sweep_design import Cell, cells
from janusflow.experiments.sweep_metrics import find_metrics
from janusflow.experiments.sweep_plan import Piece, plan
from janusflow.experiments.sweep_settings import SweepSettings
from janusflow.settings import fill, read_yaml

CONFIGS = Path(__file__).parents[2] / "configs" / "sweep"


def settings_of(**values: Any) -> SweepSettings:
    return fill(SweepSettings, values)


def cells_of(**axes: Any) -> list[Cell]:
    return cells(settings_of(axes=axes))


def test_a_grid_holds_every_combination_in_the_order_of_the_axes() -> None:
    found = cells_of(num_inference_steps=[4, 2], solver=["euler", "heun"], seed=[0, 100])
    assert [(cell.num_inference_steps, cell.solver, cell.seed) for cell in found] == [
        (steps, solver, seed)
        for steps in (4, 2)
        for solver in ("euler", "heun")
        for seed in (0, 100)
    ]
    assert len({cell.id for cell in found}) == 8


def test_cells_that_cannot_differ_are_one() -> None:
    vq = cells_of(
        head=["vq"],
        num_inference_steps=[1, 2],
        solver=["euler", "heun"],
        shift=[1.0, 3.0],
        guidance_method=["cfg", "apg"],
        temperature=[0.5, 1.0],
    )
    assert [(c.temperature, c.num_inference_steps, c.solver, c.shift) for c in vq] == [
        (0.5, None, None, None),
        (1.0, None, None, None),
    ]
    flow = cells_of(guidance_scale=[1.0, 3.0], guidance_method=["cfg", "apg"], temperature=[0, 1])
    assert [(c.guidance_scale, c.guidance_method, c.temperature) for c in flow] == [
        (1.0, None, None),
        (3.0, "cfg", None),
        (3.0, "apg", None),
    ]


def test_evaluations_become_the_whole_steps_of_each_solver() -> None:
    found = cells_of(nfe=[2, 4, 6], solver=["euler", "midpoint", "rk4"])
    assert [(cell.solver, cell.num_inference_steps) for cell in found] == [
        ("euler", 2),
        ("midpoint", 1),
        ("euler", 4),
        ("midpoint", 2),
        ("rk4", 1),
        ("euler", 6),
        ("midpoint", 3),
    ]
    odd = cells_of(nfe=[7], solver=["euler", "midpoint"])
    assert [(cell.solver, cell.num_inference_steps) for cell in odd] == [("euler", 7)]


def test_tolerances_are_of_adaptive_solvers_and_limits_of_tokens_of_drawn_ones() -> None:
    flow = cells_of(solver=["euler", "dopri5"], rtol=[None, 1e-5, 1e-2], top_k=[None, 5])
    assert [(cell.solver, cell.rtol, cell.top_k) for cell in flow] == [
        ("euler", None, None),
        ("dopri5", 1e-5, None),
        ("dopri5", 1e-2, None),
    ]
    found = cells_of(head=["vq"], temperature=[0.0, 1.0], top_k=[None, 5], top_p=[0.9], rtol=[0.1])
    assert [(cell.temperature, cell.top_k, cell.top_p, cell.rtol) for cell in found] == [
        (0.0, None, None, None),
        (1.0, None, 0.9, None),
        (1.0, 5, 0.9, None),
    ]


def test_a_rest_at_the_start_is_a_setting_of_the_flow_head_guided_or_not() -> None:
    found = cells_of(head=["flow", "vq"], guidance_scale=[1.0, 3.0], zero_init_steps=[0, 2])
    flow, vq = found[:4], found[4:]
    assert [(c.guidance_scale, c.guidance().zero_init_steps) for c in flow] == [
        (1.0, 0),
        (1.0, 2),
        (3.0, 0),
        (3.0, 2),
    ]
    assert [(c.head, c.zero_init_steps) for c in vq] == [("vq", None), ("vq", None)]


def test_the_fine_solution_neither_rests_nor_takes_the_tolerances_of_the_cell() -> None:
    (cell,) = cells_of(zero_init_steps=[2], solver=["dopri5"], rtol=[0.1], shift=[2.0])
    fine = cell.reference(settings_of().reference)
    assert fine is not None
    assert (fine.solver, fine.zero_init_steps, fine.shift) == ("midpoint", 0, 1.0)
    assert fine.options()["rtol"] is fine.options()["atol"] is None
    adaptive = settings_of(reference={"solver": "dopri5"}).reference
    fine = cell.reference(adaptive)
    assert fine is not None
    assert fine.rtol == 1e-5


def write_config(folder: Path, **values: Any) -> Path:
    """A checkpoint's config without a checkpoint."""
    JanusFlowConfig(flow_config={}, **values).save_pretrained(folder)
    return folder


def test_null_is_what_the_model_draws_with_and_no_weight_is_read_for_it(tmp_path: Path) -> None:
    (tmp_path / "published").mkdir()
    published = str(write_config(tmp_path / "published", vq_config={}))
    own = {"flow": {"guidance_scale": 1.5}, "vq": {"temperature": 0.5, "top_k": 9}}
    tuned = str(write_config(tmp_path / "tuned", vq_config={}, drawing_defaults=own))
    heads = ["flow", "vq"]
    found = cells_of(model=[published, tuned], head=heads, temperature=[None, 0.5])
    assert [(c.model, c.guidance_scale, c.temperature, c.top_k, c.top_p) for c in found] == [
        (published, 2.0, None, None, None),
        (published, 5.0, 1.0, None, None),
        (published, 5.0, 0.5, None, None),
        (tuned, 1.5, None, None, None),
        (tuned, 5.0, 0.5, 9, None),
    ]
    (said,) = cells_of(
        model=[tuned], head=["vq"], guidance_scale=[5.0], temperature=[0.5], top_k=[9]
    )
    assert said == found[-1]
    assert said.id == found[-1].id
    with pytest.raises(SettingsError, match="no generation head 'vq'; it holds: flow"):
        cells_of(model=[str(write_config(tmp_path / "flow"))], head=["vq"])


def test_the_bundled_model_draws_tokens_by_its_own_guidance_and_temperature() -> None:
    (cell,) = cells_of(head=["vq"])
    assert (cell.guidance_scale, cell.temperature) == (2.0, 0.5)


def test_a_cell_asks_the_pipeline_for_all_that_it_says() -> None:
    (cell,) = cells_of(
        guidance_scale=[3.0],
        guidance_interval=[[0.2, 0.8]],
        guidance_method=["cfg-zero"],
        guidance_rescale=[0.5],
        zero_init_steps=[1],
        solver=["dopri5"],
        shift=[2.0],
        rtol=[1e-3],
        num_inference_steps=[7],
    )
    options = cell.options()
    guidance = options.pop("guidance")
    assert options == {
        "head": "flow",
        "num_inference_steps": 7,
        "solver": "dopri5",
        "shift": 2.0,
        "rtol": 1e-3,
        "atol": 1e-3,
    }
    assert (guidance.scale, guidance.interval) == (3.0, (0.2, 0.8))
    assert (guidance.method, guidance.rescale, guidance.zero_init_steps) == ("cfg-zero", 0.5, 1)
    (cell,) = cells_of(head=["vq"], guidance_scale=[3.0], temperature=[0.5], top_k=[7], top_p=[0.9])
    assert cell.options() == {
        "head": "vq",
        "guidance_scale": 3.0,
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.9,
    }


RANDOM: dict[str, Any] = {
    "design": "random",
    "axes": {"solver": ["euler", "heun"]},
    "random": {
        "num_cells": 30,
        "uniform": {"guidance_scale": [1.5, 9.0]},
        "log_uniform": {"num_inference_steps": [1, 100]},
    },
}


def test_a_random_design_draws_different_cells_inside_its_ranges() -> None:
    found = cells(fill(SweepSettings, RANDOM))
    assert len({cell.id for cell in found}) == 30
    assert {cell.solver for cell in found} == {"euler", "heun"}
    assert all(1.5 <= cell.guidance_scale <= 9 for cell in found)
    steps = sorted(cell.num_inference_steps or 0 for cell in found)
    assert steps[0] >= 1
    assert steps[-1] <= 100
    assert 3 < steps[15] < 30, "half of them on either side of 10, as ratios count"
    assert found == cells(fill(SweepSettings, RANDOM))
    assert found != cells(fill(SweepSettings, RANDOM, ["random.seed=1"]))


def test_whole_numbers_are_drawn_as_such_and_others_to_four_digits() -> None:
    random = {"num_cells": 20, "uniform": {"top_k": [1, 90], "top_p": [0.5, 1.0]}}
    axes = {"head": ["vq"], "temperature": [1.0]}
    found = cells(settings_of(design="random", axes=axes, random=random))
    assert all(isinstance(cell.top_k, int) and 1 <= cell.top_k <= 90 for cell in found)
    assert len({cell.top_k for cell in found}) > 10
    assert all(0.5 <= (cell.top_p or 0) <= 1 for cell in found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes": {"num_inference_step": [1]}}, "did you mean 'axes.num_inference_steps'"),
        ({"axes": {"solver": []}}, "axes.solver names at least one value"),
        ({"axes": {"solver": ["oiler"]}}, "oiler"),
        ({"axes": {"num_inference_steps": [0]}}, "num_inference_steps"),
        ({"axes": {"num_inference_steps": ["many"]}}, "many"),
        ({"axes": {"guidance_method": ["magic"]}}, "magic"),
        ({"axes": {"guidance_interval": [[0.8, 0.2]]}}, "guidance interval"),
        ({"axes": {"guidance_scale": [float("inf")]}}, "finite"),
        ({"axes": {"guidance_scale": [float("nan")], "head": ["vq"]}}, "finite"),
        ({"axes": {"shift": [0.0]}}, "shift"),
        ({"axes": {"nfe": [8], "num_inference_steps": [4]}}, "both say the steps"),
        ({"axes": {"nfe": [8], "solver": ["dopri5"]}}, "chooses its evaluations itself"),
        ({"axes": {"nfe": [3], "solver": ["rk4"]}}, "whole steps of none"),
        ({"axes": {"nfe": [0]}}, "num_inference_steps"),
        ({"axes": {"solver": ["explicit_adams"], "shift": [3.0]}}, "uniform grid"),
        ({"axes": {"temperature": [-1.0], "head": ["vq"]}}, "temperature"),
        ({"axes": {"top_k": [0], "head": ["vq"]}}, "top_k"),
        ({"axes": {"top_p": [1.5], "head": ["vq"]}}, "top_p"),
        ({"axes": {"zero_init_steps": [-1]}}, "zero_init_steps"),
        ({"axes": {"solver": ["dopri5"], "rtol": [0.0]}}, "rtol must be a number of at least"),
        ({"axes": {"head": ["diffusion"]}}, "head is 'diffusion'"),
        ({"axes": {"dtype": ["int8"]}}, "dtype is 'int8'"),
        ({"axes": {"seed": [-1]}}, "seed is at least 0"),
        ({"design": "spiral"}, "expected 'grid' or 'random'"),
        ({"batch_size": 0}, "batch_size is at least 1"),
        ({"prompts": {"num": 0}}, "at least 1"),
        ({"reference": {"dtype": "int8"}}, "reference.dtype"),
        ({"reference": {"solver": "oiler"}}, "oiler"),
        ({"design": "random", "random": {"num_cells": 2}}, "only 1 different cells"),
        ({"design": "random", "random": {"uniform": {"solver": [0, 1]}}}, "ranges are of"),
        ({"design": "random", "random": {"uniform": {"shift": [3, 1]}}}, "the least first"),
        (
            {
                "design": "random",
                "axes": {"nfe": [4]},
                "random": {"uniform": {"num_inference_steps": [1, 9]}},
            },
            "ranges are of guidance_rescale, guidance_scale, rtol, shift, temperature, top_k, top",
        ),
        ({"design": "random", "random": {"log_uniform": {"shift": [0, 1]}}}, "above 0"),
        (
            {
                "design": "random",
                "random": {"uniform": {"shift": [1, 3]}, "log_uniform": {"shift": [1, 3]}},
            },
            "both name",
        ),
    ],
)
def test_a_bad_design_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        cells(fill(SweepSettings, changes))


def changes_of(pieces: list[Piece], *names: str) -> int:
    return len(list(groupby(pieces, lambda p: tuple(getattr(p.cell, name) for name in names))))


@pytest.mark.parametrize("shared", [False, True])
def test_work_is_ordered_so_that_nothing_is_loaded_or_encoded_twice(shared: bool) -> None:
    settings = settings_of(
        axes={
            "num_inference_steps": [1, 2],
            "model": ["one", "two"],
            "dtype": ["bfloat16", "float32"],
            "head": ["flow", "vq"],
            "guidance_scale": [1.0, 2.0],
            "temperature": [0],
        },
        batch_size=4,
        images_per_prompt=2,
    )
    found = cells(settings)
    pieces = plan(found, settings, 5, with_references=True, shared=shared)
    assert len({piece.name for piece in pieces}) == len(pieces)
    drawn = [(piece.cell, piece.start, piece.stop) for piece in pieces if not piece.is_reference]
    chunks = [(0, 2), (2, 4), (4, 5)]
    assert set(drawn) == {(cell, *chunk) for cell in found for chunk in chunks}
    assert changes_of(pieces, "model") == 2
    assert changes_of(pieces, "model", "dtype") == 4
    if not shared:
        keys = [(p.cell.model, p.cell.dtype, p.cell.head, p.start) for p in pieces]
        assert len(list(groupby(keys))) == len(set(keys))
    there = set()
    for piece in pieces:
        fine = piece.cell.reference(settings.reference)
        if piece.is_reference:
            there.add((piece.cell, piece.start))
        elif fine is not None:
            assert (fine, piece.start) in there
    assert len(there) == 2 * 2 * 3  # models, guidances, chunks: one for both dtypes and all steps
    alone = plan(found, settings, 5, with_references=False)
    assert not any(piece.is_reference for piece in alone)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_shipped_configs_fit_their_settings_and_say_why(file: Path) -> None:
    settings = fill(SweepSettings, read_yaml(file))
    assert len(cells(settings)) > 5
    find_metrics(settings.metrics, of_shapes=settings.prompts.source == "shapes")
    lines = file.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    assert not lines[1].startswith("#")
