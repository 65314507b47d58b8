"""`janusflow generate`: files, their metadata, and mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import janusflow
from janusflow import JanusFlowPipeline

ROOT = Path(janusflow.__file__).parents[1]
PROMPT = "a red circle"
FEW = ("--steps", 2, "--device", "cpu")


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as picture:
        return np.asarray(picture)


def test_one_image_is_one_file_with_the_picture_that_the_pipeline_draws(
    run: Callable, model: Path, tmp_path: Path
) -> None:
    done = run("generate", PROMPT, "--model", model, *FEW, "--seed", 5)
    assert (done.status, done.out, done.err) == (0, "out.png\n", "")
    assert [file.name for file in tmp_path.iterdir()] == ["out.png"]
    pipe = JanusFlowPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    (expected,) = pipe(PROMPT, num_inference_steps=2, seed=5).images
    assert np.array_equal(pixels(tmp_path / "out.png"), np.asarray(expected))


def test_a_picture_holds_what_makes_it_again(run: Callable, model: Path, tmp_path: Path) -> None:
    run(
        "generate", "a red ⬤", PROMPT, "--model", model, *FEW, "--num-images", 2, "--seed", 7,
        "--guidance", 3.5, "-o", "some.png",
    )  # fmt: skip
    with Image.open(tmp_path / "some-1.png") as picture:
        held = json.loads(picture.text["janusflow"])
    assert held["prompt"] == "a red ⬤"
    assert (held["seed"], held["guidance"], held["steps"], held["solver"]) == (8, 3.5, 2, "euler")
    assert (held["device"], held["dtype"]) == ("cpu", "float32")
    assert held["versions"]["torch"] == torch.__version__.split("+")[0]
    assert len(held["weights"]) == 64
    again = ("generate", held["prompt"], "--seed", held["seed"], "--guidance", held["guidance"])
    run(*again, "--model", held["model"], *FEW)
    one, other = (pixels(tmp_path / name).astype(int) for name in ("some-1.png", "out.png"))
    assert abs(one - other).max() <= 1


def test_several_images_are_numbered_and_a_grid_is_one_more_file(
    run: Callable, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "deep").mkdir()
    arguments = ("generate", PROMPT, "a blue one", "--model", model, *FEW, "--num-images", 3)
    done = run(*arguments, "-o", "deep/x.png", "--grid")
    names = [f"deep/x-{index}.png" for index in range(6)]
    assert done.out.split() == [*names, "deep/x.png"]
    assert {f"deep/{file.name}" for file in (tmp_path / "deep").iterdir()} == {
        *names,
        "deep/x.png",
    }
    sheet = pixels(tmp_path / "deep" / "x.png")
    assert sheet.shape == (2 * 64 + 2, 3 * 64 + 2 * 2, 3)
    last = pixels(tmp_path / names[5])
    assert np.array_equal(sheet[-64:, -64:], last)
    assert not np.array_equal(pixels(tmp_path / names[0]), last)


def test_float16_is_warned_of_and_the_autoencoder_kept_out_of_it(
    run: Callable, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn(pipe: JanusFlowPipeline, *_: Any, **__: Any) -> Any:
        pipe.model.float()  # the CPU need not compute in float16
        return whole(pipe, *_, **__)

    whole = JanusFlowPipeline.__call__
    monkeypatch.setattr(JanusFlowPipeline, "__call__", drawn)
    done = run("generate", PROMPT, "--model", model, *FEW, "--dtype", "float16")
    assert done.status == 0
    assert done.err.startswith("janusflow: warning: the autoencoder is kept in float32")
    assert len(done.err.splitlines()) == 1


# --- in a process of its own -------------------------------------------------------------------


def command(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "janusflow.cli", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_the_same_seed_is_the_same_picture_in_two_processes(model: Path, tmp_path: Path) -> None:
    for name in ("one.png", "two.png"):
        done = command(
            "generate", PROMPT, "--model", model, *FEW, "--seed", 3, "-o", name, cwd=tmp_path
        )
        assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_a_damaged_autoencoder_is_one_line_although_libraries_have_much_to_say(
    model: Path, tmp_path: Path
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    file = broken / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["decoder.conv_out.bias"]
    save_file(tensors, file)
    done = command("generate", PROMPT, "--model", broken, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "missing keys: decoder.conv_out.bias" in line
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


# --- mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "PROMPT"),
        (["word " * 300], "shorten"),
        ([PROMPT, "--steps", 0], "--steps: expected a whole number of at least 1"),
        ([PROMPT, "--steps", -4], "--steps"),
        ([PROMPT, "--steps", "abc"], "'abc'"),
        ([PROMPT, "--steps", 2.5], "'2.5'"),
        ([PROMPT, "--guidance", "nan"], "--guidance: expected a finite number"),
        ([PROMPT, "--guidance", "inf"], "'inf'"),
        ([PROMPT, "--guidance", "much"], "'much'"),
        ([PROMPT, "--solver", "oiler"], "euler"),
        ([PROMPT, "--head", "vq"], "flow"),
        ([PROMPT, "--head", "fluw"], "flow"),
        ([PROMPT, "--num-images", 0], "--num-images"),
        ([PROMPT, "--seed", -1], "--seed"),
        ([PROMPT, "--seed", 2**63], "seed"),
        ([PROMPT, "--device", "gpu"], "gpu"),
        ([PROMPT, "--device", "meta"], "meta"),
        ([PROMPT, "--device", "cuda:99"], "cuda:99"),
        ([PROMPT, "--dtype", "int8"], "float32"),
        ([PROMPT, "--vae", "nowhere/at-all"], "vae=None"),
        ([PROMPT, "--stepz", 3], "--stepz"),
        ([PROMPT, "--step", 3], "--step"),
        ([PROMPT, "-o", "out.jpg"], ".png"),
        ([PROMPT, "-o", "no/folder/out.png"], "no/folder"),
        ([PROMPT, "-o", "."], ".png"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    fails: Callable, model: Path, arguments: list, says: str
) -> None:
    assert says in fails("generate", *arguments, "--model", model)


@pytest.mark.parametrize("where", ["a file/out.png", "folder.png", "/proc/out.png"])
def test_an_output_that_cannot_be_written_is_found_before_the_model_is_loaded(
    fails: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def loads(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    (tmp_path / "a file").touch()
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(JanusFlowPipeline, "from_pretrained", loads)
    line = fails("generate", PROMPT, "-o", where)
    assert "folder" in line


def test_pictures_that_cannot_be_written_leave_nothing_behind(
    fails: Callable, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", disk_full)
    assert "No space left" in fails("generate", PROMPT, "--model", model, *FEW)


# --- the bundled model -------------------------------------------------------------------------


def test_the_bundled_model_draws_what_it_is_told(run: Callable, tmp_path: Path) -> None:
    done = run("generate", "a red circle above a blue square", "--device", "cpu")
    assert done.status == 0, done.err
    picture = pixels(tmp_path / "out.png").astype(int)
    red = (picture[..., 0] > 150) & (picture[..., 1:].max(-1) < 100)
    blue = (picture[..., 2] > 150) & (picture[..., :2].max(-1) < 120)
    assert red.sum() > 30
    assert blue.sum() > 30
    assert np.nonzero(red)[0].mean() < np.nonzero(blue)[0].mean()
