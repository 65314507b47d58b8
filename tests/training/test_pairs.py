"""Pairs for reflow: what the model's own path joins is what it is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from janusflow import JanusFlowPipeline, SettingsError
from janusflow.data.sources import open_source, source_settings
from janusflow.evaluation.shapes_scorer import fulfils
from janusflow.files import held_alone
from janusflow.settings import fill
from janusflow.training.pairs import PairsRunSettings, make_pairs
from janusflow.training.stage import StageObjective, StageSettings

CAPTIONS = {"format": "shapes", "kind": "generation", "num_pictures": 30}


def settings_of(folder: Path, **changes: Any) -> PairsRunSettings:
    values = {
        "output_dir": str(folder),
        "data": {"sources": {"captions": CAPTIONS}, "threads": 0},
        "num_pairs": 7,
        "pairs_per_file": 3,
        "num_inference_steps": 2,
        "seed": 40,
    }
    return fill(PairsRunSettings, {**values, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pairs(settings_of(tmp_path_factory.mktemp("pairs")))


def source_of(folder: Path) -> Any:
    values = {"format": "pairs", "kind": "generation", "path": str(folder)}
    return open_source("pairs", source_settings("pairs", values))


def test_a_pair_is_joined_by_the_guided_path_of_the_model(folder: Path) -> None:
    source = source_of(folder)
    assert len(source) == 7
    assert len({source[index].prompt for index in range(7)}) > 4
    pipe = JanusFlowPipeline.from_pretrained("tiny", vae=None)
    pipe.set_progress_bar_config(disable=True)
    for index in (0, 2, 6):
        sample = source[index]
        x_0, x_1 = sample.ends
        out = pipe(
            sample.prompt, head="flow", latents=x_0, num_inference_steps=2, output_type="latent"
        )
        torch.testing.assert_close(x_1, out.latents, atol=2e-3, rtol=1e-3)
        generator = torch.Generator().manual_seed(40 + index)
        assert torch.equal(x_0[0], torch.randn(x_0.shape[1:], generator=generator))
    assert source[6].name == "part-00002.safetensors:0"


def test_a_run_that_was_stopped_makes_the_same_files(folder: Path, tmp_path: Path) -> None:
    make_pairs(settings_of(tmp_path, num_pairs=7))
    files = sorted((tmp_path / "final").iterdir())
    whole = {file.name: file.read_bytes() for file in files}
    assert whole == {file.name: file.read_bytes() for file in folder.iterdir()}
    (tmp_path / "final" / "part-00001.safetensors").unlink()
    kept = (tmp_path / "final" / "part-00000.safetensors").stat().st_mtime_ns
    make_pairs(settings_of(tmp_path))
    assert {file.name: file.read_bytes() for file in files} == whole
    assert (tmp_path / "final" / "part-00000.safetensors").stat().st_mtime_ns == kept


def test_only_right_pairs_are_kept_where_that_is_asked(tmp_path: Path) -> None:
    few = {"num_pairs": 8, "pairs_per_file": 8, "num_inference_steps": 2}
    whole = source_of(make_pairs(settings_of(tmp_path / "all", **few)))
    right = source_of(make_pairs(settings_of(tmp_path / "right", right_only=True, **few)))
    pipe = JanusFlowPipeline.from_pretrained("tiny")
    captions = open_source("captions", source_settings("captions", CAPTIONS))
    requests = {sample.prompt: sample.request for sample in (captions[i] for i in range(30))}
    kept = []
    for pair in (whole[index] for index in range(8)):
        x_0, x_1 = pair.ends
        image = pipe(pair.prompt, head="flow", latents=x_0, num_inference_steps=2).images[0]
        if fulfils(image, requests[pair.prompt]):
            kept.append((pair.prompt, x_1))
    assert 0 < len(kept) < 8, "some right, some wrong, or nothing is tested"
    assert len(right) == len(kept)
    for index, (prompt, x_1) in enumerate(kept):
        assert right[index].prompt == prompt
        assert torch.equal(right[index].ends[1], x_1)
    Image.new("RGB", (8, 8)).save(tmp_path / "cat.png")
    (tmp_path / "cat.txt").write_text("a cat")
    folder = {"format": "folder", "kind": "generation", "path": str(tmp_path)}
    with pytest.raises(SettingsError, match="only pictures of the shapes world can be judged"):
        make_pairs(
            settings_of(tmp_path, right_only=True, data={"sources": {"own": folder}, "threads": 0})
        )


def test_a_miss_gets_the_nearest_right_picture(tmp_path: Path) -> None:
    few = {"num_inference_steps": 2, "solver": "euler", "shift": 1.5, "guidance_scale": 1.5}
    many = {"num_inference_steps": 6, "solver": "ab2"}
    files = {"num_pairs": 20, "pairs_per_file": 20}
    whole = source_of(make_pairs(settings_of(tmp_path / "all", **files)))
    mended = {"right_only": True, "missed_by": few, **many}
    mended |= {"guidance_scale": 1.0, "more_guidance_scales": [2.0, 2.5]}
    missed = source_of(make_pairs(settings_of(tmp_path / "missed", **files, **mended)))
    pipe = JanusFlowPipeline.from_pretrained("tiny")
    pipe.set_progress_bar_config(disable=True)
    captions = open_source("captions", source_settings("captions", CAPTIONS))
    requests = {sample.prompt: sample.request for sample in (captions[i] for i in range(30))}
    expected, chosen = [], []
    for pair in (whole[index] for index in range(20)):
        common = {"head": "flow", "latents": pair.ends[0]}
        wrong = pipe(pair.prompt, **common, **few)
        if fulfils(wrong.images[0], requests[pair.prompt]):
            continue
        outs = [
            pipe(pair.prompt, **common, **many, guidance_scale=scale) for scale in (1.0, 2.0, 2.5)
        ]
        right = [out for out in outs if fulfils(out.images[0], requests[pair.prompt])]
        if right:
            near = min(right, key=lambda out: (out.latents - wrong.latents).norm().item())
            expected.append((pair.prompt, pair.ends[0], near.latents))
            chosen.append((len(right), outs.index(near)))
    assert {(2, 0), (2, 1)} < set(chosen), "the nearest is each of two, or nothing is tested"
    assert len(missed) == len(expected) < 20
    for index, (prompt, x_0, x_1) in enumerate(expected):
        assert missed[index].prompt == prompt
        assert torch.equal(missed[index].ends[0], x_0)
        torch.testing.assert_close(missed[index].ends[1], x_1, atol=2e-3, rtol=1e-3)


def test_files_without_a_pair_are_refused(tmp_path: Path) -> None:
    few = {"num_inference_steps": 30, "solver": "euler"}
    settings = settings_of(tmp_path, num_pairs=2, seed=1, right_only=True, missed_by=few)
    folder = make_pairs(settings)
    assert list(folder.glob("*.safetensors"))
    with pytest.raises(
        SettingsError, match=r"no pair is in the files of .*make more by task pairs"
    ):
        source_of(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"missed_by": {"num_inference_steps": 6}}, "set right_only to true"),
        ({"missed_by": {"num_inference_steps": -1}}, "num_inference_steps is at least 0, not -1"),
        ({"more_guidance_scales": [2.0]}, "set missed_by.num_inference_steps, or leave them out"),
    ],
)
def test_misses_need_what_tells_them(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        settings_of(tmp_path, **changes)


def test_pairs_can_be_made_in_bfloat16(folder: Path, tmp_path: Path) -> None:
    rough = source_of(make_pairs(settings_of(tmp_path, dtype="bfloat16")))
    changes = []
    for index in range(7):
        (x_0, x_1), (other_x_0, other_x_1) = source_of(folder)[index].ends, rough[index].ends
        assert torch.equal(x_0, other_x_0)
        changes.append(float((x_1 - other_x_1).norm() / x_1.norm()))
    assert 1e-4 < sorted(changes)[3] < 0.05, "another rounding, the same pictures"
    with pytest.raises(SettingsError, match="dtype is 'half'; expected one of float32, bfloat16"):
        settings_of(tmp_path, dtype="half")


def test_pairs_of_other_settings_are_left_alone(folder: Path) -> None:
    place = folder.parent
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    for changes in ({"guidance_scale": 3.0}, {"num_pairs": 8}):
        name = next(iter(changes))
        with pytest.raises(SettingsError, match=rf"made with other settings \({name}: .*set them"):
            make_pairs(settings_of(place, **changes))
    with (
        held_alone(place, "run"),
        pytest.raises(SettingsError, match="another run is at work in"),
    ):
        make_pairs(settings_of(place))
    make_pairs(settings_of(place, batch_size=2))
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_pairs_of_unknown_settings_are_left_alone(tmp_path: Path) -> None:
    stranger = tmp_path / "final" / "part-00000.safetensors"
    stranger.parent.mkdir()
    stranger.write_bytes(b"")
    with pytest.raises(SettingsError, match=r"holds pairs, but not the settings\.json"):
        make_pairs(settings_of(tmp_path))
    assert [file.name for file in stranger.parent.iterdir()] == [stranger.name]


def test_a_stage_learns_the_straight_path_between_the_ends(folder: Path, tmp_path: Path) -> None:
    pairs = {"format": "pairs", "kind": "generation", "path": str(folder)}
    values: dict[str, Any] = {
        "output_dir": str(tmp_path),
        "trained": ["flow_head"],
        "data": {"sources": {"pairs": pairs}, "threads": 0},
        "packing": {"length": 256},
        "drawing": {"noises_per_picture": 2, "condition_dropout_prob": 0.0},
        "alignment": {"weight": 0},
    }
    batch = StageObjective(fill(StageSettings, values)).batch(0)
    known = {tuple(source_of(folder)[i].ends[0].flatten()[:3].tolist()): i for i in range(7)}
    for at in range(0, len(batch["x_0"]), 2):
        first, second = batch["x_0"][at : at + 2]
        assert torch.equal(first, second), "one noise, seen at two times"
        assert batch["t"][at] != batch["t"][at + 1]
        index = known[tuple(first.flatten()[:3].tolist())]
        assert torch.equal(batch["x_1"][at], source_of(folder)[index].ends[1][0])
    with pytest.raises(SettingsError, match=r"set alignment\.weight to 0"):
        StageObjective(fill(StageSettings, {**values, "alignment": {"weight": 1.0}}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_pairs": 0}, "num_pairs is at least 1"),
        ({"data": {"sources": {}}}, "there is no source"),
        ({"data": {"sources": {"q": {**CAPTIONS, "kind": "understanding"}}}}, "and data has none"),
    ],
)
def test_bad_pairs_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make_pairs(settings_of(tmp_path, **changes))
    with pytest.raises(SettingsError, match="expected a folder of pairs"):
        source_of(tmp_path / "none")
