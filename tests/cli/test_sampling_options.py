"""Options of `janusflow generate` that guide, solve and edit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from janusflow import PRESETS, JanusFlowPipeline
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


def test_a_preset_fills_in_what_is_not_given(
    run: Callable, model: Path, pipe: JanusFlowPipeline, tmp_path: Path
) -> None:
    few = ("--model", model, "--device", "cpu", "--seed", 5)
    for more, changes in (((), {}), (("--steps", 2), {"num_inference_steps": 2})):
        assert run("generate", PROMPT, *few, "--preset", "fast", *more).status == 0
        (expected,) = pipe(PROMPT, seed=5, **{**PRESETS["fast"], **changes}).images
        assert np.array_equal(pixels(tmp_path / "out.png"), np.asarray(expected))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--preset", "slow"), "unknown preset 'slow'; known: fast"),
        (("--preset", "fast", "--head", "vq"), "draw with --head flow"),
    ],
)
def test_a_preset_that_does_not_fit_is_refused(
    run: Callable, options: tuple[str, ...], message: str
) -> None:
    done = run("generate", PROMPT, "--model", "tiny", "--device", "cpu", *options)
    assert done.status == 2
    assert message in done.err


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


def settings(file: Path) -> dict:
    with Image.open(file) as picture:
        return json.loads(picture.text["janusflow"])


@pytest.mark.parametrize(
    ("options", "held"),
    [
        (("--strength", 0.7), {"edit": "sdedit", "edit_settings": {}, "strength": 0.7}),
        (
            ("--edit", "flowedit", "--source-prompt", "a teal square"),
            {
                "edit": "flowedit",
                "edit_settings": {"n_avg": 1, "source_guidance_scale": 1.0},
                "strength": 0.85,
                "source_prompt": "a teal square",
            },
        ),
        (
            ("--edit", "inversion"),
            {
                "edit": "inversion",
                "edit_settings": {"gamma": 0.5, "eta": 0.9, "stop": 0.25},
                "strength": 1.0,
                "source_prompt": "",
            },
        ),
    ],
)
def test_every_edit_is_that_of_the_pipeline_and_stands_in_the_file(
    run: Callable, model: Path, pipe: JanusFlowPipeline, tmp_path: Path, options: tuple, held: dict
) -> None:
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "in.png")
    file = ("--image", tmp_path / "in.png")
    done = run("generate", PROMPT, "--model", model, *FEW, *file, *options)
    assert (done.status, done.err) == (0, "")
    found = settings(tmp_path / "out.png")
    assert {name: found.get(name) for name in held} == held
    assert found["image"] == str(tmp_path / "in.png")
    expected = pipe(
        PROMPT,
        num_inference_steps=3,
        image=tmp_path / "in.png",
        edit=held["edit"],
        source_prompt=held.get("source_prompt"),
        strength=held["strength"],
        seed=5,
    )
    assert np.array_equal(pixels(tmp_path / "out.png"), np.asarray(expected.images[0]))
    assert (found["nfe"], found["num_forward_passes"]) == (
        expected.nfe,
        expected.num_forward_passes,
    )


def test_a_picture_that_is_no_edit_has_no_settings_of_one(
    run: Callable, model: Path, tmp_path: Path
) -> None:
    run("generate", PROMPT, "--model", model, *FEW)
    assert not {"edit", "edit_settings", "strength"} & settings(tmp_path / "out.png").keys()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--solver", "hein"), "unknown solver 'hein'"),
        (("--guidance-method", "cgf"), "unknown guidance method 'cgf'"),
        (("--guidance-interval", 0.9, 0.1), "interval"),
        (("--shift", 0), "shift"),
        (("--rtol", 0.1), "no tolerances"),
        (("--image", "none.png"), "none.png"),
        (("--mask-image", "none.png"), "mask_image= is of editing a picture; give image="),
        (("--edit", "sdedit"), "edit= is of editing a picture; give image="),
        (("--source-prompt", "a"), "source_prompt= is of editing a picture; give image="),
        (("--strength", 0.5), "strength= is of editing a picture; give image="),
        (("--edit", "flow"), "unknown edit 'flow'"),
    ],
)
def test_a_mistake_is_one_line_and_no_picture(
    fails: Callable, model: Path, options: tuple, named: str
) -> None:
    assert named in fails("generate", PROMPT, "--model", model, *FEW, *options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--source-prompt", "a"), "leave source_prompt out"),
        (("--edit", "flowedit", "--solver", "heun"), "Euler's steps alone"),
        (("--edit", "inversion", "--solver", "heun"), "'heun' evaluates at t = 0"),
        (("--edit", "sdedit", "--strength", 2), "strength must be above 0"),
    ],
)
def test_a_mistake_in_an_edit_is_one_line_and_no_picture(
    fails: Callable, model: Path, tmp_path: Path, options: tuple, named: str
) -> None:
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "in.png")
    file = ("--image", tmp_path / "in.png")
    assert named in fails("generate", PROMPT, "--model", model, *FEW, *file, *options)
