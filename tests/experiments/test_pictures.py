"""True pictures: those of requests fulfil them, those of a folder are squares."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from janusflow import SettingsError
from janusflow.data.shapes.language import KINDS, held_out_requests
from janusflow.evaluation.shapes_scorer import fulfils
from janusflow.experiments.pictures import as_tensor, draw_request, picture_files, read_square


def test_a_drawn_request_shows_what_it_asks_for() -> None:
    requests = held_out_requests(20 * len(KINDS), seed=3)
    assert any(request.zone for request in requests)
    assert any(request.background for request in requests)
    for index, request in enumerate(requests):
        assert fulfils(draw_request(request, 64, np.random.default_rng(index)), request), request


def test_what_a_request_leaves_open_is_left_to_chance() -> None:
    (request,) = held_out_requests(1)
    drawn = [draw_request(request, 32, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    first, same, other = map(np.asarray, drawn)
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)


def test_pictures_of_a_folder_are_its_middle_squares_by_name(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    wide = Image.new("RGB", (40, 20), "red")
    wide.paste("blue", (10, 0, 30, 20))
    wide.save(tmp_path / "b.png")
    Image.new("L", (20, 20), 0).save(tmp_path / "inner" / "c.JPG")
    (tmp_path / "a.txt").write_text("no picture")
    files = picture_files(str(tmp_path), "pictures")
    assert [file.name for file in files] == ["b.png", "c.JPG"]
    pictures = as_tensor([read_square(file, 10) for file in files])
    assert pictures.shape == (2, 3, 10, 10)
    blue = torch.tensor([0.0, 0, 1])[:, None, None]
    assert (pictures[0] - blue).abs().max() < 0.1
    files[1].unlink()
    with pytest.raises(SettingsError, match=r"pictures is .*: a folder with at least 2 pictures"):
        picture_files(str(tmp_path), "pictures")
