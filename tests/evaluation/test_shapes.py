"""The benchmarks of the shapes world, with pipelines that know the right answers or none."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from janusflow.data.shapes import KINDS, QUESTION_KINDS, draw, sample_scene
from janusflow.data.shapes.language import describe, held_out_questions
from janusflow.errors import SettingsError
from janusflow.evaluation import shapes
from janusflow.evaluation.shapes import score_answers, score_pictures


class Oracle:
    """Draws and answers what it is told to know; anything else is empty."""

    def __init__(self, pictures=None, answers=None):
        self.pictures = pictures or {}
        self.answers = answers or {}
        self.calls = []
        self.model = SimpleNamespace(
            config=SimpleNamespace(vision_config=SimpleNamespace(image_size=64))
        )

    def set_progress_bar_config(self, **settings):
        self._progress_bar_config = settings

    def __call__(self, prompts, *, seed, **settings):
        self.calls.append((len(prompts), seed, settings))
        empty = Image.new("RGB", (64, 64), "white")
        return SimpleNamespace(images=[self.pictures.get(prompt, empty) for prompt in prompts])

    def chat(self, messages, **options):
        assert options["do_sample"] is False
        keys = [conversation[0]["content"] for conversation in messages]
        return [self.answers.get((i["image"].tobytes(), t["text"]), "") for i, t in keys]


@pytest.fixture
def known(monkeypatch):
    """Thirty requests, each with the scene that it describes."""
    rng = np.random.default_rng(7)
    pairs = {}
    while len(pairs) < 30:
        kind = KINDS[len(pairs) % 6]
        scene = sample_scene(rng)
        try:
            request = describe(scene, rng, kind)
        except ValueError:
            continue
        if request.text not in {text for _, text in pairs}:
            pairs[request, request.text] = draw(scene)
    requests = [request for request, _ in pairs]
    monkeypatch.setattr(shapes, "held_out_requests", lambda num, seed: requests[:num])
    return {text: picture for (_, text), picture in pairs.items()}, requests


def test_right_pictures_score_one_and_empty_ones_nothing(known):
    pictures, _ = known
    scores = score_pictures(Oracle(pictures), num=30)
    assert scores == {"overall": 1.0, **dict.fromkeys(KINDS, 1.0), "num_prompts": 30}
    assert score_pictures(Oracle(), num=30)["overall"] == 0.0


def test_overall_is_the_mean_over_the_kinds(known):
    pictures, requests = known
    wrong = {request.text for request in requests if request.kind == "counting"}
    scores = score_pictures(
        Oracle({text: picture for text, picture in pictures.items() if text not in wrong}), num=30
    )
    assert scores["counting"] == 0.0
    assert scores["overall"] == pytest.approx(5 / 6, abs=1e-4)


def test_each_picture_has_its_own_seed_whatever_the_batch(known):
    pipe = Oracle(known[0])
    score_pictures(pipe, num=30, seed=5, batch_size=12, num_inference_steps=3)
    settings = {"num_inference_steps": 3}
    assert pipe.calls == [(12, 5, settings), (12, 17, settings), (6, 29, settings)]


def test_the_sheet_frames_misses_in_red(known, tmp_path):
    pictures, requests = known
    del pictures[requests[0].text]
    score_pictures(Oracle(pictures), num=12, sheet=tmp_path / "sheet.png")
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.size == (8 * 70, 2 * 70)
    assert sheet.getpixel((0, 0)) == (255, 0, 0)
    assert sheet.getpixel((70, 0)) == (255, 255, 255)


def test_answers_are_compared_without_case_blanks_and_full_stop():
    asked = held_out_questions(40)
    answers = {
        (draw(scene).tobytes(), question.text): f" {question.answer.capitalize()}. "
        for scene, question in asked
    }
    scores = score_answers(Oracle(answers=answers), num=40)
    assert scores == {"overall": 1.0, **dict.fromkeys(QUESTION_KINDS, 1.0), "num_prompts": 40}
    assert score_answers(Oracle(), num=40)["overall"] == 0.0
    json.dumps(scores)


def test_fewer_prompts_than_kinds_are_refused():
    with pytest.raises(SettingsError, match="num is 5"):
        score_pictures(Oracle(), num=5)
    with pytest.raises(SettingsError, match="num is 3"):
        score_answers(Oracle(), num=3)
