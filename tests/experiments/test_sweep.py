"""A sweep on random weights: what its table says, and what a killed run leaves behind."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from tiny import make_pipeline

from janusflow import JanusFlowPipeline, SettingsError
from janusflow.cli import main
from janusflow.experiments import sweep as module
from janusflow.experiments.sweep import SweepResult, sweep
from janusflow.experiments.sweep_design import cells
from janusflow.experiments.sweep_settings import SweepSettings
from janusflow.settings import fill

AXES = {
    "head": ["flow", "vq"],
    "num_inference_steps": [1, 3],
    "guidance_scale": [1.0, 2.0],
    "solver": ["euler", "midpoint"],
}
TIMES = ["seconds"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both heads, drawing pictures of one size."""
    folder = tmp_path_factory.mktemp("both")
    make_pipeline(("flow", "vq"), image_size=32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def values(model: Path) -> dict[str, Any]:
    return {
        "axes": {"model": [str(model)], **AXES},
        "prompts": {"num": 5},
        "reference": {"num_inference_steps": 3},
        "batch_size": 3,
    }


@pytest.fixture(scope="module")
def settings(values: dict[str, Any]) -> SweepSettings:
    return fill(SweepSettings, values)


def run(settings: SweepSettings, folder: Path) -> SweepResult:
    found = sweep(settings, folder)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep") / "whole"


@pytest.fixture(scope="module")
def found(settings: SweepSettings, whole: Path) -> SweepResult:
    return run(settings, whole)


def files_of(folder: Path, *names: str) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for name in names
        for file in sorted((folder / name).rglob("*"))
        if file.is_file()
    }


def same_but_for_times(one: Path, other: Path) -> None:
    """Tables, pictures and names of pieces; nothing half-written is left."""
    first, second = (pd.read_csv(folder / "tables" / "pictures.csv") for folder in (one, other))
    pd.testing.assert_frame_equal(
        first.drop(columns=TIMES), second.drop(columns=TIMES), check_exact=True
    )
    assert files_of(one, "images") == files_of(other, "images")
    assert files_of(one, "units").keys() == files_of(other, "units").keys()


def test_the_table_has_a_row_for_each_picture_and_cell(
    found: SweepResult, settings: SweepSettings, whole: Path
) -> None:
    table = found.table
    assert len(table) == len(cells(settings)) * 5 == 10 * 5
    assert table.groupby("cell", sort=False)["picture"].apply(list).tolist() == [[*range(5)]] * 10
    assert (table["picture_seed"] == table["seed"] + table["picture"]).all()
    assert (table["seconds"] > 0).all()
    flow, vq = (table[table["head"] == head] for head in ("flow", "vq"))
    evaluations = flow["num_inference_steps"] * flow["solver"].map({"euler": 1, "midpoint": 2})
    assert (flow["nfe"] == evaluations).all()
    assert (flow["num_forward_passes"] == flow["nfe"] * flow["guidance_scale"]).all()
    assert (vq["nfe"] == 16).all()
    assert vq[["num_inference_steps", "solver", "error", "psnr"]].isna().all(axis=None)
    assert table["shapes"].isin([0.0, 1.0]).all()
    assert set(table["kind"]) > {"single", "two"}
    for name in ("pictures", "settings"):
        csv = pd.read_csv(whole / "tables" / f"{name}.csv")
        parquet = pd.read_parquet(whole / "tables" / f"{name}.parquet")
        assert list(csv) == list(parquet)
        numbers = csv.select_dtypes("number")
        assert len(numbers.columns) > 6
        expected = parquet[numbers.columns].astype("float64")
        pd.testing.assert_frame_equal(numbers.astype("float64"), expected, check_exact=True)
    assert list(pd.read_csv(whole / "tables" / "pictures.csv")) == list(table)


def test_pictures_are_those_of_the_pipeline_under_the_hash_of_their_pixels(
    found: SweepResult, model: Path, whole: Path
) -> None:
    pipe = JanusFlowPipeline.from_pretrained(model)
    chosen = {
        "flow": {"num_inference_steps": 3, "solver": "midpoint", "guidance_scale": 2.0},
        "vq": {"guidance_scale": 1.0},
    }
    for head, options in chosen.items():
        rows = found.table[found.table["head"] == head]
        for name, value in options.items():
            rows = rows[rows[name] == value]
        assert len(rows) == 5
        row = rows.iloc[4]  # in the second chunk
        (drawn,) = pipe(row["prompt"], head=head, seed=4, **options).images
        with Image.open(whole / row["image"]) as kept:
            assert np.abs(np.asarray(kept, int) - np.asarray(drawn, int)).max() <= 1
            pixels = np.asarray(kept)
        digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
        assert row["image"] == f"images/{digest[:2]}/{digest}.png"
    assert len(files_of(whole, "images")) == found.table["image"].nunique()


def test_error_and_psnr_are_distances_to_the_fine_solution_of_the_same_noise(
    found: SweepResult, model: Path
) -> None:
    flow = found.table[found.table["head"] == "flow"]
    fine = (flow["num_inference_steps"] == 3) & (flow["solver"] == "midpoint")
    assert (flow[fine]["error"] == 0).all()
    assert (flow[fine]["psnr"] == 120).all()
    assert (flow[~fine]["error"] > 0).all()
    pipe = JanusFlowPipeline.from_pretrained(model)
    options = {"guidance_scale": 2.0, "seed": 3}
    row = flow[(flow["picture"] == 3) & (flow["guidance_scale"] == 2) & (flow["nfe"] == 1)].iloc[0]
    coarse = pipe(row["prompt"], num_inference_steps=1, **options)
    exact = pipe(row["prompt"], num_inference_steps=3, solver="midpoint", **options)
    gap = (coarse.latents - exact.latents).norm() / exact.latents.norm()
    assert row["error"] == pytest.approx(float(gap), rel=1e-4)
    pixels = [np.asarray(out.images[0], float) / 255 for out in (coarse, exact)]
    squared = np.square(pixels[0] - pixels[1]).mean()
    assert row["psnr"] == pytest.approx(-10 * np.log10(squared), abs=0.1)


def counting(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, stops: tuple[int, ...] = ()
) -> list[str]:
    """Counts calls of a method, and interrupts those of the given numbers."""
    calls: list[str] = []
    original = getattr(owner, name)

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) in stops:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, counted)
    return calls


def test_a_model_is_loaded_once_and_a_prompt_is_encoded_once_for_a_head(
    settings: SweepSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = counting(monkeypatch, module._Run, "_load")
    encoded = counting(monkeypatch, JanusFlowPipeline, "encode_prompts")
    run(settings, tmp_path)
    assert len(loads) == 1
    assert len(encoded) == 2 * 2  # chunks, heads


def test_a_run_that_is_stopped_goes_on_and_gives_the_same_table(
    settings: SweepSettings,
    found: SweepResult,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = counting(monkeypatch, module._Run, "_call", stops=(2, 9))
    pictures = counting(monkeypatch, module, "_keep", stops=(20,))  # after some of a piece
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run(settings, tmp_path)
        assert not (tmp_path / "report.html").exists()
    again = run(settings, tmp_path)
    same_but_for_times(tmp_path, whole)
    pieces = 2 * (10 + 2)  # chunks of cells and of references
    assert len(calls) == pieces + 3  # what was interrupted is drawn again, nothing else
    done = len(pictures)
    once_more = run(settings, tmp_path)
    assert (len(calls), len(pictures)) == (pieces + 3, done)
    pd.testing.assert_frame_equal(once_more.table, again.table, check_exact=True)
    assert once_more.seconds.model == 0


def test_what_a_killed_run_had_not_finished_writing_is_removed(
    settings: SweepSettings, found: SweepResult, whole: Path
) -> None:
    piece = next(file for file in (whole / "units").iterdir() if file.name.startswith("cell"))
    leftovers = [
        whole / "units" / f".{piece.stem}-abc.json",
        next((whole / "images").iterdir()) / ".abc.png",
        whole / "tables" / ".pictures-abc.csv",
    ]
    for file in leftovers:
        file.write_text("{")
    piece.unlink()
    again = run(settings, whole)
    assert not any(file.exists() for file in leftovers)
    assert piece.is_file()
    columns = found.table.columns.drop(TIMES)
    pd.testing.assert_frame_equal(again.table[columns], found.table[columns], check_exact=True)


HOLDER = """
import sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_run_is_refused_until_the_first_is_gone_even_if_it_was_killed(
    settings: SweepSettings, found: SweepResult, whole: Path
) -> None:
    command = [sys.executable, "-c", HOLDER, str(whole / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        try:
            assert other.stdout.readline() == "held\n"
            with pytest.raises(SettingsError, match="another sweep is at work in"):
                run(settings, whole)
        finally:
            other.send_signal(signal.SIGKILL)
    assert len(run(settings, whole).table) == len(found.table)


def test_results_of_other_settings_or_prompts_are_left_alone(
    settings: SweepSettings, found: SweepResult, whole: Path, model: Path, tmp_path: Path
) -> None:
    other = replace(settings, batch_size=2)
    with pytest.raises(SettingsError, match=r"holds results of other settings \(batch_size\)"):
        run(other, whole)
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n")
    axes = {"model": [str(model)], "num_inference_steps": [1]}
    own = {"axes": axes, "prompts": {"source": str(file)}, "metrics": []}
    first = run(fill(SweepSettings, own), tmp_path / "out")
    assert first.table["prompt"].tolist() == ["a cat"]
    assert first.table["kind"].isna().all()
    file.write_text("a dog\n")
    with pytest.raises(SettingsError, match=r"other settings \(prompts_hash\)"):
        run(fill(SweepSettings, own), tmp_path / "out")


def test_the_folder_says_what_made_it(
    values: dict[str, Any], found: SweepResult, whole: Path, model: Path
) -> None:
    held = json.loads((whole / "settings.json").read_text())
    assert len(held["weights"][str(model)]) == 64
    assert {"janusflow", "torch", "transformers", "diffusers"} == set(held["versions"])
    again = fill(SweepSettings, yaml.safe_load((whole / "config.yaml").read_text()))
    assert again == fill(SweepSettings, values)


def test_several_pictures_of_a_prompt_have_seeds_of_their_own(model: Path, tmp_path: Path) -> None:
    values = {
        "axes": {"model": [str(model)], "num_inference_steps": [1], "seed": [0, 50]},
        "prompts": {"num": 3},
        "images_per_prompt": 2,
        "batch_size": 4,
        "metrics": ["shapes"],
    }
    table = run(fill(SweepSettings, values), tmp_path).table
    assert len(table) == 2 * 3 * 2
    assert table["picture_seed"].tolist() == [*range(6), *range(50, 56)]
    assert table["prompt"].nunique() == 3
    assert (table["prompt"].iloc[::2].to_numpy() == table["prompt"].iloc[1::2].to_numpy()).all()
    assert table["image"].nunique() == 12
    pipe = JanusFlowPipeline.from_pretrained(model)
    drawn = pipe(table["prompt"][5], num_inference_steps=1, seed=5).images[0]
    with Image.open(tmp_path / table["image"][5]) as kept:
        assert np.abs(np.asarray(kept, int) - np.asarray(drawn, int)).max() <= 1


METRICS = """
def redness(images, prompts):
    assert images.shape[1] == 3 and 0 <= images.min() and images.max() <= 1
    return images[:, 0].mean((1, 2))

def long_prompts(images, prompts):
    return [len(prompt) for prompt in prompts]
long_prompts.lower_is_better = True

def short(images, prompts):
    return [1.0]

def wordy(images, prompts):
    return ["good" for _ in prompts]

def shapes(images, prompts):
    return [1.0 for _ in prompts]
"""


@pytest.fixture
def own_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SweepResult]:
    (tmp_path / "my_metrics.py").write_text(METRICS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_metrics", raising=False)

    def call(model: Path, *names: str, **changes: Any) -> SweepResult:
        axes = {"model": [str(model)], "num_inference_steps": [1, 2]}
        values = {"axes": axes, "prompts": {"num": 2}, "metrics": list(names), **changes}
        return run(fill(SweepSettings, values), tmp_path / "out")

    return call


def test_a_metric_of_ones_own_gets_pictures_and_prompts(
    own_metrics: Callable, model: Path, tmp_path: Path
) -> None:
    table = own_metrics(model, "my_metrics:redness", "my_metrics:long_prompts").table
    assert table["long_prompts"].tolist() == table["prompt"].str.len().tolist()
    for row in table.itertuples():
        with Image.open(tmp_path / "out" / row.image) as picture:
            assert row.redness == pytest.approx(np.asarray(picture)[..., 0].mean() / 255, abs=1e-5)
    (tmp_path / "my_metrics.py").write_text(METRICS + "\n")
    with pytest.raises(SettingsError, match=r"other settings \(metric_sources\)"):
        own_metrics(model, "my_metrics:redness", "my_metrics:long_prompts")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("my_metrics:short",), r"gave \[1.0\] for 2 pictures; expected a number for each"),
        (("my_metrics:wordy",), "expected a number for each"),
        (("my_metrics:none",), "cannot be had: .*none"),
        (("no_metrics:none",), "cannot be had: .*no_metrics"),
        (
            ("shape",),
            "'shape'; expected shapes, error, psnr, clip_score, mmd, frechet or 'my_module:f",
        ),
        (("shapes", "my_metrics:shapes"), "different names, got shapes, shapes"),
    ],
)
def test_a_metric_that_does_not_work_is_refused(
    names: tuple[str, ...], message: str, own_metrics: Callable, model: Path
) -> None:
    with pytest.raises(SettingsError, match=message):
        own_metrics(model, *names)


def test_shapes_are_not_judged_where_prompts_are_of_another_world(
    own_metrics: Callable, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    with pytest.raises(SettingsError, match="'shapes' judges prompts of the shapes world only"):
        own_metrics(model, "shapes", prompts={"source": str(tmp_path / "prompts.txt")})


def test_a_library_that_is_missing_is_named_before_anything_is_drawn(
    settings: SweepSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "pyarrow" else name)
    with pytest.raises(SettingsError, match=r"needs pyarrow: pip install 'janusflow\[eval\]'"):
        run(settings, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_head_that_a_model_lacks_is_refused(tmp_path: Path) -> None:
    make_pipeline().save_pretrained(tmp_path / "flow")
    axes = {"model": [str(tmp_path / "flow")], "head": ["vq"]}
    with pytest.raises(SettingsError, match="no generation head 'vq'"):
        run(fill(SweepSettings, {"axes": axes}), tmp_path / "out")


def test_the_command_sweeps_and_says_where_time_went(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(
        f"axes: {{model: [{model}], num_inference_steps: [1, 2]}}\nprompts: {{num: 9}}\n"
    )
    command = ["sweep", "config.yaml", "-o", "out", "--prompts.num", "2"]
    assert main([*command, "--metrics", "[shapes]"]) == 0
    out = capsys.readouterr().out
    assert "4 rows, 2 cells" in out
    assert "in the model" in out
    assert out.endswith("out/report.html\n")
    assert main([*command, "--axes.solvr", "[euler]"]) == 2
    assert "did you mean 'axes.solver'" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["sweep", "config.yaml", "-o", "file"]) == 2
    assert "is a file" in capsys.readouterr().err


def command_of(config: Path, folder: Path) -> list[str]:
    return [sys.executable, "-m", "janusflow.cli", "sweep", str(config), "-o", str(folder)]


@pytest.mark.slow
def test_a_command_killed_five_times_gives_the_same_results(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    values = {
        "axes": {"num_inference_steps": [1, 2, 4], "solver": ["euler", "midpoint"]},
        "prompts": {"num": 12},
        "reference": {"num_inference_steps": 8},
        "batch_size": 4,
    }
    config.write_text(yaml.safe_dump(values))
    folder = tmp_path / "killed"
    moments = random.Random(0)
    pieces = 3 * (6 + 1)
    for kill in range(5):
        process = subprocess.Popen(command_of(config, folder))
        wanted = (kill + 1) * pieces // 6
        while not (folder / "units").is_dir() or len([*(folder / "units").glob("[cr]*")]) < wanted:
            assert process.poll() is None
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.3))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (folder / "report.html").exists()
    for name in ("killed", "whole"):
        subprocess.run(command_of(config, tmp_path / name), check=True)
    same_but_for_times(folder, tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_share_the_work(
    values: dict[str, Any], found: SweepResult, whole: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    # `accelerate launch` would start a single process here: on CPUs it starts several by MPI only.
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    shared = [*launch, *command_of(config, tmp_path / "out")[1:]]
    done = subprocess.run(shared, capture_output=True, text=True, check=True)
    assert done.stdout.count("50 rows, 10 cells") == 1
    table = pd.read_csv(tmp_path / "out" / "tables" / "pictures.csv")
    columns = ["cell", "picture", "prompt", "nfe", "num_forward_passes"]
    pd.testing.assert_frame_equal(table[columns], found.table[columns], check_dtype=False)
    np.testing.assert_allclose(table["psnr"], found.table["psnr"], atol=1)
    refused = subprocess.run(
        [*shared, "--batch_size", "2"], capture_output=True, text=True, timeout=100
    )
    assert refused.returncode != 0
    assert "holds results of other settings (batch_size)" in refused.stderr
