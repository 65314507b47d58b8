"""The commands with the VQ head, and the comparison of both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny import make_pipeline
from transformers.utils import logging as transformers_logging

from janusflow import JanusFlowPipeline

PROMPT = "a red circle"
CPU = ("--device", "cpu")


@pytest.fixture(scope="session")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline with both heads; not to be changed."""
    folder = tmp_path_factory.mktemp("cli") / "both"
    transformers_logging.disable_progress_bar()
    make_pipeline(("flow", "vq"), image_size=32).save_pretrained(folder)
    return folder


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as picture:
        return np.asarray(picture)


def settings_of(file: Path) -> dict:
    with Image.open(file) as picture:
        return json.loads(picture.text["janusflow"])


def test_generate_draws_with_the_head_that_is_asked_for(
    run: Callable, both: Path, tmp_path: Path
) -> None:
    options = ("--head", "vq", "--temperature", 0.7, "--top-k", 9, "--seed", 3)
    done = run("generate", PROMPT, "--model", both, *CPU, *options)
    assert (done.status, done.err) == (0, "")
    pipe = JanusFlowPipeline.from_pretrained(both)
    pipe.set_progress_bar_config(disable=True)
    (expected,) = pipe(PROMPT, head="vq", temperature=0.7, top_k=9, seed=3).images
    assert np.array_equal(pixels(tmp_path / "out.png"), np.asarray(expected))
    held = settings_of(tmp_path / "out.png")
    assert (held["head"], held["guidance"], held["temperature"]) == ("vq", 5.0, 0.7)
    assert (held["top_k"], held["nfe"]) == (9, 16)
    assert not {"steps", "solver", "top_p"} & held.keys()


def test_without_a_head_the_models_first_draws_with_its_defaults(
    run: Callable, both: Path, tmp_path: Path
) -> None:
    run("generate", PROMPT, "--model", both, *CPU)
    held = settings_of(tmp_path / "out.png")
    assert (held["head"], held["guidance"], held["steps"], held["solver"]) == (
        "flow", 2.0, 30, "euler",
    )  # fmt: skip
    assert "temperature" not in held


def test_options_of_the_other_head_are_warned_of(run: Callable, both: Path) -> None:
    done = run(
        "generate", PROMPT, "--model", both, *CPU, "--head", "vq", "--steps", 3, "--solver", "euler"
    )
    assert done.status == 0
    assert done.err.splitlines() == [
        "janusflow: warning: the vq head makes no use of --steps",
        "janusflow: warning: the vq head makes no use of --solver",
    ]
    done = run("generate", PROMPT, "--model", both, *CPU, "--steps", 1, "--top-p", 0.5)
    assert done.err == "janusflow: warning: the flow head makes no use of --top-p\n"


def test_options_that_cannot_be_are_refused(fails: Callable, both: Path) -> None:
    vq = ("generate", PROMPT, "--model", both, *CPU, "--head", "vq")
    assert "temperature" in fails(*vq, "--temperature", -1)
    assert "--temperature" in fails(*vq, "--temperature", "warm")
    assert "--top-k" in fails(*vq, "--top-k", 0)
    assert "top_p" in fails(*vq, "--top-p", 1.5)


def test_eval_scores_the_head_that_is_asked_for(run: Callable, both: Path, tmp_path: Path) -> None:
    few = ("--num", 6, *CPU, "--head", "vq", "--json", "scores.json")
    assert run("eval", "shapes", "--model", both, *few).status == 0
    held = json.loads((tmp_path / "scores.json").read_text())
    assert held["settings"]["head"] == "vq"
    assert "steps" not in held["settings"]


def test_info_names_both_heads(run: Callable, both: Path) -> None:
    held = json.loads(run("info", both, "--json").out)
    assert held["heads"] == ["flow", "vq"]
    assert {"flow head", "VQ head"} <= held["parameters"].keys()


def test_compare_writes_a_report_and_prints_its_tables(
    run: Callable, both: Path, tmp_path: Path
) -> None:
    settings = {
        "flow_model": str(both),
        "vq_model": str(both),
        "prompts": {"num": 6},
        "pictures": {"num": 6},
        "flow": {"num_inference_steps": [1]},
        "resamples": 20,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    command = ("compare", "config.yaml", "-o", "results", "--vq.top-k", 5)
    done = run(*command)
    assert (done.status, done.err) == (0, "")
    assert done.out.endswith("results/report.html\n")
    for text in ("tokenizers", "flow-1-steps", "vq-temperature-1", "trained alike?"):
        assert text in done.out
    held = json.loads((tmp_path / "results" / "results.json").read_text())
    assert held["settings"]["vq"]["top_k"] == 5
    assert run(*command).out == done.out


def test_compare_refuses_what_it_cannot_do(fails: Callable, both: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"flow_model: {both}\nvq_model: {both}\n")
    (tmp_path / "file").touch()
    command = ("compare", "config.yaml", "-o")
    assert "is a file" in fails(*command, "file")
    assert "is a file" in fails(*command, "file/inside")
    assert "did you mean 'flow.solver'" in fails(*command, "out", "--flow.solvr", "euler")
    assert "oiler" in fails(*command, "out", "--flow.solver", "oiler")
    assert "no model folder nowhere" in fails(*command, "out", "--vq-model", "nowhere")
    assert "-o" in fails("compare", "config.yaml")
    assert "no config file" in fails("compare", "none.yaml", "-o", "out")
