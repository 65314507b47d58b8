"""Options of `janusflow generate` that guide, solve and edit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from janusflow import JanusFlowPipeline
from janusflow.flow.guidance import Guidance

PROMPT = "a red circle"
FEW = ("--device", "cpu", "--steps", 3, "--seed", 5)


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as picture:
        return np.asarray(picture)


@pytest.fixture(scope="module")
def pipe(model: Path) -> JanusFlowPipeline:
    pipe = JanusFlowPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_options_are_those_of_the_pipeline_and_stand_in_the_file(
    run: Callable, model: Path, pipe: JanusFlowPipeline, tmp_path: Path
) -> None:
    options = ("--solver", "heun", "--shift", 2, "--guidance", 3, "--guidance-method", "cfg-zero")
    more = ("--guidance-interval", 0.2, 0.9, "--guidance-rescale", 0.5, "--negative", "a square")
    done = run("generate", PROMPT, "--model", model, *FEW, *options, *more)
    assert (done.status, done.err) == (0, "")
    (expected,) = pipe(
        PROMPT,
        negative_prompt="a square",
        num_inference_steps=3,
        solver="heun",
        shift=2.0,
        guidance=Guidance(3.0, interval=(0.2, 0.9), method="cfg-zero", rescale=0.5),
        seed=5,
    ).images
    assert np.array_equal(pixels(tmp_path / "out.png"), np.asarray(expected))
    with Image.open(tmp_path / "out.png") as picture:
        held = json.loads(picture.text["janusflow"])
    assert (held["solver"], held["shift"], held["guidance_method"]) == ("heun", 2.0, "cfg-zero")
    assert (held["guidance_interval"], held["negative"]) == ([0.2, 0.9], "a square")


def test_a_picture_is_edited_where_the_mask_is_white(
    run: Callable, model: Path, pipe: JanusFlowPipeline, tmp_path: Path
) -> None:
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "in.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    mask.save(tmp_path / "mask.png")
    files = ("--image", tmp_path / "in.png", "--mask-image", tmp_path / "mask.png")
    done = run("generate", PROMPT, "--model", model, *FEW, *files, "--strength", 0.9)
    assert (done.status, done.err) == (0, "")
    (expected,) = pipe(
        PROMPT,
        num_inference_steps=3,
        image=tmp_path / "in.png",
        mask_image=tmp_path / "mask.png",
        strength=0.9,
        seed=5,
    ).images
    assert np.array_equal(pixels(tmp_path / "out.png"), np.asarray(expected))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--solver", "hein"), "unknown solver 'hein'"),
        (("--guidance-method", "cgf"), "unknown guidance method 'cgf'"),
        (("--guidance-interval", 0.9, 0.1), "interval"),
        (("--shift", 0), "shift"),
        (("--rtol", 0.1), "no tolerances"),
        (("--image", "none.png"), "none.png"),
        (("--mask-image", "none.png"), "give image="),
    ],
)
def test_a_mistake_is_one_line_and_no_picture(
    fails: Callable, model: Path, options: tuple, named: str
) -> None:
    assert named in fails("generate", PROMPT, "--model", model, *FEW, *options)
