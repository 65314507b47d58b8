"""The comparison on random weights: what its tables hold, and what a killed run leaves behind."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny import make_pipeline

from janusflow import SettingsError
from janusflow.experiments import compare as module
from janusflow.experiments.compare import CompareSettings, Comparison, compare, trained_alike
from janusflow.experiments.compare_report import write_report
from janusflow.files import held_alone
from janusflow.settings import fill, read_yaml

CONFIGS = Path(__file__).parents[2] / "configs" / "compare"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both heads, drawing pictures of one size."""
    folder = tmp_path_factory.mktemp("both")
    make_pipeline(("flow", "vq"), image_size=32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def settings(model: Path) -> CompareSettings:
    return fill(
        CompareSettings,
        {
            "flow_model": str(model),
            "vq_model": str(model),
            "prompts": {"num": 12},
            "pictures": {"num": 16},
            "flow": {"num_inference_steps": [1, 3]},
            "batch_size": 4,
            "resamples": 30,
        },
    )


@pytest.fixture(scope="module")
def found(settings: CompareSettings, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return compare(settings, tmp_path_factory.mktemp("whole"))


def repeatable(comparison: Comparison) -> dict[str, Any]:
    return {name: rows for name, rows in comparison.tables.items() if name != "timings"}


def test_tables_have_a_row_for_each_way_of_drawing(found: Comparison) -> None:
    names = ["flow-1-steps", "flow-3-steps", "vq-temperature-1"]
    for table in ("generation", "cost", "timings"):
        assert [row["variant"] for row in found.tables[table]] == names
    cost = {row["variant"]: row for row in found.tables["cost"]}
    assert [cost[name]["nfe"] for name in names] == [1, 3, 16]
    assert [cost[name]["forward_passes"] for name in names] == [2, 6, 32]
    step = (cost["flow-3-steps"]["gflops"] - cost["flow-1-steps"]["gflops"]) / 2
    assert 0 < step < cost["flow-1-steps"]["gflops"]
    for row in found.tables["tokenizers"]:
        assert row["psnr_low"] <= row["psnr"] <= row["psnr_high"]
        assert row["frechet_biased"] == "yes"
    for row in found.tables["generation"]:
        assert 0 <= row["score"] <= 1
        assert row["single"] is not None
    for row in found.tables["timings"]:
        assert row["seconds_a_picture"] > 0
        assert row["peak_memory_mb"] > 0


def test_reconstruction_is_measured_on_the_same_pictures(found: Comparison) -> None:
    originals = found.originals.astype(float) / 255
    for row, head in zip(found.tables["tokenizers"], ("flow", "vq"), strict=True):
        shown = found.reconstructions[head].astype(float) / 255
        squared = np.square(originals - shown).mean(axis=(1, 2, 3))
        assert row["psnr"] == pytest.approx((-10 * np.log10(squared)).mean(), abs=1e-3)


def test_a_run_that_is_stopped_goes_on_and_gives_the_same_tables(
    settings: CompareSettings, found: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[str] = []
    for name in ("_reconstruct", "_draw", "_count", "_measure"):
        whole = getattr(module._Work, name)

        def counting(self: Any, *rest: Any, whole: Any = whole, name: str = name) -> Any:
            computed.append(name)
            if len(computed) in (3, 9):
                raise KeyboardInterrupt
            return whole(self, *rest)

        monkeypatch.setattr(module._Work, name, counting)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            compare(settings, tmp_path)
    again = compare(settings, tmp_path)
    assert repeatable(again) == repeatable(found)
    pieces = 4 + 3 * 3 + 3 * 2
    assert len(computed) == pieces + 2  # what was interrupted is computed again, nothing else
    assert compare(settings, tmp_path).tables == again.tables  # timings are kept, too
    assert len(computed) == pieces + 2


@pytest.mark.slow
def test_a_killed_command_goes_on_and_gives_the_same_tables(
    settings: CompareSettings, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(asdict(settings)))
    command = [sys.executable, "-m", "janusflow.cli", "compare", str(config), "-o"]
    units = tmp_path / "killed" / "units"
    for pieces in (3, 9):
        process = subprocess.Popen([*command, str(tmp_path / "killed")])
        while not units.is_dir() or len(list(units.iterdir())) < pieces:
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "killed" / "results.json").exists()
    for name in ("killed", "whole"):
        subprocess.run([*command, str(tmp_path / name)], check=True)
    for table in ("tokenizers", "generation", "cost"):
        killed, whole = (
            (tmp_path / name / "tables" / f"{table}.csv").read_bytes()
            for name in ("killed", "whole")
        )
        assert killed == whole


def test_a_folder_of_other_settings_is_left_alone(
    settings: CompareSettings, tmp_path: Path
) -> None:
    (tmp_path / "settings.json").write_text('{"flow_model": "other"}')
    with pytest.raises(SettingsError, match=r"holds results of other settings \(.*flow_model"):
        compare(settings, tmp_path)
    assert not list((tmp_path / "units").iterdir())


def test_a_second_comparison_in_the_folder_is_refused(
    settings: CompareSettings, tmp_path: Path
) -> None:
    with (
        held_alone(tmp_path, "comparison"),
        pytest.raises(SettingsError, match=f"another comparison is at work in {tmp_path}; wait"),
    ):
        compare(settings, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_the_report_holds_tables_figures_and_prompts(
    found: Comparison, settings: CompareSettings, tmp_path: Path
) -> None:
    page = write_report(found, settings, tmp_path).read_text()
    assert 'src="data:image/png;base64,' in page
    assert "http" not in page
    assert found.prompts[0] in page
    assert found.trained_alike.split(";")[0] in page
    for name, rows in found.tables.items():
        with (tmp_path / "tables" / f"{name}.csv").open() as file:
            read = list(csv.DictReader(file))
        assert [dict(row) for row in read] == [
            {key: str(value) for key, value in row.items()} for row in rows
        ]
    held = json.loads((tmp_path / "results.json").read_text())
    assert held["generation"] == found.tables["generation"]
    for name in ("quality_against_nfe", "quality_against_seconds", "side_by_side", "error_maps"):
        with Image.open(tmp_path / "figures" / f"{name}.png") as figure:
            assert min(figure.size) > 50


def test_a_prompt_with_markup_is_shown_as_text(
    found: Comparison, settings: CompareSettings, tmp_path: Path
) -> None:
    page = write_report(replace(found, prompts=["<b>bold</b>"]), settings, tmp_path).read_text()
    assert "&lt;b&gt;bold&lt;/b&gt;" in page


def test_prompts_and_pictures_of_ones_own_are_taken(
    settings: CompareSettings, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n\n  a dog \na bird\n")
    (tmp_path / "pictures").mkdir()
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 255, (40, 60, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{index}.png")
    own = replace(
        settings,
        prompts=replace(settings.prompts, source=str(tmp_path / "prompts.txt"), num=10),
        pictures=replace(settings.pictures, source=str(tmp_path / "pictures")),
        flow=replace(settings.flow, num_inference_steps=[1]),
    )
    found = compare(own, tmp_path / "out")
    assert found.prompts == ["a cat", "a dog", "a bird"]
    assert [row["pictures"] for row in found.tables["generation"]] == [3, 3]
    assert "score" not in found.tables["generation"][0]
    assert [row["pictures"] for row in found.tables["tokenizers"]] == [3, 3]
    write_report(found, own, tmp_path / "out")


def test_whether_the_heads_learned_alike_is_read_from_their_records(
    model: Path, tmp_path: Path
) -> None:
    assert "not recorded" in trained_alike(str(model), str(model))
    record = {"steps": 3, "data": "shapes"}
    distilled = {**record, "distillation": {"steps": 5}}
    records = {"one": record, "two": record, "three": {**record, "steps": 4}}
    for name, content in (records | {"four": distilled, "five": distilled}).items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "janusflow"}')
        (folder / "training.json").write_text(json.dumps(content))
    one, two, three, four, five = (
        str(tmp_path / name) for name in ("one", "two", "three", "four", "five")
    )
    assert trained_alike(one, one).startswith("Yes: both heads")
    assert trained_alike(one, two).startswith("Yes: two checkpoints")
    assert trained_alike(one, three) == "No: two checkpoints whose training differs in steps."
    assert trained_alike(str(model), one).startswith("Not known")
    assert trained_alike(four, four).startswith("Not to the end: both heads were trained in the")
    assert trained_alike(four, four).endswith("then the flow head in 5 more.")
    for vq in (one, five):
        assert (
            trained_alike(four, vq) == "No: two checkpoints whose training differs in distillation."
        )
    assert trained_alike(one, four).endswith("differs in distillation.")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": {"source": "/nowhere.txt"}}, "no such file, nor 'shapes'"),
        ({"pictures": {"source": "/nowhere"}}, "a folder with at least 2 pictures"),
        ({"features": "vgg"}, "expected 'pixels'"),
        ({"flow": {"solver": "oiler"}}, "oiler"),
        ({"flow": {"num_inference_steps": []}}, "at least one value"),
        ({"prompts": {"num": 1}}, "at least 2"),
        ({"batch_size": 0}, "batch_size is at least 1"),
        ({"dtype": "int8"}, "expected float32"),
        ({"flow_modell": "tiny"}, "did you mean 'flow_model'"),
    ],
)
def test_a_bad_setting_is_refused(
    changes: dict[str, Any], message: str, model: Path, tmp_path: Path
) -> None:
    base = {"flow_model": str(model), "vq_model": str(model)}
    with pytest.raises(SettingsError, match=message):
        compare(fill(CompareSettings, {**base, **changes}), tmp_path)


def test_heads_of_different_sizes_are_not_compared(
    settings: CompareSettings, tmp_path: Path
) -> None:
    make_pipeline(("flow",)).save_pretrained(tmp_path / "flow")
    other = replace(settings, flow_model=str(tmp_path / "flow"))
    with pytest.raises(SettingsError, match="64 px and the VQ head 32 px"):
        compare(other, tmp_path / "out")
    with pytest.raises(SettingsError, match="no generation head 'vq'; it holds: flow"):
        compare(replace(other, vq_model=other.flow_model), tmp_path / "out")


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_shipped_configs_fit_their_settings(file: Path) -> None:
    assert fill(CompareSettings, read_yaml(file)).prompts.num >= 2
