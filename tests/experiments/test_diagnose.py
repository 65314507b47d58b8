"""A diagnosis of random weights: every number beside what was computed here, from the paths."""

from __future__ import annotations

import importlib.util
import json
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tiny import make_pipeline

from janusflow import JanusFlowPipeline, SettingsError
from janusflow.experiments import diagnose as module
from janusflow.experiments import diagnose_report as report
from janusflow.experiments.diagnose import DiagnoseSettings, Diagnosis, diagnose
from janusflow.experiments.diagnose_plots import figures
from janusflow.experiments.diagnose_report import check_free, write_report
from janusflow.experiments.prompts import PromptSettings
from janusflow.models.conversion import weights_hash

PROMPTS = ["a red circle", "two blue squares on gray", "a ring"]
STEPS, SCALE, SEED = 4, 2.0, 7
FIGURES = {
    "velocity-norms", "guidance", "resolution", "speed", "previews", "errors", "bfloat16",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def settings(model: Path, tmp_path_factory: pytest.TempPathFactory) -> DiagnoseSettings:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(PROMPTS), encoding="utf-8")
    return DiagnoseSettings(
        model=str(model),
        prompts=PromptSettings(str(file), num=3, seed=SEED),
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        error_solvers=["euler", "heun"],
        error_evaluations=[2, 4],
        reference_steps=6,
    )


@pytest.fixture(scope="module")
def found(settings: DiagnoseSettings) -> Diagnosis:
    return diagnose(settings)


@pytest.fixture(scope="module")
def pipe(model: Path) -> JanusFlowPipeline:
    pipe = JanusFlowPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(found: Diagnosis, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "deep" / "diagnosis"
    assert write_report(found, folder) == folder / "report.html"
    return folder


def draw(pipe: JanusFlowPipeline, **options: object) -> SimpleNamespace:
    """The pipeline's own run of the same prompts and noise; states in float64."""
    options = {"num_inference_steps": STEPS, "guidance_scale": SCALE, **options}
    out = pipe(PROMPTS, seed=SEED, return_trajectory=True, output_type="pt", **options)
    return SimpleNamespace(x=out.trajectory.double(), images=out.images, out=out)


@torch.no_grad()
def velocity(pipe: JanusFlowPipeline, x: torch.Tensor, t: float, prompts: list[str]):
    """Of one pass with nothing shared, float64."""
    prefix = pipe.encode_prompts(prompts, guided=False).prefix
    return pipe.model.velocity(x.float(), torch.tensor(t, dtype=torch.float64), prefix).double()


def norm(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).norm(dim=1)


def column(frame: pd.DataFrame, name: str) -> torch.Tensor:
    """(T, B)."""
    return torch.tensor(frame.pivot(index="t", columns="sample", values=name).to_numpy())


def close(actual: object, expected: object, tolerance: float = 1e-4) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=tolerance, atol=1e-6)


def test_the_steps_say_what_the_pipelines_own_path_says(
    found: Diagnosis, pipe: JanusFlowPipeline
) -> None:
    x = draw(pipe).x
    table = found.steps
    assert table["sample"].tolist() == [0] * STEPS + [1] * STEPS + [2] * STEPS
    close(table["t"], [0, 0.25, 0.5, 0.75] * 3)
    # With Euler's steps the velocity followed is the difference of the states.
    v = x.diff(dim=0) * STEPS
    close(column(table, "velocity_norm"), [norm(one) for one in v])
    ahead = x[:-1] + v * torch.linspace(1, 0, STEPS + 1)[:-1].reshape(-1, 1, 1, 1, 1)
    # The last preview is the end itself, but for rounding.
    close(column(table, "preview_error")[:-1], [norm(one) for one in (ahead - x[-1])[:-1]])
    jumps = torch.stack([norm(one) for one in v.diff(dim=0)])
    close(column(table, "velocity_change")[:-1], jumps * STEPS, 1e-3)
    close(column(table, "local_error")[:-1], jumps / STEPS / 2, 1e-3)
    assert column(table, "local_error")[-1].isnan().all()
    chord = x[-1] - x[0]
    bend = sum(norm(chord - one) ** 2 for one in v) / STEPS
    close(found.pictures["chord"], norm(chord))
    close(found.pictures["straightness"], bend / norm(chord) ** 2, 1e-3)
    length = sum(norm(one) for one in x.diff(dim=0))
    close(found.pictures["path_length_ratio"], length / norm(chord))
    close(found.summary["straightness_of_all"], bend.sum() / (norm(chord) ** 2).sum(), 1e-3)
    assert found.pictures["prompt"].tolist() == PROMPTS
    assert found.pictures["seed"].tolist() == found.summary["seeds"] == [SEED, SEED + 1, SEED + 2]
    assert (found.summary["nfe"], found.summary["num_forward_passes"]) == (STEPS, 2 * STEPS)


def test_guidance_is_told_from_velocities_with_and_without_the_prompt(
    found: Diagnosis, pipe: JanusFlowPipeline
) -> None:
    prompts = pipe.encode_prompts(PROMPTS)
    x = draw(pipe).x
    for step in (0, 2):
        t = torch.tensor(step / STEPS, dtype=torch.float64)
        with torch.no_grad():
            c, u = (
                pipe.model.velocity(x[step].float(), t, part).double()
                for part in (prompts.prefix, prompts.free)
            )
        close(c, velocity(pipe, x[step], step / STEPS, PROMPTS), 1e-3)
        cosine = (c * u).flatten(1).sum(1) / norm(c) / norm(u)
        table = found.steps
        close(column(table, "conditional_norm")[step], norm(c))
        close(column(table, "unconditional_norm")[step], norm(u))
        close(column(table, "guidance_gap")[step], norm(c - u) / norm(c), 1e-3)
        close(column(table, "guidance_cosine")[step], cosine)
    more = draw(pipe, guidance_scale=SCALE + 0.1).x[-1]
    close(found.pictures["guidance_sensitivity"], norm(more - x[-1]) / 0.1, 1e-2)


def test_shown_are_the_velocity_by_cell_and_previews_that_end_in_the_picture(
    found: Diagnosis, pipe: JanusFlowPipeline
) -> None:
    run = draw(pipe)
    v = run.x.diff(dim=0) * STEPS
    assert found.shown_times == [0, 0.25, 0.5, 0.75]
    close(found.speed, v[:, 0].norm(dim=1), 1e-3)
    assert found.previews.shape == (3, STEPS + 1, 64, 64, 3)
    drawn = np.round(255 * run.images.permute(0, 2, 3, 1).numpy())
    for place in (STEPS - 1, STEPS):  # Euler's last preview is where it ends
        assert np.abs(found.previews[:, place] - drawn).max() <= 1
    assert np.abs(found.previews[:, 0] - drawn).max() > 1


def test_errors_are_distances_to_the_fine_solution(
    found: Diagnosis, pipe: JanusFlowPipeline
) -> None:
    fine = draw(pipe, solver="midpoint", num_inference_steps=6)
    table = found.errors.set_index(["solver", "nfe", "sample"])
    assert sorted(set(table.index)) == [
        (solver, nfe, sample)
        for solver in ("euler", "heun")
        for nfe in (2, 4)
        for sample in range(3)
    ]
    for solver, steps, nfe in (("euler", 4, 4), ("heun", 1, 2), ("heun", 2, 4)):
        run = draw(pipe, solver=solver, num_inference_steps=steps)
        rows = table.loc[solver, nfe]
        assert (rows["num_inference_steps"] == steps).all()
        close(rows["error"], norm(run.x[-1] - fine.x[-1]) / norm(fine.x[-1]), 1e-3)
        squared = (run.images - fine.images).square().flatten(1).mean(1)
        close(rows["psnr"], -10 * squared.log10(), 1e-3)
    for solver, order in found.summary["orders"].items():
        few, many = (table.loc[solver, nfe]["error"].median() for nfe in (2, 4))
        close(order, math.log2(few / many), 1e-9)


def test_precision_is_the_gap_to_the_same_run_in_float32(
    found: Diagnosis, model: Path, pipe: JanusFlowPipeline
) -> None:
    coarse = JanusFlowPipeline.from_pretrained(model, torch_dtype=torch.bfloat16)
    coarse.set_progress_bar_config(disable=True)
    x, r = draw(coarse).x, draw(pipe).x
    expected = torch.stack([norm(a - b) / norm(b) for a, b in zip(x, r, strict=True)])
    assert found.precision is not None
    gap = column(found.precision, "gap")
    assert (gap[0] == 0).all()
    assert (gap[1:] > 1e-5).all()
    close(gap, expected, 1e-2)
    close(found.summary["bfloat16_gap_at_the_end"]["median"], expected[-1].median(), 0.5)


def test_a_run_in_bfloat16_is_compared_with_references_in_float32(
    settings: DiagnoseSettings,
    found: Diagnosis,
    pipe: JanusFlowPipeline,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded, models = [], []
    original = JanusFlowPipeline.from_pretrained

    def load(*arguments: object, **options: object) -> JanusFlowPipeline:
        assert all(model() is None for model in models)  # one at a time
        loaded.append(options["torch_dtype"])
        pipe = original(*arguments, **options)
        models.append(weakref.ref(pipe.model))
        return pipe

    monkeypatch.setattr(JanusFlowPipeline, "from_pretrained", load)
    coarse = diagnose(replace(settings, dtype="bfloat16"))
    monkeypatch.undo()
    assert loaded == [torch.bfloat16, torch.float32]
    pd.testing.assert_frame_equal(coarse.precision, found.precision)
    own = JanusFlowPipeline.from_pretrained(settings.model, torch_dtype=torch.bfloat16)
    own.set_progress_bar_config(disable=True)
    end = draw(own).x[-1]
    fine = draw(pipe, solver="midpoint", num_inference_steps=6).x[-1]
    rows = coarse.errors.query("solver == 'euler' and nfe == 4")
    close(rows["error"], norm(end - fine) / norm(fine))


def test_without_guidance_and_bfloat16_their_figures_are_left_out(
    settings: DiagnoseSettings,
) -> None:
    found = diagnose(replace(settings, guidance_scale=1.0, bfloat16=False, num_inference_steps=1))
    assert found.precision is None
    assert (
        found.steps[["unconditional_norm", "guidance_gap", "guidance_cosine"]].isna().all(axis=None)
    )
    assert found.summary["num_forward_passes"] == found.summary["nfe"] == 1
    assert (found.pictures["guidance_sensitivity"] > 0).all()
    names = [figure.name for figure in figures(found)]
    assert names == ["velocity-norms", "resolution", "speed", "previews", "errors"]


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.ends: list[str] = []
        self.links: list[str | None] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attrs))
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        self.ends.append(tag)


def test_everything_is_in_the_folder_and_whole(folder: Path, found: Diagnosis, model: Path) -> None:
    assert {file.name for file in folder.iterdir()} == {
        "steps.csv", "pictures.csv", "errors.csv", "precision.csv", "summary.json", "figures",
        "report.html",
    }  # fmt: skip
    assert list(folder.parent.iterdir()) == [folder]
    for name in ("steps", "pictures", "errors", "precision"):
        read = pd.read_csv(folder / f"{name}.csv")
        pd.testing.assert_frame_equal(read, getattr(found, name), check_dtype=False)
    text = (folder / "summary.json").read_text(encoding="utf-8")
    summary = json.loads(text, parse_constant=pytest.fail)
    assert summary == found.summary
    assert summary["weights"] == weights_hash(model)
    assert summary["settings"]["reference_steps"] == 6
    assert summary["versions"]["torch"] == torch.__version__.split("+")[0]
    files = {file.name for file in (folder / "figures").iterdir()}
    assert files == {f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")}
    for name in FIGURES:
        with Image.open(folder / "figures" / f"{name}.png") as picture:
            picture.load()
        svg = (folder / "figures" / f"{name}.svg").read_text(encoding="utf-8")
        assert svg.rstrip().endswith("</svg>")


def test_the_page_needs_no_other_file_and_says_in_words_what_figures_show(
    folder: Path, found: Diagnosis
) -> None:
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert page.ends[-1] == "html"
    assert page.links
    assert all((link or "").startswith("data:") for link in page.links)
    words = [str(image["alt"]) for image in page.images]
    assert len(words) == len(FIGURES)
    assert all(len(text) > 80 for text in words)
    medians = found.steps.groupby("t")["guidance_cosine"].median()
    assert f"first {medians[0.0]:.4g} at t = 0" in words[1]
    order = found.summary["orders"]["heun"]
    assert any(f"heun: order {order:.2f}" in text for text in words)
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert f"{found.pictures['straightness'][1]:.4g}" in text
    assert found.summary["weights"] in text


def test_a_folder_with_something_in_it_is_left_alone(found: Diagnosis, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(SettingsError, match="holds something already"):
        write_report(found, tmp_path)
    with pytest.raises(SettingsError, match="holds something already"):
        check_free(tmp_path / "notes.txt")
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_report_that_fails_leaves_no_folder(
    found: Diagnosis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(report, "figures", lambda _: [])
    monkeypatch.setattr(report, "write_page", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(found, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number"),
        ({"reference_steps": 2.5}, "reference_steps must be a whole number"),
        ({"prompts": PromptSettings(num=0)}, "prompts.num must be a whole number"),
        ({"error_evaluations": [8, 0]}, "error_evaluations must be a whole number"),
        ({"guidance_delta": 0}, "guidance_delta is 0"),
        ({"guidance_scale": math.inf}, "guidance_scale must be a finite number"),
        ({"guidance_delta": math.nan}, "must be a finite number"),
        ({"dtype": "float16"}, "expected float32 or bfloat16"),
        ({"solver": "dopri5"}, "'dopri5', which adapts"),
        ({"solver": "sde"}, "'sde', which draws noise"),
        ({"solver": "eular"}, "unknown solver 'eular'"),
        ({"error_solvers": []}, "error_solvers is empty"),
        ({"error_solvers": ["explicit_adams"]}, "not the same in each step"),
        ({"reference_solver": "bosh3"}, "reference_solver names 'bosh3'"),
        ({"error_evaluations": [8]}, "leave 'euler' 1 number of steps"),
        ({"error_solvers": ["rk4"], "error_evaluations": [3, 4]}, "leave 'rk4' 1 number"),
        ({"reference_steps": 32}, "the reference makes 64 evaluations, no more than the 64"),
    ],
)
def test_settings_that_cannot_be_had_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        DiagnoseSettings(**values)  # type: ignore[arg-type]


def test_a_model_without_flow_head_or_autoencoder_is_refused(
    settings: DiagnoseSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pipeline(("vq",)).save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match="flow"):
        diagnose(replace(settings, model=str(tmp_path)))
    pipe = make_pipeline()
    pipe.vae = None
    monkeypatch.setattr(JanusFlowPipeline, "from_pretrained", lambda *_, **__: pipe)
    with pytest.raises(SettingsError, match="no autoencoder"):
        diagnose(settings)


def test_missing_libraries_are_named_before_anything_is_loaded(
    settings: DiagnoseSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "jinja2" else name)
    with pytest.raises(SettingsError, match=r"needs jinja2: pip install 'janusflow\[eval\]'"):
        diagnose(settings)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    file = Path(__file__).parents[2] / "sampling" / "diagnose.py"
    spec = importlib.util.spec_from_file_location("diagnose_script", file)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)

    def run(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", [str(file), *map(str, arguments)])
        return loaded.main()

    return run


def test_the_script_hands_its_arguments_on(
    script: Callable[..., int],
    found: Diagnosis,
    settings: DiagnoseSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = []
    monkeypatch.setattr(module, "diagnose", lambda given, progress: asked.append(given) or found)
    monkeypatch.setattr(report, "figures", lambda _: [])
    out = tmp_path / "out"
    status = script(
        "--model", settings.model, "-o", out, "--prompts", settings.prompts.source, "--num", 3,
        "--steps", STEPS, "--guidance", SCALE, "--seed", SEED, "--error-solvers", "euler", "heun",
        "--error-evaluations", 2, 4, "--reference-steps", 6, "--solver", "heun",
        "--dtype", "bfloat16", "--no-bfloat16",
    )  # fmt: skip
    assert status == 0
    assert asked == [replace(settings, solver="heun", dtype="bfloat16", bfloat16=False)]
    assert capsys.readouterr().out.strip() == str(out / "report.html")
    assert (out / "report.html").is_file()


def test_a_mistake_is_one_line_and_comes_before_the_work(
    script: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, "diagnose", lambda *_, **__: pytest.fail("it began to work"))
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    assert script("-o", tmp_path) == 2
    assert script("-o", tmp_path / "out", "--solver", "eular") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "holds something already" in lines[0]
    assert "unknown solver 'eular'" in lines[1]
