"""The other commands, and what holds for all of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import janusflow
from janusflow import JanusFlowPipeline
from janusflow.cli import main
from janusflow.commands import info as info_command

ROOT = Path(janusflow.__file__).parents[1]
QUESTION = "What is above?"


# --- all commands ------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["paint"], ["--bad"], ["eval"], ["eval", "imagenet"]])
def test_no_command_or_an_unknown_one_is_a_mistake(fails: Callable, arguments: list) -> None:
    assert "--help" in fails(*arguments)


def test_an_argument_too_many_is_a_mistake(fails: Callable, model: Path) -> None:
    assert "surplus" in fails("info", model, "surplus")


def test_an_interrupted_command_ends_with_status_130(
    run: Callable, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(info_command, "run", interrupted)
    done = run("info", model)
    assert (done.status, done.err) == (130, "")


def test_an_error_of_several_lines_is_told_in_one(
    fails: Callable, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wordy(_: object) -> None:
        raise OSError("first\n  second")

    monkeypatch.setattr(info_command, "run", wordy)
    assert fails("info", model) == "janusflow: error: first second"


def test_a_reader_that_has_gone_is_no_error(model: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "janusflow.cli", "info", str(model)]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_bug_is_a_traceback_and_no_mistake_of_the_user(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(info_command, "run", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["info", str(model)])


# --- models that are none ----------------------------------------------------------------------


def change(folder: Path, how: str) -> None:
    """Damage the weights of a pipeline folder in one way."""
    file = folder / "model" / "model.safetensors"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
        return
    tensors = load_file(file)
    name = sorted(tensors)[0]
    if how == "missing":
        del tensors[name]
    elif how == "extra":
        tensors["surplus"] = torch.zeros(3)
    else:
        tensors[name] = torch.zeros(3, 3, 3)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("how", ["missing", "extra", "wrongly shaped", "truncated"])
def test_a_damaged_checkpoint_is_refused_by_every_command(
    fails: Callable, model: Path, tmp_path: Path, how: str
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "damaged"))
    change(folder, how)
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    for arguments in (
        ("generate", "a red circle", "--model", folder),
        ("ask", "image.png", QUESTION, "--model", folder),
        ("info", folder),
        ("convert", folder, "converted"),
        ("eval", "shapes", "--model", folder, "--json", "scores.json"),
    ):
        assert "damaged" in fails(*arguments)


@pytest.mark.parametrize("where", ["empty", "file", "nowhere", "nobody/nothing", "other"])
def test_what_is_no_model_is_refused(fails: Callable, tmp_path: Path, where: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    for arguments in (("generate", "a red circle", "--model", where), ("info", where)):
        assert where in fails(*arguments)


# --- ask ---------------------------------------------------------------------------------------


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.new("RGB", (50, 30), "red").save(tmp_path / "image.png")
    return tmp_path / "image.png"


def answer(model: Path, *images: Path, tokens: int = 12) -> str:
    content: list[dict[str, Any]] = [{"type": "image", "image": str(image)} for image in images]
    content.append({"type": "text", "text": QUESTION})
    pipe = JanusFlowPipeline.from_pretrained(model, vae=None)
    return pipe.chat([{"role": "user", "content": content}], max_new_tokens=tokens)


def test_ask_prints_the_answer_about_one_image_or_several(
    run: Callable, model: Path, image: Path
) -> None:
    for images in ([image], [image, image]):
        done = run(
            "ask", *images, QUESTION, "--model", model, "--max-new-tokens", 12, "--device", "cpu"
        )
        assert (done.status, done.err) == (0, "")
        assert done.out == answer(model, *images) + "\n"


def test_ask_streams_on_a_terminal(
    run: Callable, model: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict] = []
    whole = JanusFlowPipeline.chat

    def chat(pipe: JanusFlowPipeline, *given: Any, **options: Any) -> Any:
        asked.append(options)
        return whole(pipe, *given, **options)

    monkeypatch.setattr(JanusFlowPipeline, "chat", chat)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    done = run("ask", image, QUESTION, "--model", model, "--device", "cpu")
    assert asked[0]["stream"] is True
    assert done.out == answer(model, image, tokens=64) + "\n"


def test_ask_refuses_what_is_no_picture_or_no_question(
    fails: Callable, model: Path, image: Path, tmp_path: Path
) -> None:
    (tmp_path / "zero.png").touch()
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "half.png").write_bytes(image.read_bytes()[:60])
    Image.new("1", (20000, 15000)).save(tmp_path / "huge.png")
    for name, says in (
        ("zero.png", "0 bytes"),
        ("text.png", "not a picture"),
        ("half.png", "half.png"),
        ("huge.png", "megapixels"),
        ("none.png", "none.png"),
    ):
        assert says in fails("ask", name, QUESTION, "--model", model)
    assert "QUESTION" in fails("ask", image, "--model", model)
    assert "question" in fails("ask", image, " ", "--model", model)
    assert "shorten" in fails("ask", image, "word " * 300, "--model", model)
    assert "--max-new-tokens" in fails("ask", image, QUESTION, "--max-new-tokens", 0)


# --- info and convert --------------------------------------------------------------------------


def test_info_tells_layout_heads_and_sizes_for_people_and_as_json(
    run: Callable, model: Path
) -> None:
    pipe = JanusFlowPipeline.from_pretrained(model)
    total = sum(p.numel() for part in (pipe.model, pipe.vae) for p in part.parameters())
    held = json.loads(run("info", model, "--json").out)
    assert held["total_parameters"] == total
    assert (held["layout"], held["heads"]) == ("janusflow", ["flow"])
    lines = dict(line.split(None, 1) for line in run("info", model).out.splitlines())
    assert lines["total_parameters"] == f"{total:,}"
    assert lines["heads"] == "flow"


def test_convert_goes_to_the_published_layout_and_back(
    run: Callable, fails: Callable, model: Path
) -> None:
    assert run("convert", model, "published", "--to", "published").out == "published\n"
    assert run("convert", "published", "back").status == 0
    held = [json.loads(run("info", w, "--json").out) for w in (model, "published", "back")]
    assert [one["layout"] for one in held] == ["janusflow", "janusflow-published", "janusflow"]
    assert held[0]["weights_hash"] == held[2]["weights_hash"]
    assert "--to" in fails("convert", model, "there", "--to", "elsewhere")


# --- train -------------------------------------------------------------------------------------


def test_train_hands_the_config_and_its_overrides_on(
    run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple] = []
    monkeypatch.setattr("janusflow.training.run.run", lambda *given: seen.append(given))
    overrides = ("--loop.steps", 10, "--loop.rate=-1", "--kl-weight", "1e-3")
    done = run("train", "config.yaml", "--output-dir", "runs/one", *overrides)
    assert (done.status, done.err) == (0, "")
    expected = ["loop.steps=10", "loop.rate=-1", "kl_weight=1e-3", "output_dir=runs/one"]
    assert seen == [(Path("config.yaml"), expected)]


def test_train_refuses_configs_that_are_missing_or_have_a_typo(
    fails: Callable, tmp_path: Path
) -> None:
    assert "no.yaml" in fails("train", "no.yaml")
    (tmp_path / "list.yaml").write_text("- task\n")
    assert "mapping" in fails("train", "list.yaml")
    (tmp_path / "typo.yaml").write_text("task: autoencoder\nbatch_sise: 3\n")
    assert "batch_size" in fails("train", "typo.yaml")
    (tmp_path / "good.yaml").write_text("task: autoencoder\n")
    assert "batch_size" in fails("train", "good.yaml", "--batch-sise", 3)
    assert "needs a value" in fails("train", "good.yaml", "--batch-size")
    assert "stray" in fails("train", "good.yaml", "stray")


# --- eval --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("benchmark", "num"), [("shapes", 6), ("shapes-vqa", 8)])
def test_eval_prints_a_table_and_writes_the_same_as_json(
    run: Callable, model: Path, tmp_path: Path, benchmark: str, num: int
) -> None:
    few = ("--num", num, "--device", "cpu", *(("--steps", 1) if benchmark == "shapes" else ()))
    done = run("eval", benchmark, "--model", model, *few, "--json", "scores.json")
    assert (done.status, done.err) == (0, "")
    held = json.loads((tmp_path / "scores.json").read_text())
    settings = held.pop("settings")
    assert settings["benchmark"] == benchmark
    assert len(settings["weights"]) == 64
    assert held.pop("num_prompts") == num
    assert 0 <= held["overall"] <= 1
    table = {line.split()[0]: float(line.split()[1]) for line in done.out.splitlines()}
    assert table == pytest.approx(held, abs=5e-4)
    assert len(held) > 3


def test_eval_finds_a_file_that_cannot_be_written_before_it_begins(
    fails: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loads(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(JanusFlowPipeline, "from_pretrained", loads)
    for benchmark in ("shapes", "shapes-vqa"):
        assert "no/folder" in fails("eval", benchmark, "--json", "no/folder/scores.json")
    assert "no/folder" in fails("eval", "shapes", "--sheet", "no/folder/sheet.png")
    assert "--steps" in fails("eval", "shapes", "--steps", 0)
    assert "--num" in fails("eval", "shapes-vqa", "--num", 0)
    assert "euler" in fails("eval", "shapes", "--solver", "oiler")
