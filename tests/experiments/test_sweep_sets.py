"""Distances of a sweep's pictures from true ones, and scores by networks that the user names."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tiny import make_pipeline
from tiny_clip import write_clip

from janusflow import CheckpointError, JanusFlowPipeline, SettingsError
from janusflow.data.shapes.language import held_out_requests
from janusflow.evaluation.features import clip_scorer, feature_extractor, tower_extractor
from janusflow.evaluation.metrics import frechet_distance, mmd
from janusflow.evaluation.shapes_scorer import fulfils
from janusflow.experiments import sweep_report
from janusflow.experiments import sweep_sets as module
from janusflow.experiments.pictures import as_tensor
from janusflow.experiments.sweep import SweepResult, sweep
from janusflow.experiments.sweep_sets import TruePictures
from janusflow.experiments.sweep_settings import SweepSettings
from janusflow.experiments.units import Units
from janusflow.settings import fill

METRICS = ["shapes", "clip_score", "mmd", "frechet"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both heads, drawing pictures of one size."""
    folder = tmp_path_factory.mktemp("both")
    make_pipeline(("flow", "vq"), image_size=32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def values(model: Path, clip: Path) -> dict[str, Any]:
    return {
        "axes": {
            "model": [str(model)],
            "head": ["flow", "vq"],
            "num_inference_steps": [1, 3],
            "temperature": [0.5, 1.0],
            "seed": [0, 50],
        },
        "prompts": {"num": 3},
        "images_per_prompt": 2,
        "batch_size": 4,
        "metrics": METRICS,
        "metrics_from": {"clip": str(clip), "features": f"clip:{clip}"},
    }


@pytest.fixture(scope="module")
def settings(values: dict[str, Any]) -> SweepSettings:
    return fill(SweepSettings, values)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep") / "whole"


def run(settings: SweepSettings, folder: Path) -> SweepResult:
    found = sweep(settings, folder)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def found(settings: SweepSettings, whole: Path) -> SweepResult:
    return run(settings, whole)


def pictures_of(table: pd.DataFrame, folder: Path) -> torch.Tensor:
    pictures = []
    for name in table["image"]:
        with Image.open(folder / name) as picture:
            pictures.append(picture.copy())
    return as_tensor(pictures)


def test_the_table_of_cells_has_a_row_for_each_with_means_and_standard_errors(
    found: SweepResult, whole: Path
) -> None:
    cells, table = found.cells, found.table
    assert cells["cell"].tolist() == list(dict.fromkeys(table["cell"]))
    assert len(cells) == 2 * 2 * 2
    assert (cells["pictures"] == 6).all()
    assert cells["seed"].tolist() == [0, 50] * 4
    assert cells["nfe"].tolist() == [1, 1, 3, 3, 16, 16, 16, 16]
    for row in cells.itertuples():
        own = table[table["cell"] == row.cell]
        assert row.clip_score == pytest.approx(own["clip_score"].mean())
        spread = own["clip_score"].std(ddof=1) / 6**0.5
        assert row.clip_score_error_of_mean == pytest.approx(spread)
    for name in ("cells", "settings"):
        csv = pd.read_csv(whole / "tables" / f"{name}.csv")
        parquet = pd.read_parquet(whole / "tables" / f"{name}.parquet")
        assert list(csv) == list(parquet)
        for column in ("mmd_flow", "mmd_vq_biased", "frechet"):
            np.testing.assert_array_equal(csv[column], parquet[column])
    assert list(pd.read_csv(whole / "tables" / "cells.csv")) == list(cells)


def test_a_clip_score_is_of_a_picture_and_its_prompt(
    found: SweepResult, clip: Path, whole: Path
) -> None:
    row = found.table[found.table["clip_score"] > 0].iloc[-1:]
    score = clip_scorer(str(clip)).score(pictures_of(row, whole), row["prompt"].tolist())
    np.testing.assert_allclose(score, row["clip_score"], atol=1e-4)


def test_distances_are_those_of_the_features_of_drawn_and_true_pictures(
    found: SweepResult, model: Path, clip: Path, whole: Path
) -> None:
    requests = [r for r in held_out_requests(3) for _ in range(2)]
    (true,) = TruePictures(requests).batches(32)
    pipe = JanusFlowPipeline.from_pretrained(model)
    tower, clip_features = tower_extractor(pipe), feature_extractor(f"clip:{clip}")
    for frame, keys in ((found.cells, ["cell"]), (found.summary, ["head", "temperature", "nfe"])):
        assert (frame["frechet_biased"] == "yes").all()
        for _, row in frame.iterrows():
            same = [
                (found.table[k] == row[k]) | (found.table[k].isna() & pd.isna(row[k])) for k in keys
            ]
            own = found.table[np.logical_and.reduce(same)]
            assert len(own) == row["pictures"]
            drawn = pictures_of(own, whole)
            unbiased, biased = mmd(tower.extract(drawn), tower.extract(true))
            head, other = (row["head"], "vq" if row["head"] == "flow" else "flow")
            assert row[f"mmd_{head}"] == pytest.approx(unbiased, rel=1e-3, abs=1e-4)
            assert row[f"mmd_{head}_biased"] == pytest.approx(biased, rel=1e-3, abs=1e-4)
            assert pd.isna(row[f"mmd_{other}"])
            features = [clip_features.extract(pictures) for pictures in (drawn, true)]
            assert row["frechet"] == pytest.approx(frechet_distance(*features), rel=1e-3, abs=1e-5)
    assert found.summary["pictures"].tolist() == [12] * 4


def test_the_report_never_sets_heads_side_by_side_by_the_model_s_own_features(
    found: SweepResult, whole: Path
) -> None:
    names = {file.stem for file in (whole / "figures").glob("*.svg")}
    assert "mmd_flow-against-nfe" in names
    assert not [name for name in names if name.startswith("mmd-")]
    text = (whole / "report.html").read_text("utf-8")
    assert text.count("trained to resemble the features of that very tower") == 1
    assert "the unbiased estimate" in text
    assert "fewer than ten pictures a feature" in text
    for head, steps in (("flow", {"1", "3"}), ("vq", {"16"})):
        caption = f"No way of drawing is better by mmd_{head} with as few evaluations</caption>"
        front = text.split(caption)[1].split("</table>")[0]
        rows = [row.split("</th>")[0] for row in front.split('<th scope="row">')[1:]]
        assert set(rows) <= steps
        assert rows
        assert f"mmd {head} biased" in front
    figure = text.split('alt="mmd_flow (lower is better) against evaluations (NFE)')[1]
    assert figure.startswith(" of 2 ways of drawing")


def same_tables(one: Path, other: Path) -> None:
    for name in ("pictures", "cells", "settings"):
        first, second = (pd.read_csv(f / "tables" / f"{name}.csv") for f in (one, other))
        columns = [column for column in first if column != "seconds"]
        assert list(second) == list(first)
        pd.testing.assert_frame_equal(first[columns], second[columns], check_exact=True)


def test_a_run_stopped_while_features_are_made_or_compared_gives_the_same_tables(
    settings: SweepSettings,
    found: SweepResult,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sweep_report, "write_report", lambda folder, *_: folder)
    calls: list[str] = []
    stops = {("_keep_true", 1), ("_extract", 3), ("values", 7), ("_compare", 2)}
    for owner, name in (
        (module.Features, "_keep_true"),
        (module.Features, "_extract"),
        (module.Features, "_compare"),
        (TruePictures, "batches"),
        (Units, "values"),
    ):
        original = getattr(owner, name)

        def stopped(*rest: Any, original: Any = original, name: str = name) -> Any:
            calls.append(name)
            if (name, calls.count(name)) in stops:
                raise KeyboardInterrupt
            return original(*rest)

        monkeypatch.setattr(owner, name, stopped)
    for _ in stops:
        with pytest.raises(KeyboardInterrupt):
            run(settings, tmp_path)
    run(settings, tmp_path)
    same_tables(tmp_path, whole)
    assert {f.name for f in (tmp_path / "units").iterdir()} == {
        f.name for f in (whole / "units").iterdir()
    }
    assert calls.count("batches") == 2, "once for each extractor"
    pieces = 8 * 2
    assert calls.count("_extract") == pieces + 1
    assert calls.count("_compare") == 8 + 4 + 1
    run(settings, tmp_path)
    assert calls.count("_extract") == pieces + 1, "nothing is computed twice"
    assert calls.count("_compare") == 8 + 4 + 1


def test_true_pictures_of_the_shapes_world_fulfil_the_prompts() -> None:
    requests = held_out_requests(40)
    batches = [*TruePictures(requests).batches(64)]
    assert [len(batch) for batch in batches] == [32, 8]
    for picture, request in zip(torch.cat(batches), requests, strict=True):
        pixels = (255 * picture).round().byte().permute(1, 2, 0).numpy()
        assert fulfils(Image.fromarray(pixels), request)


def small(values: dict[str, Any], **changes: Any) -> SweepSettings:
    axes = {**values["axes"], "head": ["flow"], "num_inference_steps": [1], "seed": [0]}
    return fill(SweepSettings, {**values, "axes": axes, **changes})


def test_a_folder_of_pictures_may_be_what_is_true_and_is_not_to_change(
    values: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    (tmp_path / "true").mkdir()
    rng = np.random.default_rng(0)
    for index in range(34):
        pixels = rng.integers(0, 255, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "true" / f"{index:02d}.png")
    changed = small(
        values,
        prompts={"source": str(tmp_path / "prompts.txt")},
        metrics=["frechet"],
        metrics_from={"features": "pixels", "pictures": str(tmp_path / "true")},
    )
    found = run(changed, tmp_path / "out")
    files = sorted((tmp_path / "true").iterdir())
    true = torch.cat([*TruePictures(files=files).batches(32)])
    assert true.shape == (34, 3, 32, 32)
    pixels = feature_extractor("pixels")
    drawn = pixels.extract(pictures_of(found.table, tmp_path / "out"))
    expected = frechet_distance(drawn, pixels.extract(true))
    assert found.cells["frechet"][0] == pytest.approx(expected, rel=1e-4)
    held = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert held["metric_sources"] == {"frechet": "pixels-4x4"}
    files[0].write_bytes(files[1].read_bytes())
    with pytest.raises(SettingsError, match=r"other settings \(true_pictures\)"):
        run(changed, tmp_path / "out")


def test_enough_pictures_make_a_distance_that_is_not_marked_as_biased(
    settings: SweepSettings,
) -> None:
    (metric,) = module.find_set_metrics(
        replace(
            settings,
            metrics=["frechet"],
            metrics_from=replace(settings.metrics_from, features="pixels"),
        ),
        480,
    )
    rng = np.random.default_rng(0)
    many, few = rng.random((480, 48)), rng.random((479, 48))
    assert metric.values("flow", many, many)["frechet_biased"] == "no"
    assert metric.values("flow", few, many)["frechet_biased"] == "yes"
    assert metric.values("flow", many, few)["frechet_biased"] == "yes"


def test_other_weights_of_clip_or_of_the_autoencoder_are_refused(
    values: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    clip = write_clip(tmp_path / "clip")
    vae = shutil.copytree(model / "vae", tmp_path / "vae")
    changed = small(
        values,
        vae=str(vae),
        metrics=["clip_score", "frechet"],
        metrics_from={"clip": str(clip), "features": f"clip:{clip}"},
    )
    run(changed, tmp_path / "out")
    held = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert held["metrics_from"]["features"] == f"clip:{clip}"
    assert set(held["metric_sources"]) == {"clip_score", "frechet"}
    assert len(held["autoencoders"][str(model)]) == 64
    kept = (clip / "model.safetensors").read_bytes()
    write_clip(clip, seed=1)
    with pytest.raises(SettingsError, match=r"other settings \(metric_sources\)"):
        run(changed, tmp_path / "out")
    (clip / "model.safetensors").write_bytes(kept)
    from diffusers import AutoencoderKL

    other = AutoencoderKL.from_pretrained(vae)
    other.decoder.conv_out.bias.data += 0.1
    other.save_pretrained(vae)
    with pytest.raises(SettingsError, match=r"other settings \(autoencoders\)"):
        run(changed, tmp_path / "out")


def test_a_model_s_own_autoencoder_is_not_to_change_either(
    values: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(model, tmp_path / "model")
    axes = {"model": [str(own)], "num_inference_steps": [1]}
    changed = fill(SweepSettings, {"axes": axes, "prompts": {"num": 1}, "metrics": ["shapes"]})
    run(changed, tmp_path / "out")
    from diffusers import AutoencoderKL

    other = AutoencoderKL.from_pretrained(own / "vae")
    other.decoder.conv_out.bias.data += 0.1
    other.save_pretrained(own / "vae")
    with pytest.raises(SettingsError, match=r"other settings \(autoencoders\)"):
        run(changed, tmp_path / "out")
    shutil.rmtree(own / "vae")
    missing = replace(changed, vae=str(own / "vae"))
    with pytest.raises(CheckpointError, match="vae"):
        run(missing, tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics_from": {}, "metrics": ["clip_score"]}, "give its folder as metrics_from.clip"),
        ({"metrics_from": {}, "metrics": ["frechet"]}, "give metrics_from.features"),
        ({"metrics_from": {"features": "vgg"}, "metrics": ["frechet"]}, "expected 'pixels'"),
        ({"metrics_from": {"pictures": "nowhere"}}, "metrics_from.features"),
        (
            {"metrics_from": {"pictures": "nowhere"}, "metrics": ["mmd"]},
            "metrics_from.pictures is 'nowhere'",
        ),
        ({"metrics_from": {"clip": "nowhere"}, "metrics": ["clip_score"]}, "there is no nowhere"),
        ({"metrics_from": {"clipp": "x"}}, "did you mean 'metrics_from.clip'"),
        ({"metrics": ["mmd", "mmd"]}, "different names, got mmd, mmd"),
        (
            {"metrics": ["mmd"], "prompts": {"num": 1}, "images_per_prompt": 1},
            "mmd compare sets of pictures, and a cell has one",
        ),
        (
            {"metrics": ["mmd"], "axes": {"model": ["a", "b"], "guidance_scale": [2.0]}},
            "compares no two models, got a, b",
        ),
        ({"metrics": ["mmd"], "prompts": {"source": "PROMPTS"}}, "prompts of a file have none"),
    ],
)
def test_a_metric_that_lacks_what_it_needs_is_refused_before_anything_is_drawn(
    changes: dict[str, Any], message: str, values: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    if changes.get("prompts") == {"source": "PROMPTS"}:
        changes = {**changes, "prompts": {"source": str(tmp_path / "prompts.txt")}}
    given = {**values, "metrics": ["frechet"], "metrics_from": {}, **changes}
    with pytest.raises(SettingsError, match=message):
        run(fill(SweepSettings, given), tmp_path / "out")
    assert not (tmp_path / "out").exists()
