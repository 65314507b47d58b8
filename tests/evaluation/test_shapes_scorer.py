"""The exact scorer accepts what was drawn and refuses what was not asked for."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from janusflow.data.shapes import Scene, ShapeObject, describe, draw, sample_scene
from janusflow.data.shapes.language import Item, Request
from janusflow.evaluation.shapes_scorer import background_of, find_objects, fulfils

RED_CIRCLE = ShapeObject("circle", "red", 0.5, 0.25, 0.17)
BLUE_SQUARE = ShapeObject("square", "blue", 0.5, 0.75, 0.17)
PAIR = draw(Scene("pair", "white", (RED_CIRCLE, BLUE_SQUARE)))
ABOVE = Request(
    "position", "", (Item("circle", "red"), Item("square", "blue")), "above", None, "white"
)


def test_what_is_drawn_fulfils_its_own_caption():
    rng = np.random.default_rng(11)
    drawn = [sample_scene(rng) for _ in range(300)]
    assert all(fulfils(draw(scene), describe(scene, rng)) for scene in drawn)


def test_a_slight_blur_and_noise_do_not_change_the_verdict():
    rng = np.random.default_rng(12)
    hits = 0
    for _ in range(100):
        scene = sample_scene(rng)
        blurred = draw(scene).filter(ImageFilter.GaussianBlur(0.6))
        noisy = np.asarray(blurred, float) + rng.normal(0, 6, (64, 64, 3))
        picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        hits += fulfils(picture, describe(scene, rng))
    assert hits >= 97


def test_other_pictures_do_not_fulfil_a_caption():
    rng = np.random.default_rng(13)
    drawn = [sample_scene(rng) for _ in range(200)]
    captions = [describe(scene, rng) for scene in drawn]
    hits = [fulfils(draw(drawn[i - 1]), captions[i]) for i in range(len(drawn))]
    assert sum(hits) <= 6  # now and then a neighbour happens to fit


def test_the_pair_is_seen_as_it_is():
    assert background_of(PAIR) == "white"
    found = {(s.shape, s.color): s for s in find_objects(PAIR)}
    assert set(found) == {("circle", "red"), ("square", "blue")}
    assert found["circle", "red"].y == pytest.approx(0.25, abs=0.01)
    assert fulfils(PAIR, ABOVE)


@pytest.mark.parametrize(
    "wrong",
    [
        {"relation": "below"},
        {"relation": "left of"},
        {"background": "black"},
        {"items": (Item("circle", "red"),), "relation": None},
        {"items": (Item("circle", "blue"), Item("square", "red"))},
        {"items": (Item("ring", "red"), Item("square", "blue"))},
    ],
)
def test_each_part_of_a_request_counts(wrong):
    fields = {name: getattr(ABOVE, name) for name in ("items", "relation", "background")}
    assert not fulfils(PAIR, Request("position", "", **{**fields, **wrong}))


def test_a_zone_is_the_nearest_one():
    picture = draw(Scene("single", "gray", (RED_CIRCLE,)))
    circle = (Item("circle"),)
    assert fulfils(picture, Request("single", "", circle, zone="at the top"))
    assert not fulfils(picture, Request("single", "", circle, zone="in the middle"))


def test_an_empty_picture_holds_nothing_and_a_blob_is_no_shape():
    assert find_objects(Image.new("RGB", (64, 64), "white")) == []
    blob = Image.new("RGB", (64, 64), (20, 20, 20))
    blob.paste((220, 40, 40), (10, 10, 20, 50))
    assert [sighting.shape for sighting in find_objects(blob)] == [None]
